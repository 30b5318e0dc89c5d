"""`Form`: one other program's format, and how the rows in its files become `PersonaVectors`, held against the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import ModelInfo
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import sha256_of
from persona_lens.vectors.provenance import ANSWER_MEAN, DEFAULT_REDUCTION, OWN_REDUCTION, THINKING_MEAN
from persona_lens.vectors.vectors import PersonaVectors, read_header

REDUCTIONS = (DEFAULT_REDUCTION, "prompt_mean", "prompt_last", ANSWER_MEAN, THINKING_MEAN)
NOT_KNOWN = ("how the vectors were made", "the judge and its scores", "the responses", "the version of the model")
HEADER = "persona_lens"
REDUCTION = "persona_lens.reduction"
Rows = Mapping[str, Mapping[int, Tensor]]


class FormatError(PersonaLensError):
    """A file that cannot be exchanged; the message says why, and what to do."""


@dataclass(frozen=True)
class Stated:
    """What a user says of a file that does not say it itself.

    Attributes:
        model: The model that the vectors belong to.
        trait: Their name.
        reduction: ``response_mean``, ``prompt_mean``, ``prompt_last``, ``answer_mean`` or ``thinking_mean``.
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
    reduction: str = OWN_REDUCTION

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
        read: From the file and its opened content to vectors; `assemble` makes them.
        write: From vectors to files.
        whole: Whether its files hold every layer, so that none can be chosen.
    """

    name: str
    summary: str
    suffix: str
    container: str
    recognises: Callable[[Any, Stated], bool]
    read: Callable[[Path, Any, Stated], Imported]
    write: Callable[[PersonaVectors, Chosen], Exported]
    whole: bool = False


def assemble(
    file: Path, form: str, rows: Rows, stated: Stated, *, notes: tuple[str, ...] = (), header: str | None = None
) -> Imported:
    """Make vectors of rows.

    Args:
        file: Where they come from.
        form: The format's name.
        rows: By reduction and layer: [d_model] each.
        stated: What the user says of them.
        notes: What to tell the user.
        header: What `PersonaVectors.header` wrote into the file, if it did.

    Raises:
        FormatError: If the model or the trait is not known, or the rows are not the model's.
        VectorsError: If the header is damaged.
    """
    model, own_trait, provenance = identity_of(file, stated, header)
    trait = stated.trait or own_trait
    if not trait:
        raise FormatError(f"{file} does not say which trait it is of; name it (--trait)")
    directions, missing = _directions(file, rows, model)
    if missing:
        notes += (f"there is no vector for {_listed(missing)}: steering there is refused",)
    origin: dict[str, Any] = {"format": form, "file": file.name}
    if file.exists():  # an object in memory has no file
        origin["file_sha256"] = _digest(file)
    if header is None:
        provenance |= {"kind": "imported", "not_known": list(NOT_KNOWN)}
        origin["model_named_by"] = "the user"
    provenance |= {"imported": {**origin, "notes": list(notes)}, "missing_layers": missing}
    if not missing:
        del provenance["missing_layers"]
    return Imported(PersonaVectors(trait, model, directions, provenance), notes)


def identity_of(file: Path, stated: Stated, header: str | None = None) -> tuple[ModelInfo, str | None, dict[str, Any]]:
    """Model, trait and provenance of a file: those in its header if there is one, and else what the user names.

    Raises:
        FormatError: If neither says which model it is of, or the two differ.
        VectorsError: If the header is damaged.
    """
    if header is None:
        if stated.model is None:
            raise FormatError(
                f"{file} does not say which model it belongs to; name it (--model), or other vectors of it (--like)"
            )
        return stated.model, None, {}
    trait, model, provenance = read_header(header, file)
    if stated.model is not None and (different := model.differences(stated.model)):
        raise FormatError(
            f"{file} says that its vectors belong to another model than the one named: {'; '.join(different)}"
        )
    return model, trait, provenance


def check_table(file: Path, what: str, shape: tuple[int, ...], model: ModelInfo) -> None:
    """Raise `FormatError` unless a table in a file has a row for every layer of the model."""
    if shape != (model.n_layers, model.d_model):
        raise FormatError(
            f"{what} in {file} is {list(shape)}, and {model.model} has {model.n_layers} layers of {model.d_model}: it "
            "belongs to another model"
        )


def _directions(file: Path, rows: Rows, model: ModelInfo) -> tuple[dict[str, Tensor], list[int]]:
    directions, missing = {}, set[int]()
    for reduction, layers in rows.items():
        found = torch.zeros(model.n_layers, model.d_model)
        for layer, row in layers.items():
            if not 0 <= layer < model.n_layers:
                raise FormatError(
                    f"{file} has a vector for layer {layer}, and {model.model} has layers 0 to {model.n_layers - 1}: "
                    "it belongs to another model"
                )
            if row.shape != (model.d_model,):
                raise FormatError(
                    f"the vector of layer {layer} in {file} has shape {list(row.shape)}, and the residual stream of "
                    f"{model.model} is {model.d_model} wide: it belongs to another model"
                )
            found[layer] = row
            if not bool(torch.isfinite(found[layer]).all()):
                raise FormatError(f"the vector of layer {layer} in {file} holds NaN or infinity; it cannot be used")
        directions[reduction] = found
        missing |= {layer for layer in range(model.n_layers) if not bool(found[layer].any())}
    if not directions or len(missing) == model.n_layers:
        raise FormatError(f"{file} holds no vector that is not zero; nothing is in it to be imported")
    return directions, sorted(missing)


def _digest(file: Path) -> str:
    """SHA-256 of the file, or of the digests of a folder's files by name."""
    if file.is_dir():
        parts = "".join(_digest(each) for each in sorted(file.glob("*.pt")))
        return hashlib.sha256(parts.encode()).hexdigest()
    return sha256_of(file)


def _listed(layers: list[int]) -> str:
    """``layer 3``, ``layers 0, 1``, or how many, where they are many."""
    if len(layers) > 6:
        return f"{len(layers)} layers, the first of them {layers[0]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def reduction_of(stated: Stated, default: str = DEFAULT_REDUCTION) -> str:
    """The reduction that the user names, or the default.

    Raises:
        FormatError: If there is no such reduction.
    """
    if stated.reduction is not None and stated.reduction not in REDUCTIONS:
        raise FormatError(f"a reduction is one of {', '.join(REDUCTIONS)}; got {stated.reduction!r}")
    return stated.reduction or default


def file_name(trait: str) -> str:
    """A trait's name as part of a file's name, whatever stands in it."""
    kept = "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in trait).strip("_")
    return kept[:80] or "vectors"
