"""What vLLM's configuration says of a model."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from persona_lens.backend import ModelInfo
from persona_lens.backend.checkpoint import checkpoint_digest
from persona_lens_vllm.library import DISTRIBUTION
from persona_lens_vllm.opening import architecture_of, folder_of


def facts_of(config: Any, name: str, revision: str | None = None) -> ModelInfo:
    """The model of a ``VllmConfig``, with the digest of its files where they are on this machine.

    Args:
        config: The configuration.
        name: What to call the model.
        revision: Commit or content id of its files.
    """
    model = config.model_config
    folder, trusted = folder_of(model), bool(model.trust_remote_code)
    weights = None if folder is None else checkpoint_digest(folder, model.dtype, trust_remote_code=trusted)
    return ModelInfo(
        model=name,
        revision=revision,
        architecture=architecture_of(model.hf_config),
        n_layers=int(model.get_total_num_hidden_layers()),
        d_model=int(model.get_hidden_size()),
        weights=weights,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(config.device_config.device_type),
        backend=f"{DISTRIBUTION} {version(DISTRIBUTION)}",
    )
