"""The embedded model, here and as llama.cpp takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_lens.models import resolve
from tests.programs.comparing import unquantised
from tests.programs.environment import missing
from tests.servers.conftest import embedded_gguf


@pytest.fixture(scope="session", autouse=True)
def programs() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def quantised(programs: None) -> Path:
    """As it comes: Q4_1."""
    return embedded_gguf()


@pytest.fixture(scope="session")
def whole(quantised: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in float32."""
    return unquantised(quantised, tmp_path_factory.mktemp("gguf") / "f32.gguf")


@pytest.fixture(scope="session")
def loaded(programs: None) -> tuple[Any, Any]:
    folder = resolve("smollm2-135m").location
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
