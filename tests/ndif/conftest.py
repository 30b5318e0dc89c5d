"""A real NDIF server for the tests of this folder, and the models that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.ndif.server import missing, serving
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the server runs: sums are taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def _configured(host: str) -> Iterator[str]:
    from persona_lens_nnsight.library import nnsight

    before, nnsight.CONFIG.API.HOST = nnsight.CONFIG.API.HOST, host
    try:
        yield host
    finally:
        nnsight.CONFIG.API.HOST = before


def _running(folder: Path, **settings: str) -> Iterator[str]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with serving(folder, settings) as host, _configured(host):
        yield host


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that runs traces in the model's own process, for which nnsight is configured."""
    yield from _running(tmp_path_factory.mktemp("ndif"))


@pytest.fixture(scope="module")
def sandbox_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that runs them in a process apart, as it does for users whom it does not know."""
    settings = {"PERSONA_LENS_TEST_SANDBOX": "yes", "NDIF_SANDBOX_POOL_SIZE": "1"}
    yield from _running(tmp_path_factory.mktemp("ndif-sandbox"), **settings)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each architecture, by its name."""
    folder = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        tiny_model(architecture).save_pretrained(folder / architecture)
        tiny_tokenizer().save_pretrained(folder / architecture)
    return folder
