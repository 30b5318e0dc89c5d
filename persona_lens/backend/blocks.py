"""What a local backend needs to know of a loaded Hugging Face module: its blocks, its size, which model it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from persona_lens.backend.digests import weights_digest
from persona_lens.backend.protocol import ModelInfo
from persona_lens.errors import PersonaLensError

# Parts of a multimodal model that have blocks of their own, and no residual stream of text.
TOWERS = ("vision", "visual", "image", "audio", "video", "speech", "projector")


class UnsupportedModelError(PersonaLensError):
    """A model whose residual stream cannot be found, or that does not run through it."""


def require_reached(missed: Sequence[int]) -> None:
    """Raise `UnsupportedModelError` if blocks that were to be read or edited never ran in a pass."""
    if missed:
        raise UnsupportedModelError(
            f"the model ran without its block{'s' * (len(missed) > 1)} {', '.join(map(str, missed))}, so that nothing "
            "was read or edited there; give the model that really runs, not a copy, and neither compiled nor replayed "
            "from a graph, or choose other layers"
        )


def text_config(model: Any) -> Any:
    """The configuration of the language model, also where it is part of a multimodal one."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def bare_model(model: Any) -> Any:
    """The Hugging Face model inside what wraps it for training: PEFT, DDP, FSDP, ``torch.compile``."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and their dotted path: the shallowest ``ModuleList`` with one entry a layer.

    They are looked for in the language model first, and never where images or sounds are encoded, which may take as
    many blocks.

    Raises:
        UnsupportedModelError: If there is none, or the model is not decoder-only.
    """
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; persona vectors need a decoder-only chat model"
        )
    queue: deque[tuple[str, nn.Module]] = deque([_decoder(model), ("", model)])
    while queue:
        path, module = queue.popleft()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return path, module
        queue.extend(
            (f"{path}.{name}".lstrip("."), child)
            for name, child in module.named_children()
            if not any(tower in name.lower() for tower in TOWERS)
        )
    raise UnsupportedModelError(
        f"no list of {config.num_hidden_layers} blocks was found in {type(model).__name__}; "
        "persona-lens reads models whose decoder blocks stand in one ModuleList"
    )


def _decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """The language model within a model and its dotted path; the model itself where it says nothing of one."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else model
    return next(((path, module) for path, module in model.named_modules() if module is decoder), ("", model))


def describe(
    model: Any,
    blocks: nn.ModuleList,
    name: str,
    revision: str | None,
    backend: str,
    is_copy: Callable[[str], bool] = lambda name: False,
) -> ModelInfo:
    """What is known of a loaded Hugging Face model; ``is_copy`` as in `weights_digest`.

    Raises:
        UnsupportedModelError: If the model does not predict tokens.
    """
    if not model.can_generate() and model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no head that predicts tokens; load it with transformers' AutoModelForCausalLM"
        )
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


def padding_id(tokenizer: Any, end_ids: Sequence[int], vocabulary: int | None = None) -> int:
    """Any id that the model knows will do: padding is masked by position, never recognised by its id.

    Args:
        tokenizer: The model's own, or one that has been given a token for padding that the model does not know.
        end_ids: Ids that end a turn.
        vocabulary: How many ids the model knows, from 0; None where any will do.
    """
    known = (i for i in (tokenizer.pad_token_id, *end_ids) if i is not None and (vocabulary is None or i < vocabulary))
    return next(known, 0)


def vocabulary_size(model: Any) -> int:
    """How many token ids a Hugging Face model has an embedding for."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else int(text_config(model).vocab_size)
