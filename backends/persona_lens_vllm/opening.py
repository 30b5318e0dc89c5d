"""Starting a vLLM engine that can be read and edited, and saying what is missing where one cannot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from persona_lens.backend import BackendError
from persona_lens.models import resolve_dtype

EXTENSION = "persona_lens_vllm.worker.ResidualStream"
SAMPLER = "persona_lens_vllm.sampler:SeededRows"
# What vLLM takes from the environment; what a user has set there stays. The engine runs in this process unless told
# otherwise: in one of its own it would gain nothing for batches, and be left behind by a program that dies.
_HERE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
_ON_CPUS = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # GiB; not tied to single cores


def start_engine(location: str, revision: str | None, dtype: str, trust_remote_code: bool, **options: Any) -> Any:
    """An ``LLM`` of vLLM with what reads and edits in its workers.

    Raises:
        BackendError: If it does not start.
    """
    for name, value in {**_HERE, **({} if torch.cuda.is_available() else _ON_CPUS)}.items():
        os.environ.setdefault(name, value)
    from transformers import AutoConfig
    from vllm import LLM
    from vllm.platforms import current_platform

    config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    resolved = resolve_dtype(dtype, current_platform.device_type, stored)
    if current_platform.device_type == "cpu":  # beginnings are shared block by block, and there 128 tokens are a block
        options.setdefault("block_size", 32)
    try:
        return LLM(
            model=location,
            revision=revision,
            dtype=str(resolved).removeprefix("torch."),
            trust_remote_code=trust_remote_code,
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            enforce_eager=True,
            worker_extension_cls=EXTENSION,
            logits_processors=[SAMPLER],
            **options,
        )
    except Exception as error:  # vLLM raises errors of many libraries
        raise BackendError(f"vLLM does not start: {type(error).__name__}: {str(error).strip()[:600]}") from error


def require_ours(config: Any) -> None:
    """Raise `BackendError` unless an engine was made so that its workers can read and edit."""
    missing = []
    if config.parallel_config.worker_extension_cls != EXTENSION:
        missing.append(f"worker_extension_cls={EXTENSION!r}")
    if SAMPLER not in (config.model_config.logits_processors or ()):
        missing.append(f"logits_processors=[{SAMPLER!r}]")
    if not config.model_config.enforce_eager:
        missing.append("enforce_eager=True")
    if missing:
        raise BackendError(
            f"this LLM cannot be read or edited: make it with {', '.join(missing)}, or let persona-lens open the model"
        )
    if config.speculative_config is not None:
        raise BackendError("speculative decoding runs tokens that are thrown away again; make the LLM without it")


def architecture_of(config: Any) -> str:
    """The class that transformers loads for a Hugging Face configuration; vLLM's own may be called otherwise."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return str(known or next(iter(config.architectures or ()), type(config).__name__))


def folder_of(config: Any) -> Path | None:
    """Where the files of vLLM's model configuration lie on this machine; None where that is not known."""
    from huggingface_hub import try_to_load_from_cache

    if Path(config.model).is_dir():
        return Path(config.model)
    found = try_to_load_from_cache(config.model, "config.json", revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None
