"""The store's scripts, in the Lua of Redis and Valkey: each is one atomic step.

Texts and their hashes, nothing else; `store` says which keys and arguments they get. The journal is
kept at some 20,000 records, about 2 MB.
"""

from __future__ import annotations

from hashlib import sha1

__all__ = ["FLOOR", "FORGET", "HEADS", "HEAL", "PURGE", "PUT", "SHA"]

# Shared by the scripts: take digest `d` out of the books, its value first.
DROP = """
local e, entries, sizes, total = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local function drop(d)
  redis.call('UNLINK', e .. d)
  redis.call('ZREM', entries, d)
  local size = tonumber(redis.call('HGET', sizes, d) or 0)
  redis.call('HDEL', sizes, d)
  return redis.call('DECRBY', total, size)
end
local function note(kind, ds, writer)
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', '20000', '*', 'k', kind, 'd', ds, 'w', writer)
end
"""

# The value is written by one SET with its expiry, so no entry can outlive it; the books follow.
PUT = (
    DROP
    + """
local digest, value, ttl, expires, now, most, most_bytes, limit, writer = unpack(ARGV)
most, most_bytes, limit = tonumber(most), tonumber(most_bytes), tonumber(limit)
redis.call('SET', e .. digest, value, 'EX', ttl)
redis.call('ZADD', entries, expires, digest)
local old = tonumber(redis.call('HGET', sizes, digest) or 0)
redis.call('HSET', sizes, digest, #value)
local bytes = redis.call('INCRBY', total, #value - old)
note('put', digest, writer)
local gone = redis.call('ZRANGEBYSCORE', entries, '-inf', now, 'LIMIT', 0, limit)
for _, d in ipairs(gone) do bytes = drop(d) end
local count = redis.call('ZCARD', entries)
while limit > 0 and count > 0 and (count > most or bytes > most_bytes) do
  local d = redis.call('ZRANGE', entries, 0, 0)[1]
  bytes = drop(d)
  gone[#gone + 1] = d
  count = count - 1
  limit = limit - 1
end
if #gone > 0 then note('del', table.concat(gone), writer) end
return gone
"""
)

FORGET = (
    DROP
    + """
local writer, ghosts = ARGV[1], ARGV[2] == '1'
local n, gone = 0, {}
for i = 3, #ARGV do
  if not ghosts or redis.call('EXISTS', e .. ARGV[i]) == 0 then
    drop(ARGV[i])
    n = n + 1
    gone[n] = ARGV[i]
  end
end
if n > 0 and not ghosts then note('del', table.concat(gone), writer) end
return n
"""
)

HEADS = """
local out = {}
for i = 2, #ARGV do out[i - 1] = redis.call('GETRANGE', KEYS[1] .. ARGV[i], 0, ARGV[1]) end
return out
"""

# An epoch is a time in milliseconds, pushed on where two would be equal: a number that a failover
# forgot is not given to another purge, so a process that knows the lost rule can tell.
PURGE = """
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), tonumber(ARGV[1])) + 1
epoch = string.format('%.0f', math.max(epoch, tonumber(ARGV[2])))
redis.call('SET', KEYS[1], epoch)
redis.call('HSET', KEYS[2], epoch, ARGV[3])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', '20000', '*', 'k', 'purge', 'd', '', 'w', ARGV[4])
return epoch
"""

# Only ever upwards. The epoch moves so that every process reads the floors again.
FLOOR = """
local old = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or 0)
if old >= tonumber(ARGV[2]) or (old == 0 and redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[4])) then
  return old
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or 0) + 1, tonumber(ARGV[3]))
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return tonumber(ARGV[2])
"""

HEAL = """
if tonumber(redis.call('GET', KEYS[1]) or 0) < tonumber(ARGV[1]) then
  redis.call('SET', KEYS[1], ARGV[1])
end
for i = 2, #ARGV, 2 do redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
"""


SHA = {s: sha1(s.encode(), usedforsecurity=False).hexdigest() for s in (PUT, FORGET, HEADS)}
