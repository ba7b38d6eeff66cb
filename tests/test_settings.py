"""Settings: four places in one order, and one sentence for each mistake."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from click.testing import Result
from typer.testing import CliRunner

from cache_proxy import cli
from cache_proxy.errors import ConfigError
from cache_proxy.settings import Settings, load, seconds

README = Path(__file__).parent.parent / "README.md"
CANARY = "hunter2-sk-canary"


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory and no setting in the environment."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CACHE_PROXY_{name.upper()}", raising=False)
    monkeypatch.delenv("CACHE_PROXY_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toml(folder: Path, text: str, name: str = "cache-proxy.toml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def complaint(**flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**flags)
    return str(caught.value)


# ---- which place counts


def test_flags_go_before_environment_before_file_before_defaults(
    clean_slate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place is asked only where the nearer ones are silent."""
    assert load().neighbours == 8
    toml(clean_slate, "neighbours = 2\nttl = '2h'\nport = 2222\n")
    assert (load().neighbours, load().ttl, load().port) == (2, 7_200, 2222)
    monkeypatch.setenv("CACHE_PROXY_NEIGHBOURS", "3")
    monkeypatch.setenv("cache_proxy_ttl", "3h")
    assert (load().neighbours, load().ttl, load().port) == (3, 10_800, 2222)
    found = load(neighbours=4, ttl=None)
    assert (found.neighbours, found.ttl, found.port) == (4, 10_800, 2222)


def test_the_file_may_be_named_by_flag_or_by_environment(
    clean_slate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A named file replaces the one in the working directory."""
    toml(clean_slate, "port = 1111")
    named = toml(clean_slate, "port = 2222", "named.toml")
    flagged = toml(clean_slate, "port = 3333", "flagged.toml")
    monkeypatch.setenv("CACHE_PROXY_CONFIG", str(named))
    assert load().port == 2222
    assert load(flagged).port == 3333


def test_lists_and_tables_have_a_spelling_in_each_place(
    clean_slate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list in TOML, commas in the environment; tenants as JSON there."""
    toml(clean_slate, 'guards_off = ["numbers"]\n[tenants]\nacme = ["sha256:' + "a" * 64 + '"]\n')
    assert load().guards_off == ("numbers",)
    assert load().tenant_names() == {"a" * 64: "acme"}
    monkeypatch.setenv("CACHE_PROXY_GUARDS_OFF", "negation, numbers,")
    monkeypatch.setenv("CACHE_PROXY_TENANTS", '{"beta": "sha256:%s"}' % ("b" * 64))
    assert load().guards_off == ("negation", "numbers")
    assert load().tenant_names() == {"b" * 64: "beta"}


def test_a_tenants_key_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no file needs to hold it; an unset variable names nobody."""
    monkeypatch.setenv("TEAM_KEY", CANARY)
    settings = load(tenants={"acme": ["env:TEAM_KEY", "env:NOT_SET"]})
    assert settings.tenant_names() == {hashlib.sha256(CANARY.encode()).hexdigest(): "acme"}
    assert CANARY not in repr(settings)


def test_settings_cannot_be_changed_afterwards() -> None:
    """Read once; nobody turns a knob behind the others' backs."""
    with pytest.raises(ValueError, match="frozen"):
        load().port = 1  # type: ignore[misc]


def test_no_secret_shows_in_a_printed_settings() -> None:
    """I9: the one secret among the settings prints as stars."""
    settings = load(secret=CANARY * 3)
    assert CANARY not in repr(settings) + str(settings) + settings.model_dump_json()


# ---- values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7d", 604_800),
        ("24h", 86_400),
        ("90m", 5_400),
        ("30s", 30),
        ("1w", 604_800),
        ("3600", 3_600),
        (3_600, 3_600),
        (" 5 m ", 300),
    ],
)
def test_durations(value: object, expected: int) -> None:
    """A number with a unit, or seconds."""
    assert seconds(value) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("upstream", ""),
        ("upstream", "api.openai.com/v1"),
        ("upstream", "ftp://host"),
        ("upstream", "https://"),
        ("upstream", "https://host:99999/v1"),
        ("upstream", "https://host:0/v1"),
        ("upstream", f"https://user:{CANARY}@host/v1"),
        ("upstream", f"https://host/v1?key={CANARY}"),
        ("port", -1),
        ("port", 65_536),
        ("port", "http"),
        ("admin_port", 70_000),
        ("workers", 0),
        ("workers", 65),
        ("redis_url", f"http://:{CANARY}@host"),
        ("redis_url", f"{CANARY}"),
        ("key_prefix", ""),
        ("key_prefix", "a b"),
        ("key_prefix", "x" * 41),
        ("key_prefix", "{slot}:*"),
        ("secret", CANARY),
        ("secret", ""),
        ("threshold", 0),
        ("threshold", 0.49),
        ("threshold", 1.01),
        ("threshold", "nan"),
        ("threshold", "high"),
        ("ttl", 0),
        ("ttl", -5),
        ("ttl", "soon"),
        ("ttl", "1.5h"),
        ("ttl", "367d"),
        ("ttl", True),
        ("neighbours", 0),
        ("neighbours", 65),
        ("neighbours", 2.5),
        ("guards_off", ["no-such-guard"]),
        ("max_temperature", -0.1),
        ("max_temperature", "nan"),
        ("time_bound", "sometimes"),
        ("semantic_with_tools", "perhaps"),
        ("store_tool_calls", 3),
        ("masks", ["("]),
        ("masks", [f"[{CANARY}"]),
        ("shadow", "perhaps"),
        ("tenancy", "per-user"),
        ("tenancy", "header:"),
        ("tenancy", "header:x user"),
        ("tenants", {"acme": [CANARY]}),
        ("tenants", {"acme": ["sha256:short"]}),
        ("tenants", [CANARY]),
        ("jwt_tenants", "perhaps"),
        ("end_user", "both"),
        ("acceptance", "never"),
        ("max_entries", 0),
        ("max_bytes", 999_999),
        ("max_answer_bytes", 0),
        ("max_body_bytes", 0),
        ("body_seconds", 0),
        ("cache_ms", 0),
        ("store_ms", 0),
        ("upstream_seconds", 0),
        ("connect_seconds", "nan"),
        ("max_connections", 0),
        ("log_level", "loud"),
        ("providers", {"a b": {}}),
        ("providers", {"task": {}}),
        ("providers.up.base_url", {"up": {"base_url": f"https://user:{CANARY}@host/v1"}}),
        ("providers.up.protocol", {"up": {"protocol": "smtp"}}),
        ("providers.up.headers", {"up": {"headers": {"x-key": f"{CANARY}\r\n"}}}),
        ("providers.up.rate", {"up": {"rate": "fast"}}),
        ("client_tokens", [CANARY]),
        ("retry.attempts", {"attempts": 0}),
        ("retry.budget", {"budget": 1.5}),
        ("deadlines.total_seconds", {"total_seconds": 0}),
        ("deadlines.models.*", {"models": {"*": -1}}),
        ("fallback.m.late", {"m": {"late": ["n"]}}),
        ("tasks.t.model", {"t": {"model": ""}}),
        ("tasks.t.priority", {"t": {"model": "m", "priority": "vip"}}),
        ("priorities.vip", {"vip": {}}),
        ("trim.reserve", {"reserve": 0}),
        ("stale_if_error", "soon"),
        ("thresold", 0.9),
    ],
)
def test_a_bad_value_stops_with_one_sentence_that_names_the_setting(name: str, value: Any) -> None:
    """I9 too: the sentence never says the value where that may be a secret."""
    said = complaint(**{name.partition(".")[0]: value})
    assert said.startswith(f"{name}: ")
    assert said.endswith(".")
    assert "\n" not in said
    assert CANARY not in said


def test_a_providers_key_is_not_for_everybody_to_spend(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key of its own and no client tokens the proxy listens on loopback only."""
    providers = {"openai": {"api_key_env": "PROVIDER_KEY"}}
    assert complaint(providers=providers, host="0.0.0.0").startswith("client_tokens: a provider's")
    assert load(providers=providers, host="::1").providers
    token = "sha256:" + "a" * 64
    settings = load(providers=providers, host="0.0.0.0", client_tokens=[token])
    assert settings.client_token_digests() == {"a" * 64}
    with pytest.raises(ConfigError, match=r"^providers.openai.api_key_env: the variable PROVIDER_"):
        settings.provider_keys()
    monkeypatch.setenv("PROVIDER_KEY", f" {CANARY}\n")
    assert settings.provider_keys() == {"openai": CANARY}
    monkeypatch.setenv("PROVIDER_KEY", f"{CANARY}\r\nx: y")
    with pytest.raises(ConfigError) as caught:
        settings.provider_keys()
    assert CANARY not in str(caught.value)
    assert CANARY not in repr(settings)


def test_a_client_token_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset variable stops at start: a token that nobody can send lets nobody in, silently."""
    settings = load(client_tokens="env:APP_TOKEN")
    with pytest.raises(ConfigError, match=r"^client_tokens: the variable APP_TOKEN is not set\.$"):
        settings.client_token_digests()
    monkeypatch.setenv("APP_TOKEN", CANARY)
    assert settings.client_token_digests() == {hashlib.sha256(CANARY.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "http"),
        ("threshold", "0.2"),
        ("secret", CANARY),
        ("redis_url", f"http://:{CANARY}@host"),
        ("tenants", f"{{{CANARY}"),
        ("tenants", f'{{"acme": ["{CANARY}"]}}'),
        ("shadow", "perhaps"),
    ],
)
def test_a_bad_value_in_the_environment_is_named_as_well(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The same sentence from another place."""
    monkeypatch.setenv(f"CACHE_PROXY_{name.upper()}", value)
    said = complaint()
    assert name in said
    assert "\n" not in said
    assert CANARY not in said


@pytest.mark.parametrize(
    "text",
    [
        "port = ",
        f'secret = "{CANARY}',
        "port = 1\nport = 2",
        "\x00",
        "[[tenants]]\nacme = 1",
        "threshhold = 0.9",
        "[providers.openai]\nbase = 'https://h'",
    ],
)
def test_a_bad_file_is_named(clean_slate: Path, text: str) -> None:
    """Bad TOML names the file, a bad or unknown name the setting."""
    said = complaint(config=toml(clean_slate, text))
    assert re.match(r"(config|tenants|threshhold|providers.openai.base): ", said)
    assert CANARY not in said


def test_a_file_that_was_named_and_is_not_there_is_a_mistake(
    clean_slate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the unnamed default may be absent."""
    assert "missing.toml" in complaint(config=clean_slate / "missing.toml")
    assert complaint(config=clean_slate).startswith("config: ")
    monkeypatch.setenv("CACHE_PROXY_CONFIG", "elsewhere.toml")
    assert complaint() == "config: there is no file elsewhere.toml."


# ---- what is written about them


def test_every_setting_stands_in_the_readmes_table() -> None:
    """And the table names no setting that there is not."""
    section = re.split(r"^## ", README.read_text("utf-8"), flags=re.MULTILINE)
    tables = [part for part in section if part.startswith("Settings")]
    assert tables, "README.md has no section `## Settings`"
    rows = re.findall(r"^\| `([a-z_]+)`", tables[0], re.MULTILINE)
    assert sorted(rows) == sorted(Settings.model_fields)


def test_every_setting_says_what_happens_when_it_is_changed() -> None:
    """A sentence below each field."""
    source = Path(Settings.__module__.replace(".", "/") + ".py")
    text = (README.parent / source).read_text("utf-8")
    for name in Settings.model_fields:
        assert re.search(rf'\n    {name}: (.|\n(?!    \w+:))*?\n    """[A-Z`]', text), name


FLAGS = {
    *("--upstream", "--host", "--port", "--admin-port", "--data-dir", "--redis-url"),
    *("--model", "--threshold", "--ttl", "--config", "--workers"),
}


def test_serve_has_the_documented_flags() -> None:
    """No more and no fewer; each but `--config` is a setting's name."""
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    flags = {name for option in command.params for name in option.opts if name != "--help"}
    assert flags == FLAGS
    names = {flag[2:].replace("-", "_") for flag in FLAGS - {"--config"}}
    assert names <= set(Settings.model_fields)


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["serve", *arguments])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "2"], "threshold: "),
        (["--ttl", "soon"], "ttl: "),
        (["--upstream", f"https://u:{CANARY}@h"], "upstream: "),
        (["--redis-url", CANARY], "redis_url: "),
        (["--workers", "0"], "workers: "),
        (["--port", "99999"], "port: "),
        (["--config", "missing.toml"], "config: "),
        (
            ["--model", "no/such/folder", "--data-dir", "d", "--port", "0", "--admin-port", "0"],
            "model",
        ),
    ],
)
def test_serve_stops_before_it_listens(arguments: list[str], said: str) -> None:
    """One line on stderr and exit 2, no traceback."""
    result = serve(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("cache-proxy: ")
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert CANARY not in result.output
