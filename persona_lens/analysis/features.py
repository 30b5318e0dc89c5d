"""`Decoder`: the directions of a dictionary's features, some rows at a time: all of them may not fit in memory."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona_lens.core.errors import PersonaLensError
from persona_lens.vectors import PersonaVectors

# Where in a model an autoencoder may sit, and which layer that is here: the stream after block l.
_AFTER_BLOCK = re.compile(r"(?:blocks\.(\d+)\.hook_(?:resid_post|out)|(?:.*\.)?(?:layers|h)\.(\d+)(?:\.output)?)")
_BEFORE_BLOCK = re.compile(r"blocks\.(\d+)\.hook_(?:resid_pre|in)")
_DASHBOARD = re.compile(r"[\w.-]+/[\w.-]+")
SAMPLED_ROWS = 16

Encode = Callable[[Tensor], Tensor]
"""Residuals [n, d_model] to activations [n, features], not negative where the feature is active."""


class FeaturesError(PersonaLensError):
    """A dictionary that cannot be loaded, or does not fit the vectors."""


@dataclass(frozen=True, eq=False)
class Features:
    """A dictionary of features.

    Attributes:
        name: Where it comes from: release and id, or a folder.
        hook: Where in the model it sits, as its makers wrote it.
        layer: The same as a layer here: it reads the residual stream after this block, 0-based.
        decoder: The direction of every feature.
        model: Name of the model it was trained on; None where that is not said.
        encode: Activations of all features; None where only the directions are there.
        dashboard: Model and set on Neuronpedia, such as ``gemma-2-2b/20-gemmascope-res-16k``; None without one.
    """

    name: str
    hook: str
    layer: int
    decoder: Decoder
    model: str | None = None
    encode: Encode | None = None
    dashboard: str | None = None

    @property
    def count(self) -> int:
        """Number of features."""
        return self.decoder.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.decoder.shape[1]

    def unit(self, feature: int) -> Float[Tensor, " d_model"]:
        """The direction of a feature, of length one.

        Raises:
            FeaturesError: If there is no such feature, or its direction is zero.
        """
        if not 0 <= feature < self.count:
            raise FeaturesError(f"feature {feature} does not exist: {self.name} has features 0 to {self.count - 1}")
        row = self.decoder.rows(feature, feature + 1)[0]
        if not float(row.norm()) > 0:
            raise FeaturesError(f"the direction of feature {feature} of {self.name} is zero")
        unit: Tensor = row / row.norm()
        return unit

    def rows(self, features: Int[Tensor, " n"], chunk: int) -> Float[Tensor, "n d_model"]:
        """The directions of some features, read ``chunk`` rows at a time: not normalised, in the order given."""
        found = torch.empty(len(features), self.d_model)
        for start in range(0, self.count, chunk):
            stop = min(start + chunk, self.count)
            inside = (features >= start) & (features < stop)
            if bool(inside.any()):
                found[inside] = self.decoder.rows(start, stop)[features[inside] - start]
        return found

    def link(self, feature: int) -> str | None:
        """The feature's public dashboard; None without one."""
        if self.dashboard is None or not _DASHBOARD.fullmatch(self.dashboard):
            return None
        return f"https://www.neuronpedia.org/{self.dashboard}/{feature}"

    def check(self, vectors: PersonaVectors, *, allow_other_model: bool = False) -> None:
        """Raise unless the dictionary belongs to the stream that the vectors of its layer belong to.

        Args:
            vectors: What is to be taken apart.
            allow_other_model: Accept a dictionary of a model with another name, such as the base model's.

        Raises:
            FeaturesError: If width, layer or model do not fit.
        """
        model = vectors.model
        if self.d_model != model.d_model:
            raise FeaturesError(
                f"{self.name} has directions of width {self.d_model}, but the residual stream of {model.model} has "
                f"{model.d_model}: they are of different models"
            )
        if self.layer >= model.n_layers:
            raise FeaturesError(
                f"{self.name} sits at {self.hook}, which is layer {self.layer}; {model.model} has layers 0 to "
                f"{model.n_layers - 1}"
            )
        if self.model is not None and not allow_other_model and _plain(self.model) != _plain(model.model):
            raise FeaturesError(
                f"{self.name} was trained on {self.model}, the vectors are of {model.model}; if that is the same "
                "model, or one close to it, allow it with allow_other_model (--allow-other-model)"
            )

    def describe(self) -> dict[str, Any]:
        """The dictionary as JSON values, for the record of a run; a sample of its directions tells it from others."""
        places = torch.linspace(0, self.count - 1, min(SAMPLED_ROWS, self.count)).long().tolist()
        sample = torch.cat([self.decoder.rows(place, place + 1) for place in places])
        return {
            "name": self.name,
            "hook": self.hook,
            "layer": self.layer,
            "model": self.model,
            "features": self.count,
            "d_model": self.d_model,
            "dashboard": self.dashboard,
            "directions": "sha256:" + hashlib.sha256(sample.contiguous().numpy().tobytes()).hexdigest(),
        }


def layer_of_hook(hook: str) -> int:
    """The layer here of a place in the residual stream, by the name that TransformerLens or Hugging Face has for it.

    ``blocks.19.hook_resid_post``, ``blocks.20.hook_resid_pre`` and ``model.layers.19`` all are layer 19.

    Raises:
        FeaturesError: If it is not the residual stream after a block.
    """
    if found := _AFTER_BLOCK.fullmatch(hook):
        return int(found[1] or found[2])
    if (found := _BEFORE_BLOCK.fullmatch(hook)) and int(found[1]) > 0:
        return int(found[1]) - 1
    raise FeaturesError(
        f"the autoencoder sits at {hook!r}, which is not the residual stream after a block (such as "
        "blocks.19.hook_resid_post); persona vectors have no directions there to compare with"
    )


def _plain(model: str) -> str:
    """A model's name without what libraries differ in: owner, capitals, punctuation."""
    return re.sub(r"[^a-z0-9.]", "", model.rstrip("/").rpartition("/")[2].lower())


class DecoderError(PersonaLensError):
    """Decoder directions that cannot be read."""


@runtime_checkable
class Decoder(Protocol):
    """Directions by the number of their feature."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of features, and width of the residual stream."""
        ...

    def rows(self, start: int, stop: int) -> Float[Tensor, "n d_model"]:
        """The directions of the features from ``start`` to ``stop - 1``, not normalised: float32."""
        ...


@dataclass(frozen=True, eq=False)
class TensorDecoder:
    """Directions that are in memory.

    Attributes:
        weights: [features, d_model].
    """

    weights: Float[Tensor, "features d_model"]

    @property
    def shape(self) -> tuple[int, int]:
        """See `Decoder.shape`."""
        return int(self.weights.shape[0]), int(self.weights.shape[1])

    def rows(self, start: int, stop: int) -> Float[Tensor, "n d_model"]:
        """See `Decoder.rows`."""
        return self.weights[start:stop].detach().to("cpu", torch.float32)


@dataclass(frozen=True, eq=False)
class FileDecoder:
    """Directions in a safetensors file, of which only the rows asked for are ever read.

    Attributes:
        file: The file.
        name: The tensor's name, [features, d_model].

    Raises:
        DecoderError: If the file cannot be read, or holds no such matrix.
    """

    file: Path
    name: str = "W_dec"
    shape: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        try:
            opened: Any = safe_open(self.file, framework="pt")
            names = list(opened.keys())
            if self.name not in names:
                there = ", ".join(sorted(names)) or "nothing"
                raise DecoderError(f"{self.file} holds no decoder {self.name!r}; it holds {there}")
            shape = tuple(opened.get_slice(self.name).get_shape())
        except (SafetensorError, OSError) as error:
            raise DecoderError(f"{self.file} is not a safetensors file, or is damaged: {error}") from error
        if len(shape) != 2 or not all(shape):
            raise DecoderError(f"{self.name!r} in {self.file} must be [features, d_model], got {list(shape)}")
        object.__setattr__(self, "shape", shape)

    def rows(self, start: int, stop: int) -> Float[Tensor, "n d_model"]:
        """See `Decoder.rows`."""
        # Opened anew each time: a file that stays open keeps every page that was read from it in memory.
        opened: Any = safe_open(self.file, framework="pt")
        found: Tensor = opened.get_slice(self.name)[start:stop]
        return found.float()
