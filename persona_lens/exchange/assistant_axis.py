"""Files of assistant-axis (safety-research/assistant-axis).

What its ``load_axis`` takes: a file of `torch.save` with a bare tensor [n_layers, d_model], or a dictionary with such a
tensor under ``axis`` and, if its ``save_axis`` wrote it, texts under ``metadata``. Row l belongs to the output of block
l, 0-based, so that nothing has to be shifted. Its pipeline adds ``default_mean`` and ``role_mean``, which are not
needed. Its files for single roles, with the tensor under ``vector``, hold mean activations and no difference: they are
no direction, and are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from persona_lens.exchange.archive import archive_bytes, checked_tensor
from persona_lens.exchange.errors import ExchangeError
from persona_lens.exchange.form import (
    HEADER,
    REDUCTION,
    REDUCTIONS,
    Chosen,
    Exported,
    Form,
    Imported,
    Stated,
    assemble,
    file_name,
    reduction_of,
)
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors


def _is_axis(content: Any, stated: Stated) -> bool:
    return isinstance(content, Tensor) or (isinstance(content, dict) and not {"axis", "vector"}.isdisjoint(content))


def _read(file: Path, content: Any, stated: Stated) -> Imported:
    metadata: Any = {}
    if isinstance(content, dict):
        if "axis" not in content:
            raise ExchangeError(
                f"{file} holds the mean activations of one role ({str(content.get('role', 'not named'))[:80]!r}), "
                "which are no direction; subtract those of the default role, and import the difference under 'axis'"
            )
        content, metadata = content["axis"], content.get("metadata") or {}
    axis = checked_tensor(content, f"the axis in {file}", 2)
    own = metadata if isinstance(metadata, dict) else {}
    header, reduction = own.get(HEADER), own.get(REDUCTION)
    _check_shape(file, axis, stated)
    rows = dict(enumerate(axis))
    return assemble(
        file,
        FORM.name,
        {reduction_of(stated, reduction if reduction in REDUCTIONS else DEFAULT_REDUCTION): rows},
        stated,
        header=header if isinstance(header, str) else None,
    )


def _check_shape(file: Path, axis: Tensor, stated: Stated) -> None:
    model = stated.model
    if model is not None and axis.shape != (model.n_layers, model.d_model):
        raise ExchangeError(
            f"the axis in {file} is {list(axis.shape)}, and {model.model} has {model.n_layers} layers of "
            f"{model.d_model}: it belongs to another model"
        )


def _write(vectors: PersonaVectors, chosen: Chosen) -> Exported:
    if chosen.layers is not None:
        raise ExchangeError("an axis has a row for every layer; leave --layers out")
    metadata = {HEADER: vectors.header(), REDUCTION: chosen.reduction}
    content = {"axis": vectors.rows(chosen.reduction).contiguous(), "metadata": metadata}
    return Exported({f"{file_name(vectors.trait)}.pt": archive_bytes(content)})


FORM = Form("assistant-axis", "safety-research/assistant-axis", ".pt", "archive", _is_axis, _read, _write)
