"""What compose.yaml and the Dockerfile promise. No container engine is needed: the file is checked
against the Compose specification, and the commands in it are run as they stand."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_proxy.embedded import server_binary
from cache_proxy.settings import Settings
from tests.conftest import World

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
LASTING = ("redis", "cache-proxy")


def specification(path: Path) -> subprocess.CompletedProcess[str]:
    """The Compose specification's own schema, as a published checker ships it."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)


def megabytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([mg])b?", text.lower()).groups()  # type: ignore[union-attr]
    return int(number) * {"m": 1, "g": 1024}[unit]


def valkey_options() -> dict[str, str]:
    command = SERVICES["redis"]["command"]
    assert command[0] == "valkey-server"
    return dict(zip(command[1::2], command[2::2], strict=True))


def dockerfile_health() -> list[str]:
    """The HEALTHCHECK's command as Docker reads it: continued lines joined, then JSON."""
    joined = DOCKERFILE.replace("\\\n", "")
    return json.loads(re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", joined, re.MULTILINE)[1])  # type: ignore[index]


def test_the_compose_file_follows_the_compose_specification() -> None:
    """Checked against the schema that Compose itself validates with."""
    found = specification(ROOT / "compose.yaml")
    assert found.returncode == 0, found.stdout


def test_the_specification_would_notice_a_misspelt_key(tmp_path: Path) -> None:
    """The check above can fail."""
    text = (ROOT / "compose.yaml").read_text("utf-8")
    (tmp_path / "compose.yaml").write_text(text.replace("mem_limit:", "memory_limit:", 1), "utf-8")
    assert specification(tmp_path / "compose.yaml").returncode != 0


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_is_root_or_may_become_it(name: str) -> None:
    """A user by number, no capabilities, no new privileges, nothing writable but its volumes."""
    service = SERVICES[name]
    user, _, group = service["user"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["read_only"] is True
    assert not service.get("privileged")


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_memory_limit(name: str) -> None:
    """I7: what can grow has a cap, the container included."""
    assert 64 <= megabytes(SERVICES[name]["mem_limit"]) <= 2048
    assert SERVICES[name]["pids_limit"] <= 256


@pytest.mark.parametrize("name", LASTING)
def test_what_runs_on_is_watched_and_started_again(name: str) -> None:
    """A health check and a restart policy."""
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_what_must_outlive_a_container_lies_in_a_named_volume() -> None:
    """The answers, and the secret without which they cannot be read."""
    for name, folder in {"redis": "/data", "cache-proxy": "/data"}.items():
        (mount,) = SERVICES[name]["volumes"]
        volume, _, target = mount.partition(":")
        assert volume in COMPOSE["volumes"]
        assert target == folder
    assert valkey_options()["--appendonly"] == "yes"


def test_the_store_may_not_evict_the_rules_that_purges_leave() -> None:
    """I1: purged stays purged, so only keys with an expiry may be evicted."""
    assert valkey_options()["--maxmemory-policy"].startswith("volatile-")


def test_the_answers_fit_into_the_store_and_the_store_into_its_container() -> None:
    """I7: half as much again for the store's books, and room to fork."""
    answers = int(SERVICES["cache-proxy"]["environment"]["CACHE_PROXY_MAX_BYTES"]) / 1024 / 1024
    memory = megabytes(valkey_options()["--maxmemory"])
    assert answers * 1.5 <= memory
    assert memory * 1.5 <= megabytes(SERVICES["redis"]["mem_limit"])


def test_only_the_proxy_port_is_published_and_on_this_host_only() -> None:
    """Whoever reaches the port spends; neither store nor admin port leave their networks."""
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert published == {"redis": [], "cache-proxy": ["127.0.0.1:8080:8080"], "app": []}
    assert COMPOSE["networks"]["store"]["internal"] is True
    assert SERVICES["redis"]["networks"] == ["store"]
    assert SERVICES["app"]["networks"] == ["app"]


def test_the_app_waits_for_the_proxy_and_the_proxy_not_for_its_store() -> None:
    """I3: without its store the sidecar is a plain proxy."""
    assert SERVICES["app"]["depends_on"] == {"cache-proxy": {"condition": "service_healthy"}}
    assert SERVICES["cache-proxy"]["depends_on"] == {"redis": {"condition": "service_started"}}


def test_neither_file_holds_a_secret() -> None:
    """I9: keys come from the environment of whoever starts it."""
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"KEY|SECRET|TOKEN|PASSWORD", name):
                assert value == f"${{{name}:-}}"
    text = (ROOT / "compose.yaml").read_text("utf-8") + DOCKERFILE
    assert not re.search(r"sk-[A-Za-z0-9]|redis://[^/]*@", text)


def test_every_setting_in_the_environment_exists() -> None:
    """A misspelt CACHE_PROXY_ variable would be ignored in silence."""
    compose = SERVICES["cache-proxy"]["environment"]
    named = {*compose, *re.findall(r"CACHE_PROXY_[A-Z_]+", DOCKERFILE)}
    assert len(named) >= 5
    for name in named:
        assert name.removeprefix("CACHE_PROXY_").lower() in Settings.model_fields, name


def test_the_image_is_built_in_two_stages_and_runs_as_the_user_of_the_compose_file() -> None:
    """Pinned packages, no root, the same health check in both files."""
    lines = DOCKERFILE.splitlines()
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert f"USER {SERVICES['cache-proxy']['user']}" in lines
    assert lines.index(f"USER {SERVICES['cache-proxy']['user']}") < lines.index('CMD ["serve"]')
    assert "-c constraints.txt" in DOCKERFILE
    kind, *command = SERVICES["cache-proxy"]["healthcheck"]["test"]
    assert kind == "CMD"
    assert _statements(command[-1]) == _statements(dockerfile_health()[-1])


def test_the_image_gets_what_it_copies_and_little_else() -> None:
    """Everything is ignored but what the Dockerfile names."""
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        word.strip("./")
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert "*" in ignore
    assert allowed == copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.live
def test_valkey_takes_the_options_of_the_compose_file(tmp_path: Path) -> None:
    """A real Valkey starts with them, on a socket in a folder of its own, and says they hold."""
    options = [word for pair in valkey_options().items() for word in pair]
    places = ["--port", "0", "--unixsocket", "s", "--dir", "."]
    server = subprocess.Popen(
        [server_binary(), *options, *places], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        import redis

        client = redis.Redis(unix_socket_path=os.path.relpath(tmp_path / "s"), retry=_patient())
        found = client.config_get("appendonly", "maxmemory", "maxmemory-policy", "save")
        client.close()
    finally:
        server.terminate()
        server.wait(10)
    assert found == {
        "appendonly": "yes",
        "maxmemory": str(megabytes(valkey_options()["--maxmemory"]) * 1024 * 1024),
        "maxmemory-policy": "volatile-lfu",
        "save": "",
    }


@pytest.mark.live
async def test_the_health_check_passes_while_the_proxy_lives_and_only_then(world: World) -> None:
    """The command of both files, run as it stands against a real admin port and a closed one."""
    port = world.admin.rpartition(":")[2]
    for command in (SERVICES["cache-proxy"]["healthcheck"]["test"][1:], dockerfile_health()):
        assert command[:2] == ["python", "-c"]
        alive = await _python(command[2].replace("8081", port))
        dead = await _python(command[2].replace("8081", "1"))
        assert (alive[0], dead[0] != 0) == (0, True)


@pytest.mark.live
async def test_the_example_app_sees_a_miss_and_then_a_hit(world: World) -> None:
    """The app container's own program, pointed at a real sidecar by the one line it needs."""
    command = SERVICES["app"]["command"]
    assert command[:2] == ["python", "-c"]
    code, printed = await _python(
        command[2], OPENAI_BASE_URL=world.base, OPENAI_API_KEY="sk-example"
    )
    assert code == 0, printed
    assert [line.split()[0] for line in printed.splitlines()] == ["MISS", "HIT"]
    assert world.upstream.calls == 1


def _statements(code: str) -> list[str]:
    return [part.strip().replace('"', "'") for part in re.split(r"[;\n]", code) if part.strip()]


def _patient() -> Any:
    """Until the server listens, for a minute at most."""
    import redis.retry
    from redis.backoff import ConstantBackoff

    return redis.retry.Retry(
        ConstantBackoff(0.05), 1_200, (redis.ConnectionError, FileNotFoundError)
    )


async def _python(code: str, **environment: str) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(child.communicate(), 100)
    return child.returncode or 0, out.decode()
