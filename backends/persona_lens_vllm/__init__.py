"""The ``vllm`` backend: a fast engine, read and edited in its workers."""

from __future__ import annotations

from typing import Any

from persona_lens.backend import Backend, BackendSpec
from persona_lens.core.plugins import install_command
from persona_lens_vllm.library import DISTRIBUTION

OPTIONS = (
    "revision",
    "dtype",
    "trust_remote_code",
    "chat_template",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "distributed_executor_backend",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "kv_cache_dtype",
    "cpu_offload_gb",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "num_gpu_blocks_override",
    "block_size",
    "quantization",
    "load_format",
    "hf_overrides",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "async_scheduling",
    "enable_expert_parallel",
)


def _open(model: str, **options: Any) -> Backend:
    from persona_lens_vllm.adapter import VllmBackend

    return VllmBackend.open(model, **{name: value for name, value in options.items() if value is not None})


def _accepts(model: object) -> bool:
    return any(base.__name__ == "LLM" and base.__module__.startswith("vllm.") for base in type(model).__mro__)


def _wrap(model: Any, tokenizer: Any) -> Backend:
    from persona_lens_vllm.adapter import VllmBackend

    return VllmBackend.wrap(model, tokenizer)


SPEC = BackendSpec(
    name="vllm",
    summary="vLLM, read and edited in its workers: fast generation",
    requires=(DISTRIBUTION,),
    install=install_command("vllm"),
    open=_open,
    accepts=_accepts,
    wrap=_wrap,
    options=OPTIONS,
)
