"""PEFT adapters: finetuned differences to a base model, opened on it without merging."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.documents import DocumentError, read_json
from persona_lens.errors import first_line
from persona_lens.models.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ADAPTER_CONFIG", "adapter_base", "adapter_on", "put_on", "require_peft", "taken_off"]

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INSTALL = "pip install 'persona-lens[finetune]'"


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter belongs to.

    Raises:
        ModelError: The folder's configuration is damaged or names no base model, or its weights are not safetensors.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = read_json(file)
    except DocumentError as error:
        raise ModelError(str(error)) from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    revision = config.get("revision") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base.strip() or not isinstance(revision, str | None):
        raise ModelError(f"{file} names no base model; write its hub id or folder under base_model_name_or_path")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}; adapters in pickled files, which can run code, are not opened")
    return base, revision


def require_peft() -> None:
    """Raise `ModelError` unless PEFT is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"adapters need peft: {INSTALL}")


def put_on(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with an adapter on it, not merged.

    The model itself is returned, with the adapter's layers in the places of those they adapt, so that it is used, read
    and edited as any other.

    Args:
        model: The base model; it is changed.
        folder: The adapter.

    Raises:
        ModelError: PEFT is missing, or the adapter does not fit, or does more than to change layers.
    """
    inner: PreTrainedModel = _adapted(model, folder).get_base_model().eval()
    return inner


@contextmanager
def adapter_on(model: PreTrainedModel, folder: Path) -> Iterator[PreTrainedModel]:
    """A model with an adapter on it while the context is open; afterwards it is as it was.

    Raises:
        ModelError: See `put_on`.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = _adapted(model, folder)
    try:
        yield adapted.get_base_model().eval()
    finally:
        taken_off(adapted)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def taken_off(adapted: Any) -> None:
    """Give the base model of a PEFT model its own layers back."""
    inner = adapted.get_base_model()
    adapted.unload()
    if hasattr(inner, "peft_config"):
        del inner.peft_config


def _adapted(model: PreTrainedModel, folder: Path) -> Any:
    require_peft()
    from peft import PeftConfig, PeftModel

    loader: Any = PeftModel
    try:
        if PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
            raise ModelError(
                f"the adapter in {folder} adds tokens to the prompt; only those that change layers are opened"
            )
        return loader.from_pretrained(model, str(folder))
    except ModelError:
        raise
    except Exception as error:  # shapes, names and versions that do not fit fail in many ways
        first = first_line(error)
        raise ModelError(f"the adapter in {folder} does not fit its base model: {first}") from error
