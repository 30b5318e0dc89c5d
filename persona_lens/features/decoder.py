"""`Decoder`: the directions of a dictionary's features, some rows at a time: all of them may not fit in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona_lens.errors import PersonaLensError


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
