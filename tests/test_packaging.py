"""What a person gets who installs this: the wheel, its pins, and the README's commands."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = (ROOT / "README.md").read_text("utf-8")
PACKAGES = ("cache_proxy", "embeddings")
HEAVY = ("torch", "transformers", "sentence_transformers", "onnx", "matplotlib")


def shipped(folder: Path) -> set[str]:
    """Every file of the two packages, by its path in the project."""
    return {
        str(path.relative_to(folder))
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is built from, copied, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, *command, "-w", str(folder), str(sources)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel: Path, sources: Path) -> None:
    """Model, word lists, prices and type marks included; no tests, no benchmarks."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped(sources)
    assert {
        "cache_proxy/py.typed",
        "cache_proxy/prices.toml",
        "cache_proxy/words/en.antonyms.txt",
        "cache_proxy/words/vi.negators.txt",
        "embeddings/py.typed",
        "embeddings/minilm/model.onnx",
        "embeddings/minilm/tokenizer.json",
        "embeddings/minilm/encoder.json",
    } <= names


def test_the_models_licence_lies_beside_the_model(wheel: Path) -> None:
    """The weights are Apache-2.0, our code is MIT; both texts travel with them."""
    archive = zipfile.ZipFile(wheel)
    licence = archive.read("embeddings/minilm/LICENSE").decode()
    notice = archive.read("embeddings/minilm/NOTICE").decode()
    assert "Apache License" in licence
    assert "Version 2.0" in licence
    assert "sentence-transformers/all-MiniLM-L6-v2" in notice
    assert "Changes made here" in notice
    (own,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert archive.read(own).decode().startswith("MIT License")


@pytest.mark.live
def test_the_wheel_serves_its_model_from_wherever_it_was_unpacked(
    wheel: Path, tmp_path: Path
) -> None:
    """Installed, not editable: the commands import, the model loads, torch and the like do not,
    and nothing is written to the home folder (ONNX Runtime's telemetry would)."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "home").mkdir()
    program = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import cache_proxy.cli, cache_proxy.serve, cache_proxy.demo, embeddings\n"
        f"assert Path(embeddings.__file__).is_relative_to({str(tmp_path)!r})\n"
        f"found = embeddings.load('all-MiniLM-L6-v2', Path({str(tmp_path / 'data')!r}))\n"
        "embeddings.self_test(found)\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"HOME": str(tmp_path / "home"), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []
    assert done.stderr == ""
    assert list((tmp_path / "home").rglob("*")) == []


def test_a_plain_install_asks_for_nothing_heavy() -> None:
    """About a minute, no torch, no model hub: what is heavy is in the extras."""
    plain = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    heavy = {canonicalize_name(name) for name in HEAVY}
    assert not plain & heavy
    extra = PROJECT["optional-dependencies"]["sentence-transformers"]
    assert canonicalize_name(Requirement(extra[0]).name) == "sentence-transformers"


def test_every_requirement_is_pinned_to_a_version_that_fits_it() -> None:
    """The constraints cover what is asked for and all that it asks for in turn."""
    pins = constraints()
    extras = itertools.chain.from_iterable(PROJECT["optional-dependencies"].values())
    asked = [*PROJECT["dependencies"], *extras]
    for line in asked:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(PROJECT["name"]):
            assert requirement.specifier.contains(pins[name], prereleases=True), line
    assert not installed_needs(asked) - pins.keys()


def test_the_constraints_name_versions_and_no_places() -> None:
    """No address, no path, no local build; torch is the version whose CPU wheel is enough."""
    pins = constraints()
    assert pins["torch"] == "2.13.0"
    assert len(pins) > 100


def test_the_readme_names_commands_that_exist() -> None:
    """Two commands to start, and every `cache-proxy <command>` in it is one of the program's."""
    from cache_proxy.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    named = set(re.findall(r"^(?:\.venv/bin/)?cache-proxy (\w+)", README, re.MULTILINE))
    assert named
    assert named <= commands
    assert ".venv/bin/pip install -c constraints.txt . && .venv/bin/cache-proxy demo" in README
    assert set(PROJECT["scripts"]) == {"cache-proxy", "cache-stats"}


def test_ci_runs_the_tests_by_the_readmes_own_command() -> None:
    """What a newcomer types is what guards the main branch."""
    command = ".venv/bin/pip install -c constraints.txt -e '.[test]' && .venv/bin/pytest"
    assert command in README
    last = (ROOT / ".ci/run").read_text("utf-8").rstrip().splitlines()[-1]
    assert last.replace(" >/dev/null", "") == command


def test_the_files_that_the_readme_speaks_of_are_there() -> None:
    """A map with roads that end nowhere helps nobody."""
    named = re.findall(r"`((?:cache_proxy|embeddings|tests|benchmarks|\.ci)/[\w./]+)`", README)
    missing = [name for name in named if not (ROOT / name.rstrip("/")).exists()]
    assert len(named) > 10
    assert missing == []


def constraints() -> dict[str, str]:
    """name -> version; fails on anything but `name==version`."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            pinned = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
            assert pinned, line
            pins[canonicalize_name(pinned[1])] = pinned[2]
    return pins


def installed_needs(asked: list[str]) -> set[str]:
    """Names of everything that these requirements bring along in this environment."""
    found: set[str] = set()
    waiting = [Requirement(line) for line in asked]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name == canonicalize_name(PROJECT["name"]):
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            need = Requirement(line)
            extras = requirement.extras or {""}
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(need)
    return found
