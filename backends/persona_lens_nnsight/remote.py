"""What is different when the model runs on an NDIF server: no weights are here, and code and data have to get there.

nnsight sends the body of a trace as source, with the names that it reads. Functions and classes of installed packages
go by reference, which fails on a server that does not have the package, unless their module is registered: then their
source goes too. `TRAVELLING` are the engine's modules that traces use; at run time they need nothing but torch.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from transformers import GenerationConfig

from persona_lens.backend import BackendError, ModelInfo, intervention, logprobs, residual, sampling
from persona_lens.models import ModelSource
from persona_lens_nnsight.library import nnsight

TRAVELLING: tuple[ModuleType, ...] = (intervention, logprobs, residual, sampling)
TASK = "text-generation"
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
    for module in TRAVELLING:
        nnsight.register(module)


def weightless(source: ModelSource, tokenizer: Any, trust_remote_code: bool = False) -> Any:
    """The nnsight model without weights, its configuration and generation defaults read from ``source``."""
    place: dict[str, Any] = {} if source.revision is None else {"revision": source.revision}
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model = nnsight.TransformersModel(source.location, tokenizer=tokenizer, task=TASK, **place, **options)
    # Without such a file the defaults follow from the configuration, and they are there already.
    with contextlib.suppress(OSError):
        model._module.generation_config = GenerationConfig.from_pretrained(source.location, **place)
    return model


def model_key(model: Any, source: ModelSource, revision: str | None) -> str:
    """The name under which the server knows the model.

    Args:
        model: The weightless model.
        source: Where it comes from. A folder's name is its path, which must be the same on the server.
        revision: What the user asked for: a model deployed without a revision has another key than one with it.
    """
    kind = type(model)
    name = source.location if source.is_local else json.loads(model.to_model_key().partition(":")[2])["repo_id"]
    identity = {"repo_id": name, "revision": revision}
    if model.kwargs.get("trust_remote_code"):
        identity["trust_remote_code"] = True
    return f"{kind.__module__}.{kind.__qualname__}:{json.dumps({**identity, 'task': TASK})}"


def transport(key: str, model: Any) -> Any:
    """What sends one trace to the server and waits for its result, without showing anything.

    Host and key are nnsight's: ``NDIF_HOST`` and ``NDIF_API_KEY``, or its configuration file.
    """
    from nnsight.intervention.backends.remote import RemoteBackend

    backend = RemoteBackend(key, env={"attn_implementation": model.attn_implementation})
    backend.display.enabled = False
    return backend


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


def embedding_envoy(model: Any) -> Any:
    """The input embedding, whose input is the token ids of a pass.

    Raises:
        BackendError: If the model has none.
    """
    envoy = _envoy_of(model, model._module.get_input_embeddings())
    if envoy is None:
        raise BackendError(f"the input embedding of {type(model._module).__name__} was not found")
    return envoy


def logits_envoy(model: Any) -> Any | None:
    """The output embedding, if what it gives out is the logits as they are; None if the model changes them further.

    A server that runs traces apart from the model copies every value that a trace reads to the trace and back. The
    model's own output brings its cache of keys and values with it, the output embedding's does not. Which models
    change its output is found by running what follows their blocks without weights.
    """
    module = model._module
    head, decoder = module.get_output_embeddings(), module.base_model
    if head is None or decoder is module:
        return None
    hidden = torch.zeros(1, 1, head.weight.shape[1], dtype=head.weight.dtype, device="meta")
    given: list[Any] = []
    handle = head.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    decoder.forward = lambda *_, **__: _Decoded(hidden)
    try:
        logits = module(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=False).logits
    except Exception:  # noqa: BLE001 - what a model does here is up to it, and the way that always works is left
        return None
    finally:
        del decoder.forward
        handle.remove()
    return _envoy_of(model, head) if [id(value) for value in given] == [id(logits)] else None


class _Decoded:
    """The output of a decoder that kept nothing but the last hidden states, in any of the classes for that."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _envoy_of(model: Any, module: Any) -> Any | None:
    path = next((name for name, each in model._module.named_modules() if each is module), None)
    return None if path is None else model.get(path)
