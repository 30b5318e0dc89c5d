"""Files of the reference implementation (safety-research/persona_vectors).

What it writes and reads: a folder with one file of `torch.save` for each reduction, ``TRAIT_response_avg_diff.pt``,
``TRAIT_prompt_avg_diff.pt`` and ``TRAIT_prompt_last_diff.pt``, each a bare tensor [n_layers + 1, d_model]. Rows are
counted as transformers counts ``hidden_states``: row 0 is the embedding, row l the residual stream after block l - 1.
It steers with row l at the output of block l - 1.

Its last row was read from ``hidden_states[-1]``, which transformers takes after the final norm: that is no residual
stream. It is left out on import, unless ``keep_last_row`` says that it is one. Nothing in the file says which model or
trait it belongs to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_lens.exchange.archive import archive_bytes, checked_tensor, load_archive
from persona_lens.exchange.errors import ExchangeError
from persona_lens.exchange.form import Chosen, Exported, Form, Imported, Stated, assemble, file_name, reduction_of
from persona_lens.vectors import PersonaVectors

ENDINGS = {
    "response_mean": "_response_avg_diff.pt",
    "prompt_mean": "_prompt_avg_diff.pt",
    "prompt_last": "_prompt_last_diff.pt",
}
LAST_ROW = (
    "the last row was left out: the reference implementation reads it after the final norm, where it is no residual "
    "stream (--keep-last-row takes it)"
)
EMBEDDING = "row 0, the embedding's, was left out: there is no block in front of it to steer"


def _is_tensor(content: Any, stated: Stated) -> bool:
    """A bare tensor; with as many rows as the model has layers it is assistant-axis's."""
    if not isinstance(content, Tensor):
        return False
    return content.ndim != 2 or stated.model is None or len(content) != stated.model.n_layers


def _read_file(file: Path, content: Any, stated: Stated) -> Imported:
    reduction = reduction_of(stated, _reduction_named(file) or "response_mean")
    trait = stated.trait or _trait_named(file)
    return _imported(file, {reduction: (file, content)}, Stated(stated.model, trait, None, stated.keep_last_row))


def _read_folder(folder: Path, content: Any, stated: Stated) -> Imported:
    """Read all the reductions of one trait."""
    traits = sorted({name for file in folder.glob("*_diff.pt") if (name := _trait_named(file))})
    trait = stated.trait or (traits[0] if len(traits) == 1 else None)
    if trait is None:
        raise ExchangeError(f"{folder} holds vectors of {', '.join(traits)}; name one of them (--trait)")
    files = {name: folder / f"{trait}{ending}" for name, ending in ENDINGS.items()}
    there = {name: (file, load_archive(file)) for name, file in files.items() if file.is_file()}
    if stated.reduction is not None:
        there = {name: found for name, found in there.items() if name == reduction_of(stated)}
    if not there:
        raise ExchangeError(f"{folder} holds no file for {trait!r}; there are {', '.join(traits)}")
    return _imported(folder, there, Stated(stated.model, trait, None, stated.keep_last_row))


def _imported(where: Path, files: dict[str, tuple[Path, Any]], stated: Stated) -> Imported:
    last = 0 if stated.keep_last_row else 1
    rows = {}
    for reduction, (file, content) in files.items():
        tensor = checked_tensor(content, f"what {file} holds", 2)
        if stated.model is not None and tensor.shape != (stated.model.n_layers + 1, stated.model.d_model):
            raise ExchangeError(
                f"{file} holds {list(tensor.shape)}; for {stated.model.model}, with {stated.model.n_layers} layers of "
                f"{stated.model.d_model}, it would be {[stated.model.n_layers + 1, stated.model.d_model]} (the "
                f"reference implementation) or {[stated.model.n_layers, stated.model.d_model]} (assistant-axis)"
            )
        rows[reduction] = {row - 1: tensor[row] for row in range(1, len(tensor) - last)}
    notes = (EMBEDDING, LAST_ROW) if last else (EMBEDDING,)
    return assemble(where, FILE.name, rows, stated, notes=notes)


def _reduction_named(file: Path) -> str | None:
    return next((name for name, ending in ENDINGS.items() if file.name.endswith(ending)), None)


def _trait_named(file: Path) -> str | None:
    reduction = _reduction_named(file)
    return file.name.removesuffix(ENDINGS[reduction]) or None if reduction else None


def _write(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    if chosen.layers is not None:
        raise ExchangeError("the reference implementation's files hold every layer; leave --layers out")
    if vectors.missing_layers:
        raise ExchangeError(
            f"the reference implementation's files hold every layer, and these vectors have none for layer "
            f"{vectors.missing_layers[0]}"
        )
    files = {}
    for reduction, ending in ENDINGS.items():
        if reduction in vectors.directions:
            table = torch.cat([torch.zeros(1, vectors.model.d_model), vectors.rows(reduction)])
            files[f"{file_name(vectors.trait)}{ending}"] = archive_bytes(table)
    return Exported(
        files,
        (
            "row 0, the embedding's, is zero: vectors here begin after block 0",
            "the last row is the residual stream before the final norm, which is where the reference implementation "
            "steers; its own files have it after the norm",
        ),
    )


FILE = Form("reference", "safety-research/persona_vectors, a folder", "", "archive", _is_tensor, _read_file, _write)
FOLDER = Form(FILE.name, FILE.summary, "", "folder", lambda content, stated: True, _read_folder, _write)
