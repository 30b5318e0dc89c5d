"""Which model a folder's files hold, told without loading it, for engines that keep weights in a form of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from persona_lens.backend.blocks import (
    Sampled,
    UnsupportedModelError,
    digest_of,
    find_blocks,
    sampled,
    sampled_places,
)
from persona_lens.core.documents import DocumentError, read_json

WHOLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


class _NotKnownError(Exception):
    """The files do not say what the module's parameters would be."""


def checkpoint_digest(folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> str | None:
    """The digest of the model that transformers loads from a folder, as `weights_digest` gives it of the module.

    Of the safetensors files only the headers and sixteen values of each parameter are read. Which tensors become
    which parameters is transformers' own account of it: names that are changed, and experts that are stacked.

    Args:
        folder: A folder with ``config.json`` and the weights, in one file or several.
        dtype: What the model runs in; None takes all weights as they are stored.
        trust_remote_code: Run code that the model's repository brings.

    Returns:
        The digest; None where it is not known: of quantised weights, adapters, formats other than safetensors, files
        that are cut short or do not fit their configuration, and weights that are computed from others on loading.
    """
    try:
        stored = _stored(folder)
        model, origins = _outline(folder, dtype, trust_remote_code, stored)
        path, blocks = find_blocks(model)
        of_block = [{f"{path}.{i}.{name}": p for name, p in each.named_parameters()} for i, each in enumerate(blocks)]
        found = _Found(stored, origins, _other_names(model), dtype, _kept_in_float32(model, dtype))
        return digest_of([[found.sampled(*each) for each in parameters.items()] for parameters in of_block])
    except (_NotKnownError, UnsupportedModelError):
        return None


def _stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their names; their values stay on disk until they are looked at."""
    stored: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
            raise _NotKnownError(f"{file} cannot be read") from error
        if not stored.keys().isdisjoint(found):
            raise _NotKnownError("a tensor stands in two files")
        stored |= found
    return stored


def _files(folder: Path) -> Sequence[Path]:
    """The files that transformers takes the weights from."""
    if (folder / ADAPTER).exists():
        raise _NotKnownError("an adapter's weights are on top of those of another folder")
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(read_json(folder / INDEX)["weight_map"].values())
    except (DocumentError, TypeError, KeyError, AttributeError) as error:
        raise _NotKnownError("the index is damaged") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise _NotKnownError("the index names what is no file of this folder")
    return [folder / name for name in sorted(names)]


@dataclass
class _Origin:
    """Where a parameter comes from.

    Attributes:
        converter: transformers' account of how it is made; None where it is stored as it is.
        tensors: Names of the tensors that it is made of, in their order, by the pattern that they fit.
    """

    converter: Any
    tensors: dict[str, list[str]] = field(default_factory=dict)


def _outline(
    folder: Path, dtype: torch.dtype | None, trust_remote_code: bool, names: Iterable[str]
) -> tuple[nn.Module, dict[str, _Origin]]:
    """The model of a folder without weights, and what its parameters come from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
        if any(getattr(config, name, None) is not None for name in ("quantization_config", "transformers_weights")):
            raise _NotKnownError("quantised, or in files of other names")
        with torch.device("meta"):
            model = loader.from_config(config, **trust, **({} if dtype is None else {"dtype": dtype}))
        return model, _origins(model, names)
    except _NotKnownError:
        raise
    except Exception as error:  # configurations and models are third-party code
        raise _NotKnownError("no model can be made of the configuration") from error


def _origins(model: Any, names: Iterable[str]) -> dict[str, _Origin]:
    """What the parameters come from, by their names, as transformers' loading has it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, there = model.base_model_prefix, model.state_dict()
    origins: dict[str, _Origin] = {}
    for name in sorted(names, key=_counted):
        target, pattern = rename_source_key(name, renamings, converters, prefix, there)
        if target not in there and name in there:
            target, pattern = rename_source_key(name, [], [], prefix, there)
        converter = None if pattern is None else by_pattern[pattern]
        origin = origins.setdefault(target, _Origin(converter))
        if origin.converter is not converter:
            raise _NotKnownError(f"{target} is both stored and made")
        origin.tensors.setdefault(pattern or "", []).append(name)
    return origins


def _counted(name: str) -> list[tuple[int, str]]:
    """What a name is sorted by: expert 10 stands after expert 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _other_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by each of them: weights that are tied are stored once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group}


def _kept_in_float32(model: Any, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Names of the parameters that transformers keeps in float32 where a model runs in float16.

    Of bfloat16 it is no matter: digests are of what bfloat16 holds.
    """
    if dtype is not torch.float16:
        return None
    parts = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return re.compile("|".join(sorted(part.replace("*", ".*") for part in parts))) if parts else None


@dataclass(frozen=True)
class _Found:
    """The values of a model's parameters.

    Attributes:
        stored: The tensors of its files.
        origins: What parameters come from.
        other_names: Of each parameter.
        dtype: What the model runs in; None for what is stored.
        in_float32: Names of parameters that are kept in float32.
    """

    stored: Mapping[str, Tensor]
    origins: Mapping[str, _Origin]
    other_names: Mapping[str, Sequence[str]]
    dtype: torch.dtype | None
    in_float32: re.Pattern[str] | None

    def sampled(self, name: str, parameter: Tensor) -> Sampled:
        """What a digest takes of a parameter, from the files."""
        names = (name, *self.other_names[name])
        origin = next((self.origins[each] for each in names if each in self.origins), None)
        whole = self._whole(origin) if origin else None
        if whole is None or tuple(whole.shape) != tuple(parameter.shape):
            raise _NotKnownError(f"{name} is not in the files as the module has it")
        found = sampled(whole) if isinstance(whole, Tensor) else whole.sampled()
        if found.values.dtype not in PRECISIONS:
            raise _NotKnownError(f"{name} is stored as numbers of another kind")
        if self.dtype is None:
            return found
        kept = self.in_float32 is not None and self.in_float32.search(name)
        return found._replace(values=found.values.to(torch.float32 if kept else parameter.dtype))

    def _whole(self, origin: _Origin) -> Tensor | _Joined | None:
        """A parameter, from the tensors that it is made of; None where they are not just laid out in another way."""
        stored = {pattern: [self.stored[name] for name in names] for pattern, names in origin.tensors.items()}
        groups: dict[str, Sequence[Tensor | _Joined]] = dict(stored)
        for number, operation in enumerate(origin.converter.operations if origin.converter else ()):
            kind, dim = type(operation).__name__, getattr(operation, "dim", 0)
            if kind == "MergeModulelist" and number == 0:
                groups = {name: [_joined([each.unsqueeze(dim) for each in stored[name]], dim)] for name in stored}
            elif kind == "Concatenate":
                ordered = [each for name in origin.converter.source_patterns for each in groups.get(name, ())]
                groups = {"": [_joined(ordered, dim)]}
            else:
                return None
        found = [each for group in groups.values() for each in group]
        return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class _Joined:
    """Tensors behind one another along a dimension, without the tensor that they make.

    Attributes:
        parts: The tensors.
        dim: The dimension.
        shape: Of all together.
    """

    parts: Sequence[Tensor | _Joined]
    dim: int
    shape: tuple[int, ...]

    def at(self, place: list[int]) -> Tensor:
        """The value at a place."""
        place = list(place)
        for part in self.parts:
            if place[self.dim] < part.shape[self.dim]:
                return part[tuple(place)] if isinstance(part, Tensor) else part.at(place)
            place[self.dim] -= part.shape[self.dim]
        raise IndexError(place)

    def sampled(self) -> Sampled:
        """As `persona_lens.backend.blocks.sampled` of the tensor that they make."""
        size = int(torch.Size(self.shape).numel())
        places = [
            [int(each) for each in torch.unravel_index(torch.tensor(i), self.shape)] for i in sampled_places(size)
        ]
        values = torch.stack([self.at(place) for place in places]) if places else torch.empty(0)
        return Sampled(self.shape, values)


def _joined(parts: Sequence[Tensor | _Joined], dim: int) -> _Joined:
    """Tensors behind one another.

    Raises:
        _NotKnownError: If they do not fit.
    """
    shapes = [list(part.shape) for part in parts]
    dim %= len(shapes[0])
    along = sum(shape.pop(dim) for shape in shapes if len(shape) > dim)
    if any(shape != shapes[0] for shape in shapes):
        raise _NotKnownError("tensors that are put together do not fit")
    return _Joined(parts, dim, (*shapes[0][:dim], along, *shapes[0][dim:]))
