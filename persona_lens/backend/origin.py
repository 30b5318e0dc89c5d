"""Where a finetuned model came from: the digest of its base model's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from persona_lens.backend.digests import weights_digest
from persona_lens.backend.protocol import Backend
from persona_lens.runs import CONFIG

FINETUNE = "finetune"  # the kind of run that leaves a model


@runtime_checkable
class FinetunedBackend(Protocol):
    """A backend that knows which model its own was finetuned from. Backends need not."""

    @property
    def base_weights(self) -> str | None:
        """Digest of the base model's weights, as in `persona_lens.backend.ModelInfo`; None if there is no base."""
        ...


def base_weights_of(backend: Backend) -> str | None:
    """Digest of the weights that a backend's model was finetuned from; None where nothing says so."""
    return backend.base_weights if isinstance(backend, FinetunedBackend) else None


def find_base_weights(
    model: Any, blocks: nn.ModuleList, is_copy: Callable[[str], bool] = lambda name: False
) -> str | None:
    """Digest of the weights that a loaded model was finetuned from.

    An adapter that is not merged stands beside its base model's weights, which are digested without it. Of a whole
    model the run folder that ``persona-lens finetune`` left it in says what it came from.

    Args:
        model: The module.
        blocks: Its decoder blocks.
        is_copy: As `persona_lens.backend.digests.weights_digest` takes it.
    """
    added = {part for module in blocks.modules() for part in getattr(module, "adapter_layer_names", ())}
    if not added:
        return _recorded(Path(str(getattr(model.config, "name_or_path", None) or "")))
    return weights_digest(blocks, lambda name: is_copy(name) or not added.isdisjoint(name.split(".")))


def _recorded(folder: Path) -> str | None:
    """What the run folder around a model says of its base."""
    try:
        record = json.loads((folder.parent / CONFIG).read_text(encoding="utf-8"))
        found = record["model"]["weights"] if record["kind"] == FINETUNE else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, str) else None
