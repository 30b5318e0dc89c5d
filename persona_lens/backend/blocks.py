"""What a local backend needs to know of a loaded Hugging Face module: its blocks, its size, a digest of its weights."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persona_lens.backend.protocol import ModelInfo
from persona_lens.errors import PersonaLensError

SAMPLES_PER_PARAMETER = 16


class UnsupportedModelError(PersonaLensError):
    """A model whose residual stream cannot be found."""


def text_config(model: Any) -> Any:
    """The configuration of the language model, also where it is part of a multimodal one."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and their dotted path: the shallowest ``ModuleList`` with one entry a layer.

    Raises:
        UnsupportedModelError: If there is none, or the model is not decoder-only.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; persona vectors need a decoder-only chat model"
        )
    queue: deque[tuple[str, nn.Module]] = deque([("", model)])
    while queue:
        path, module = queue.popleft()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return path, module
        queue.extend((f"{path}.{name}".lstrip("."), child) for name, child in module.named_children())
    raise UnsupportedModelError(
        f"no list of {config.num_hidden_layers} blocks was found in {type(model).__name__}; "
        "persona-lens reads models whose decoder blocks stand in one ModuleList"
    )


def weights_digest(blocks: nn.ModuleList, is_copy: Callable[[str], bool] = lambda name: False) -> str | None:
    """A digest that tells two models apart, base from finetuned included, and costs milliseconds.

    Sixteen values spread over each parameter, rounded to bfloat16 so that precision does not matter, and put in an
    order that does not depend on the parameters' names, which libraries change. None where weights are offloaded to
    disk.

    Args:
        blocks: The decoder blocks.
        is_copy: Says of a parameter's name whether a library added it as a copy of a part of another one.
    """
    if any(parameter.is_meta for parameter in blocks.parameters()):
        return None
    whole = hashlib.sha256()
    for block in blocks:
        parts = sorted(_parameter_digest(p) for name, p in block.named_parameters() if not is_copy(name))
        whole.update(b"".join(parts))
    return "sha256:" + whole.hexdigest()[:32]


def _parameter_digest(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    step = max(1, (flat.numel() - 1) // (SAMPLES_PER_PARAMETER - 1))
    sample = flat[::step][:SAMPLES_PER_PARAMETER].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(repr(tuple(parameter.shape)).encode() + sample).digest()


def describe(
    model: Any,
    blocks: nn.ModuleList,
    name: str,
    revision: str | None,
    backend: str,
    is_copy: Callable[[str], bool] = lambda name: False,
) -> ModelInfo:
    """What is known of a loaded Hugging Face model; ``is_copy`` as in `weights_digest`."""
    parameter = next(blocks[0].parameters())
    return ModelInfo(
        model=name,
        revision=revision or getattr(model.config, "_commit_hash", None),
        architecture=type(model).__name__,
        n_layers=len(blocks),
        d_model=text_config(model).hidden_size,
        weights=weights_digest(blocks, is_copy),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        backend=backend,
    )


def given_name(model: Any) -> str:
    """A name for a model that was handed over loaded: its hub id, the name of its folder, or its class."""
    name = model.config.name_or_path
    if name and Path(name).is_dir():
        return Path(name).name
    return name or type(model).__name__


def padding_id(tokenizer: Any, end_ids: Sequence[int]) -> int:
    """Any valid id will do: padding is masked by position, never recognised by its id."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end_ids[0] if end_ids else 0)
