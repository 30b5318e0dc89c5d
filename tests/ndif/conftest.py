"""A real NDIF server for the tests of this folder, and the models that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.ndif.server import missing, serving
from tests.tiny import ARCHITECTURES, saved_model, thinking_tokenizer, tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the server runs: sums are taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def configured(host: str, key: str = "") -> Iterator[str]:
    """nnsight configured for this server; it reads the environment only when it is imported."""
    from persona_lens_nnsight.library import nnsight

    settings = nnsight.CONFIG.API
    before = settings.HOST, settings.APIKEY
    settings.HOST, settings.APIKEY = host, key or None
    try:
        yield host
    finally:
        settings.HOST, settings.APIKEY = before


def _running(folder: Path, **settings: str) -> Iterator[str]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with serving(folder, settings) as host:
        yield host


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _running(tmp_path_factory.mktemp("ndif"))


@pytest.fixture
def server(_server: str) -> Iterator[str]:
    """The address of a server that runs traces in the model's own process, for which nnsight is configured."""
    with configured(_server):
        yield _server


@pytest.fixture(scope="module")
def _sandbox_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {"PERSONA_LENS_TEST_SANDBOX": "yes", "NDIF_SANDBOX_POOL_SIZE": "1"}
    yield from _running(tmp_path_factory.mktemp("ndif-sandbox"), **settings)


@pytest.fixture
def sandbox_server(_sandbox_server: str) -> Iterator[str]:
    """One that runs them in a process apart, as it does for users whom it does not know."""
    with configured(_sandbox_server):
        yield _sandbox_server


KEY = "0b1d2c3e-4f50-4617-8293-a4b5c6d7e8f9"


@pytest.fixture(scope="module")
def _strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = {"PERSONA_LENS_TEST_KEY": KEY, "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": "3"}
    yield from _running(tmp_path_factory.mktemp("ndif-strict"), **settings)


@pytest.fixture
def strict_server(_strict_server: str) -> Iterator[str]:
    """One that takes requests with `KEY` only, and gives each three seconds."""
    with configured(_strict_server, KEY):
        yield _strict_server


@pytest.fixture(scope="module")
def _later_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _running(tmp_path_factory.mktemp("ndif-later"), NDIF_MIN_NNSIGHT_VERSION="99.0")


@pytest.fixture
def later_server(_later_server: str) -> Iterator[str]:
    """One that wants an nnsight that is not there yet."""
    with configured(_later_server):
        yield _later_server


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each architecture, by its name."""
    folder = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        saved_model(folder / architecture, architecture)
    tiny_model(thinks=True).save_pretrained(folder / "thinks")
    thinking_tokenizer().save_pretrained(folder / "thinks")
    return folder
