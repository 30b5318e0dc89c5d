"""vLLM on this machine's processors, where it is installed."""

from __future__ import annotations

import os

import pytest

from persona_lens.backend.registry import installed_version

# What is not said here is as the adapter has it for everybody.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    if installed_version("vllm-cpu") is None and installed_version("vllm") is None:
        pytest.skip("vLLM is not installed here; `make test-vllm` installs it, in an environment of its own")
