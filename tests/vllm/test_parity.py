"""The parity suite against transformers, in float32, under every way in which an engine makes up its passes.

With its defaults it runs over tiny models of many architectures in `tests.backends.test_parity`. Others that are in
`tests.tiny` are left out: vLLM 0.32 gave MPT up; its Qwen 3.5 asks for torchvision; gpt-oss and Llama 4 start only
in a process that had no dense model before, and Qwen2-MoE stands for them. A pipeline of two stages is left
out as well: on processors it ends at its first steps.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from persona_lens.backend import Backend, open_backend, wrap_model
from persona_lens.backend.parity import check_parity
from tests.backends.fixtures import engine_of, kept, tiny_backend, tokenizer
from tests.tiny import tiny_model

# Fewer rows at once than there are, prompts in pieces, and rows that are thrown out and begun again.
HARD = {"max_num_seqs": 3, "max_num_batched_tokens": 48}
WAYS: dict[str, dict[str, Any]] = {
    "all at once": {**HARD, "num_gpu_blocks_override": 17},  # as many as the longest text takes, and one
    "two kinds of layers": {**HARD, "num_gpu_blocks_override": 60},  # each kind has blocks of its own
    "without shared beginnings": {"enable_prefix_caching": False},
    "without parts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
}
PAIRS = [
    *(("llama", way) for way in WAYS if way != "two kinds of layers"),
    *((architecture, "all at once") for architecture in ("mistral/window", "gpt2")),
    *((architecture, "two kinds of layers") for architecture in ("gemma2", "gemma3_text/window")),
]


def disagreements(backend: Backend, reference: Backend, new: int = 4) -> list[str]:
    checks = check_parity(backend, reference, max_new_tokens=new)
    assert len(checks) > 40, [check.detail for check in checks]
    return [f"{c.name}: {c.measured:.2g} > {c.tolerance:.2g}: {c.detail}" for c in checks if not c.passed]


@pytest.mark.real
def test_the_embedded_model_all_at_once() -> None:
    reference = open_backend("transformers", "smollm2-135m", dtype="float32", device="cpu")
    small = {**HARD, "num_gpu_blocks_override": 34, "max_model_len": 1024}
    assert not disagreements(kept(open_backend("vllm", "smollm2-135m", dtype="float32", **small)), reference)


@pytest.mark.parametrize(("architecture", "way"), PAIRS)
def test_a_tiny_model(architecture: str, way: str) -> None:
    llm = engine_of(tiny_model(architecture), tokenizer(), **WAYS[way])
    backend = wrap_model(llm, tokenizer(), backend="vllm")
    assert not disagreements(backend, tiny_backend("transformers", architecture))


# Each in a program of its own. GPT-NeoX is there because vLLM, which has none of its own, runs transformers' class and
# changes it in the process that it runs in.
APART: dict[str, tuple[str, dict[str, Any]]] = {
    "an engine in a process of its own": ("gpt_neox", HARD),
    "halves": ("llama/halves", {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}),
}


@pytest.mark.parametrize(("architecture", "options"), APART.values(), ids=APART.keys())
def test_workers_in_processes_of_their_own(architecture: str, options: dict[str, Any]) -> None:
    command = [sys.executable, str(Path(__file__).resolve()), architecture, repr(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-1:] == ["no disagreements"], done.stdout[-2000:] + done.stderr[-4000:]


def main(architecture: str, options: dict[str, Any]) -> None:
    backend = wrap_model(engine_of(tiny_model(architecture), tokenizer(), **options), tokenizer(), backend="vllm")
    print(*disagreements(backend, tiny_backend("transformers", architecture)) or ["no disagreements"], sep="\n")


if __name__ == "__main__":
    import ast
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    main(sys.argv[1], ast.literal_eval(sys.argv[2]))
