"""What is different when the model runs on an NDIF server: no weights are here, and code and data have to get there.

nnsight sends the body of a trace as source, with the names that it reads. Functions and classes of installed packages
go by reference, which fails on a server that does not have the package, unless their module is registered: then their
source goes too. `TRAVELLING` are the engine's modules that traces use; at run time they need nothing but torch.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

from transformers import GenerationConfig

from persona_lens.backend import ModelInfo, Operation, intervention, residual, sampling, writing
from persona_lens.models import ModelSource
from persona_lens_nnsight.library import nnsight

TRAVELLING: tuple[ModuleType, ...] = (intervention, residual, sampling, writing)
# What switches a setting off that must have a value; the others are switched off by None.
OFF = {
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
# Names and not settings, or settings that do nothing beside a limit on new tokens.
LEFT_ALONE = {"bos_token_id", "decoder_start_token_id", "max_length", "transformers_version"}


def register_travelling() -> None:
    """Let what traces use go to servers that do not have this package; doing it again changes nothing."""
    for module in (*TRAVELLING, *dict.fromkeys(sys.modules[each.moves.__module__] for each in Operation)):
        nnsight.register(module)


def weightless(source: ModelSource, tokenizer: Any, task: str, trust_remote_code: bool = False) -> Any:
    """The nnsight model without weights, its configuration and generation defaults read from ``source``."""
    place: dict[str, Any] = {} if source.revision is None else {"revision": source.revision}
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model = nnsight.TransformersModel(source.location, tokenizer=tokenizer, task=task, **place, **options)
    # Without such a file the defaults follow from the configuration, and they are there already.
    with contextlib.suppress(OSError):
        model._module.generation_config = GenerationConfig.from_pretrained(source.location, **place)
    return model


def model_key(model: Any, source: ModelSource, task: str, revision: str | None) -> str:
    """The name under which the server knows the model.

    Args:
        model: The weightless model.
        source: Where it comes from. A folder's name is its path, which must be the same on the server.
        task: What the model is deployed for.
        revision: What the user asked for: a model deployed without a revision has another key than one with it.
    """
    kind = type(model)
    name = source.location if source.is_local else json.loads(model.to_model_key().partition(":")[2])["repo_id"]
    identity = {"repo_id": name, "revision": revision}
    if model.kwargs.get("trust_remote_code"):
        identity["trust_remote_code"] = True
    return f"{kind.__module__}.{kind.__qualname__}:{json.dumps({**identity, 'task': task})}"


def remote_info(info: ModelInfo) -> ModelInfo:
    """The description of a model whose weights cannot be seen: neither their digest, nor what they are held in."""
    return replace(info, weights=None, dtype="remote", device="remote", remote=True)


def plain_config(config: GenerationConfig, defaults: GenerationConfig | None) -> dict[str, Any]:
    """Arguments for ``generate`` that say what ``config`` says and switch off what the model's files set beyond it.

    Locally the model's own defaults are put aside while a generation runs. A server's model belongs to all of its
    users, so there every one of them is overruled.
    """
    settings = {name: value for name, value in config.to_dict().items() if value is not None}
    set_there = {} if defaults is None else defaults.to_dict()
    beyond = {name for name, value in set_there.items() if value is not None} - settings.keys() - LEFT_ALONE
    settings = {name: value for name, value in settings.items() if name not in LEFT_ALONE}
    return settings | {name: OFF.get(name) for name in beyond}
