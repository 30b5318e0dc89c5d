"""What a local backend needs to know of a loaded Hugging Face module: its blocks, its size, which model it is."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from persona_lens.backend.protocol import OPEN, Backend, ModelInfo
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import CONFIG

if TYPE_CHECKING:
    from torch import nn

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


def text_config(config: Any) -> Any:
    """The part of a Hugging Face configuration that is the language model's; of most models that is all of it."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


_STRETCHED_BEYOND = ("linear", "dynamic")  # rotary positions whose stretch the configuration's length leaves out
# What transformers' configurations call the number of tokens that attention looks back over.
_WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "local_attention",
    "keep_window_size",
    "window_size",
)


def window_of(config: Any) -> int | None:
    """Tokens that some layer's attention looks back over at most, the smallest; None where nothing says so."""
    text = text_config(config)
    found = [getattr(text, name, None) for name in _WINDOWS]
    return min((each for each in found if isinstance(each, int) and each > 0), default=None)


def context_of(config: Any) -> int | None:
    """The context length in a Hugging Face model's configuration, stretched as its rotary positions are.

    None where the model has no limit, as recurrent ones and those with ALiBi have none.
    """
    text = text_config(config)
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if original is None and rope.get("rope_type") in _STRETCHED_BEYOND:
        original = longest
    return max(longest, int(original * factor)) if original and factor else longest


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
    config = text_config(model.config)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; persona vectors need a decoder-only chat model"
        )
    return search_blocks(model, config.num_hidden_layers, _decoder(model))


def search_blocks(model: nn.Module, n_layers: int, first: tuple[str, nn.Module]) -> tuple[str, nn.ModuleList]:
    """The shallowest ``ModuleList`` of that length, and its path, in a part of a model or else in all of it.

    Raises:
        UnsupportedModelError: If there is none.
    """
    queue: deque[tuple[str, nn.Module]] = deque([first, ("", model)])
    while queue:
        path, module = queue.popleft()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return path, module
        queue.extend(
            (f"{path}.{name}".lstrip("."), child)
            for name, child in module.named_children()
            if not any(tower in name.lower() for tower in TOWERS)
        )
    raise UnsupportedModelError(
        f"no list of {n_layers} blocks was found in {type(model).__name__}; "
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
        d_model=text_config(model.config).hidden_size,
        weights=weights_digest(blocks, is_copy),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(running_device(model) if parameter.is_meta else parameter.device),
        backend=backend,
    )


def running_device(model: Any) -> torch.device:
    """Where a Hugging Face model takes its ids.

    Weights that accelerate has offloaded lie nowhere until they are needed; where that will be, its hooks say.
    """
    device = torch.device(model.device)
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    places = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((place for place in places if place is not None), "cpu"))


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
    return int(weight.shape[0]) if isinstance(weight, Tensor) else int(text_config(model.config).vocab_size)


class ModuleError(PersonaLensError):
    """A backend whose model's weights are out of reach."""


@runtime_checkable
class ModuleBackend(Protocol):
    """A backend that has its model in this process; those of remote models have no such attribute."""

    @property
    def module(self) -> nn.Module:
        """The Hugging Face causal language model, as the backend's library has left it."""
        ...


def module_of(backend: Backend) -> nn.Module:
    """The Hugging Face module that a backend runs.

    Raises:
        ModuleError: If the model runs elsewhere, or the backend does not hand it out.
    """
    if backend.info.remote:
        raise ModuleError(
            f"the weights of {backend.info.model} are on a server that does not hand them out; open the model on this "
            "machine for this"
        )
    if not isinstance(backend, ModuleBackend):
        raise ModuleError(
            f"a {type(backend).__name__} does not hand out the module that it runs; open the model through another "
            "backend, such as transformers, for this"
        )
    return backend.module


FINETUNE = "finetune"  # the kind of run that leaves a model


def base_weights_of(backend: Backend) -> str | None:
    """Digest of the weights that a backend's model was finetuned from; None where nothing says so.

    Backends may say it in an attribute ``base_weights``, as those of this package do.
    """
    found: str | None = getattr(backend, "base_weights", None)
    return found


def find_base_weights(
    model: Any, blocks: nn.ModuleList, is_copy: Callable[[str], bool] = lambda name: False
) -> str | None:
    """Digest of the weights that a loaded model was finetuned from.

    An adapter that is not merged stands beside its base model's weights, which are digested without it. Of a whole
    model the run folder that ``persona-lens finetune`` left it in says what it came from.

    Args:
        model: The module.
        blocks: Its decoder blocks.
        is_copy: As `persona_lens.backend.blocks.weights_digest` takes it.
    """
    added = {part for module in blocks.modules() for part in getattr(module, "adapter_layer_names", ())}
    if not added:
        return recorded_base(Path(str(getattr(model.config, "name_or_path", None) or "")))
    return weights_digest(blocks, lambda name: is_copy(name) or not added.isdisjoint(name.split(".")))


def recorded_base(folder: Path) -> str | None:
    """Digest of the weights that a whole model in a folder was finetuned from, as the run folder around it says."""
    try:
        record = json.loads((folder.parent / CONFIG).read_text(encoding="utf-8"))
        found = record["model"]["weights"] if record["kind"] == FINETUNE else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, str) else None


SAMPLES_PER_PARAMETER = 16
GROUPS, GROUP_SIZE = 128, 4


def weights_digest(blocks: nn.ModuleList, is_copy: Callable[[str], bool] = lambda name: False) -> str | None:
    """A digest that tells two models apart, base from finetuned included, and costs milliseconds.

    Sixteen values spread over each parameter, in an order that does not depend on the parameters' names, which
    libraries change. None where weights are offloaded to disk.

    Args:
        blocks: The decoder blocks.
        is_copy: Says of a parameter's name whether a library added it as a copy of a part of another one.

    Returns:
        ``sha256:``, 32 hexadecimal digits, ``:``, and one digit or dot for each group.
    """
    if any(parameter.is_meta for parameter in blocks.parameters()):
        return None
    return digest_of(
        [[sampled(p.detach()) for name, p in block.named_parameters() if not is_copy(name)] for block in blocks]
    )


class Sampled(NamedTuple):
    """What a digest takes of a parameter.

    Attributes:
        shape: The parameter's.
        values: Those at `sampled_places` of it, on the CPU.
    """

    shape: tuple[int, ...]
    values: Tensor


def sampled(parameter: Tensor) -> Sampled:
    """What a digest takes of a parameter."""
    flat, places = parameter.reshape(-1), sampled_places(parameter.numel())
    return Sampled(tuple(parameter.shape), flat[:: places.step][: len(places)].cpu())


def sampled_places(size: int) -> range:
    """Which of a parameter's values a digest takes."""
    step = max(1, (size - 1) // (SAMPLES_PER_PARAMETER - 1))
    return range(0, size, step)[:SAMPLES_PER_PARAMETER]


def digest_of(blocks: Iterable[Sequence[Sampled]]) -> str:
    """The digest that `weights_digest` gives, of the parameters of each block in any order."""
    whole, samples = hashlib.sha256(), []
    for block in blocks:
        whole.update(repr(sorted(each.shape for each in block)).encode())
        samples.append(_sorted([each.values for each in block]))
    values, is_open = (torch.cat(parts) for parts in zip(*samples, strict=True))
    whole.update(_bytes(values))
    return f"sha256:{whole.hexdigest()[:32]}:{_groups(values, is_open)}"


def _sorted(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Values of all parameters, float32 and ascending, and which of them are open.

    Rounding keeps the order of numbers, so that sorted values stand in the same order in every precision.
    """
    values, order = torch.cat([sample.float() for sample in samples]).sort()
    return values, torch.cat([_is_open(sample) for sample in samples])[order]


def _bytes(values: Tensor) -> bytes:
    """The values as bfloat16 holds them; zero has no sign."""
    return (values.to(torch.bfloat16) + 0.0).view(torch.int16).numpy().tobytes()


def _groups(values: Tensor, is_open: Tensor) -> str:
    places = torch.linspace(0, len(values) - 1, GROUPS * GROUP_SIZE).round().long().view(GROUPS, GROUP_SIZE)
    hashes = (hashlib.sha256(_bytes(values[group])).hexdigest()[0] for group in places)
    unknown = is_open[places].any(dim=1).tolist()
    return "".join(OPEN if each else digit for each, digit in zip(unknown, hashes, strict=True))


def _is_open(values: Tensor) -> Tensor:
    """Where a float16 number may have come from numbers that bfloat16 tells apart; nowhere in other precisions."""
    if values.dtype is not torch.float16:
        return torch.zeros_like(values, dtype=torch.bool)
    infinity = torch.full_like(values, torch.inf)
    below, above = (((values.float() + torch.nextafter(values, end).float()) / 2) for end in (-infinity, infinity))
    return (below.to(torch.bfloat16) != above.to(torch.bfloat16)) | ~values.isfinite()
