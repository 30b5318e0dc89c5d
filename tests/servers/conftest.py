"""A real OpenAI-compatible server for the tests of this folder, with the embedded model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from persona_lens.models import DEFAULT_MODEL, EMBEDDED, ensure_embedded
from tests.servers.server import LlmServer, missing, serving


def _copy(gguf: Path, folder: Path) -> None:
    shutil.copy(gguf, folder)


def embedded_gguf() -> Path:
    """The embedded model as it comes, not dequantised; the cache keeps it beside the model that it is converted to."""
    model = EMBEDDED[DEFAULT_MODEL]
    return ensure_embedded(replace(model, name=f"{model.name}-gguf"), convert=_copy) / model.gguf


@pytest.fixture(scope="session")
def gguf() -> Path:
    """The embedded model as it comes."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return embedded_gguf()


@pytest.fixture(scope="session")
def llm_server(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmServer]:
    """A server on this machine that takes any key."""
    with serving(gguf, tmp_path_factory.mktemp("llm-server") / "server.log") as server:
        yield server
