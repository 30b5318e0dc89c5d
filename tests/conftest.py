"""Checks array shapes at run time: every annotated function of the package runs under beartype in the tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

# Their source is sent to servers, which have neither jaxtyping nor beartype: they must stay as they are written.
TRAVELLING = {"intervention", "parts.budget", "parts.masks", "sampling", "writing"}
BACKEND = Path(__file__).resolve().parents[1] / "persona_lens" / "backend"
# One by one and not by package: the hook takes a package's name for all that is in it.
MODULES = [
    ".".join(path.relative_to(BACKEND).with_suffix("").parts)
    for path in BACKEND.rglob("*.py")
    if path.name != "__init__.py"
]
BACKENDS = Path(__file__).resolve().parent / "backends"
ONLY = os.environ.get("PERSONA_LENS_TEST_ADAPTER")  # see `tests.backends.fixtures`

hook = install_import_hook(
    [
        *(f"persona_lens.backend.{module}" for module in MODULES if module not in TRAVELLING),
        "persona_lens.vectors",
        "persona_lens.analysis",
        "persona_lens.extraction",
        "persona_lens.steering",
        "persona_lens.judging",
    ],
    "beartype.beartype",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests that are marked exhaustive as well")
    parser.addoption(
        "--device", default="cpu", help="where tiny models run, such as cuda, or standin, see tests.standin"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Have tiny models where they are wanted."""
    from tests import standin, tiny

    tiny.device = config.getoption("--device")
    if tiny.device == standin.NAME:
        standin.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker waits for one; leave out what is exhaustive."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if ONLY is not None:
        _leave_to(ONLY, config, items)
    if config.getoption("--all"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def _leave_to(adapter: str, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave of the tests of backends those of this adapter, but for what is done to a module in this process."""

    def concerns(item: Any) -> bool:
        if BACKENDS not in item.path.parents:
            return True
        params = item.callspec.params if hasattr(item, "callspec") else {}
        named = [value[0] if isinstance(value, tuple) and value else value for value in params.values()]
        mine = any(isinstance(name, str) and name == adapter for name in named)
        return mine and item.get_closest_marker("module") is None

    config.hook.pytest_deselected(items=[item for item in items if not concerns(item)])
    items[:] = [item for item in items if concerns(item)]


def pytest_collection_finish() -> None:
    """Keep what is imported, torch and all, out of every later search for garbage, which takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Adds entry points of a package with a single module, as if it were installed."""

    def add(group: str, code: str, **names: str) -> None:
        (tmp_path / "their_package.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "their_package", raising=False)
        points = [metadata.EntryPoint(name, f"their_package:{attribute}", group) for name, attribute in names.items()]
        there = metadata.entry_points
        monkeypatch.setattr(
            metadata, "entry_points", lambda group: [*there(group=group), *(p for p in points if p.group == group)]
        )

    return add
