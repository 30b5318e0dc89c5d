"""How the rows that a file holds become `PersonaVectors`, checked against the model that they are of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import ModelInfo
from persona_lens.core.files import sha256_of
from persona_lens.vectors.formats.form import ExchangeError, Imported, Stated
from persona_lens.vectors.provenance import DEFAULT_REDUCTION
from persona_lens.vectors.vectors import PersonaVectors, read_header

REDUCTIONS = ("response_mean", "prompt_mean", "prompt_last")
NOT_KNOWN = ("how the vectors were made", "the judge and its scores", "the responses", "the version of the model")
HEADER = "persona_lens"
REDUCTION = "persona_lens.reduction"
Rows = Mapping[str, Mapping[int, Tensor]]


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
        ExchangeError: If the model or the trait is not known, or the rows are not the model's.
        VectorsError: If the header is damaged.
    """
    model, trait, provenance = model_of(file, stated, header), stated.trait, dict[str, Any]()
    if header is not None:
        own_trait, _, provenance = read_header(header, file)
        trait = trait or own_trait
    if not trait:
        raise ExchangeError(f"{file} does not say which trait it is of; name it (--trait)")
    directions, missing = _directions(file, rows, model)
    if missing:
        notes += (f"there is no vector for {_listed(missing)}: steering there is refused",)
    origin: dict[str, Any] = {"format": form, "file": file.name}
    if file.exists():  # an object in memory has no file
        origin["file_sha256"] = _digest(file)
    if header is None:
        provenance |= {"kind": "imported", "not_known": list(NOT_KNOWN)}
        origin["model_named_by"] = "the user"
    provenance |= {"imported": {**origin, "notes": list(notes)}, "missing_layers": list(missing)}
    if not missing:
        del provenance["missing_layers"]
    return Imported(PersonaVectors(trait, model, directions, provenance), notes)


def model_of(file: Path, stated: Stated, header: str | None = None) -> ModelInfo:
    """The model that a file belongs to: the one in its header if there is one, and else the one that the user names.

    Raises:
        ExchangeError: If there is neither, or the two differ.
        VectorsError: If the header is damaged.
    """
    if header is None:
        if stated.model is None:
            raise ExchangeError(
                f"{file} does not say which model it belongs to; name it (--model), or other vectors of it (--like)"
            )
        return stated.model
    _, own, _ = read_header(header, file)
    if stated.model is not None and (different := own.differences(stated.model)):
        raise ExchangeError(
            f"{file} says that its vectors belong to another model than the one named: {'; '.join(different)}"
        )
    return own


def _directions(file: Path, rows: Rows, model: ModelInfo) -> tuple[dict[str, Tensor], list[int]]:
    directions, missing = {}, set[int]()
    for reduction, layers in rows.items():
        found = torch.zeros(model.n_layers, model.d_model)
        for layer, row in layers.items():
            if not 0 <= layer < model.n_layers:
                raise ExchangeError(
                    f"{file} has a vector for layer {layer}, and {model.model} has layers 0 to {model.n_layers - 1}: "
                    "it belongs to another model"
                )
            if row.shape != (model.d_model,):
                raise ExchangeError(
                    f"the vector of layer {layer} in {file} has shape {list(row.shape)}, and the residual stream of "
                    f"{model.model} is {model.d_model} wide: it belongs to another model"
                )
            found[layer] = row
            if not bool(torch.isfinite(found[layer]).all()):
                raise ExchangeError(f"the vector of layer {layer} in {file} holds NaN or infinity; it cannot be used")
        directions[reduction] = found
        missing |= {layer for layer in range(model.n_layers) if not bool(found[layer].any())}
    if not directions or len(missing) == model.n_layers:
        raise ExchangeError(f"{file} holds no vector that is not zero; nothing is in it to be imported")
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
        ExchangeError: If there is no such reduction.
    """
    if stated.reduction is not None and stated.reduction not in REDUCTIONS:
        raise ExchangeError(f"a reduction is one of {', '.join(REDUCTIONS)}; got {stated.reduction!r}")
    return stated.reduction or default


def file_name(trait: str) -> str:
    """A trait's name as part of a file's name, whatever stands in it."""
    kept = "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in trait).strip("_")
    return kept[:80] or "vectors"
