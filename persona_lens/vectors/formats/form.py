"""`Form`: one other program's format; what it takes in and gives out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from persona_lens.backend import ModelInfo
from persona_lens.core.errors import PersonaLensError
from persona_lens.vectors.provenance import DEFAULT_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors


class ExchangeError(PersonaLensError):
    """A file that cannot be exchanged; the message says why, and what to do."""


@dataclass(frozen=True)
class Stated:
    """What a user says of a file that does not say it itself.

    Attributes:
        model: The model that the vectors belong to.
        trait: Their name.
        reduction: ``response_mean``, ``prompt_mean`` or ``prompt_last``.
        keep_last_row: Of the reference implementation's files, take the last row too.
    """

    model: ModelInfo | None = None
    trait: str | None = None
    reduction: str | None = None
    keep_last_row: bool = False


@dataclass(frozen=True)
class Chosen:
    """What of some vectors is written.

    Attributes:
        layers: Block indices, 0-based; None for all that there are.
        reduction: Which of the vectors, for a format that holds one.
    """

    layers: tuple[int, ...] | None = None
    reduction: str = DEFAULT_REDUCTION

    def of(self, vectors: PersonaVectors) -> dict[int, Tensor]:
        """The chosen rows by layer, float32 [d_model] each.

        Raises:
            VectorsError: If there is no such layer or reduction.
        """
        everything = [layer for layer in range(vectors.model.n_layers) if layer not in vectors.missing_layers]
        layers = everything if self.layers is None else self.layers
        return {layer: vectors.vector(layer, self.reduction) for layer in layers}


@dataclass(frozen=True)
class Imported:
    """Vectors from another program's file.

    Attributes:
        vectors: The vectors; their provenance says what is not known of them.
        notes: What the user should be told, one sentence each.
    """

    vectors: PersonaVectors
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """What is to be written.

    Attributes:
        files: Content by name.
        notes: What the user should be told, one sentence each.
    """

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """A format.

    Attributes:
        name: What users call it.
        summary: Which program reads it, in a few words.
        suffix: Of its files; empty where it is a folder of several.
        container: What kind of file it is: ``archive`` (torch.save), ``gguf``, ``npy``, ``npz``, ``folder``, or
            ``file`` for any file that is none of these, or that the format knows better.
        recognises: Whether an opened container holds this format, given what the user says of it; of a ``file`` it
            gets the path.
        read: From the file and its opened content to vectors; `persona_lens.vectors.formats.rows.assemble` makes them.
        write: From vectors to files.
    """

    name: str
    summary: str
    suffix: str
    container: str
    recognises: Callable[[Any, Stated], bool]
    read: Callable[[Path, Any, Stated], Imported]
    write: Callable[[PersonaVectors, Chosen], Exported]
