"""`RowOrder`: what is to be done with one request to a server, as a text that any client can send.

The text is JSON: numbers, names, and tensors as base64 of little-endian float32. It is read into the same edits and
reads as everywhere, which check themselves, so that nothing in it can be run, and nothing is looked up but operations
by their names. Needs no vLLM.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from persona_lens.backend import (
    BackendError,
    Condition,
    Edit,
    Operation,
    Positions,
    Read,
    ReadKind,
    Schedule,
    Span,
    TokenBatch,
)
from persona_lens.backend.edits import check_edits
from persona_lens.backend.parts.table import Markup
from persona_lens.backend.reads import check_reads, need_last_token, need_prompts
from persona_lens.backend.sinks import depend_on_sinks
from persona_lens.core.errors import PersonaLensError

VERSION = 1
TOLD = ("architecture", "n_layers", "d_model", "weights", "dtype", "backend")  # of a server's `ModelInfo`
MOST_TEXT = 32 * 2**20  # characters of an order
MOST_EDITS = 256
MOST_NUMBERS = 2**24  # that an order brings back


class OrderError(BackendError):
    """An order that is none, or that does not fit the model; the request is refused."""


_Mark = Annotated[str, Field(min_length=1, max_length=64)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Tensor(_Data):
    shape: list[int] = Field(max_length=4)
    data: str


class _Noise(_Data):
    seed: int = Field(ge=0, lt=2**63)
    temperature: float = Field(gt=0)
    top_p: float = Field(1.0, gt=0, le=1)


class _Condition(_Data):
    layer: int
    direction: str
    threshold: float
    above: bool = True


class _Edit(_Data):
    layer: int
    direction: str
    operation: str = Field("add", max_length=100)
    coefficient: float = 1.0
    level: float | None = None
    relative: bool = False
    positions: Positions = Positions.ALL
    mask: str | None = None
    span: tuple[int, int | None] | None = None
    schedule: list[tuple[int, float]] | None = Field(None, max_length=10_000)
    condition: _Condition | None = None
    sinks: bool = False


class _Read(_Data):
    kind: str = Field(max_length=100)
    layers: list[int] | None = None
    directions: _Tensor | None = None
    sinks: bool = False


class _Order(_Data):
    version: Literal[1] = 1
    edits: Annotated[list[_Edit], Field(max_length=MOST_EDITS)] = []
    reads: Annotated[list[_Read], Field(max_length=len(ReadKind))] = []
    noise: _Noise | None = None
    prompt: int | None = Field(None, ge=1)
    logprobs: bool = False
    sink_limits: list[float] | None = None
    marks: Annotated[list[tuple[_Mark, _Mark]], Field(max_length=16)] | None = None
    separators: Annotated[list[_Mark], Field(max_length=64)] = []
    newlines: Annotated[list[Annotated[str, Field(pattern=r"^\n*$", max_length=8)]], Field(max_length=16)] = []
    thinking_budget: int | None = Field(None, ge=0, lt=2**31)


@dataclass(frozen=True)
class RowOrder:
    """What is to be done with one request.

    Attributes:
        edits: What to write; a coefficient or a mask for each row has one row.
        reads: What to bring back; activations are not.
        noise: ``seed``, ``temperature`` and ``top_p`` of a sample as the backends draw it; None leaves sampling to the
            request's own parameters.
        prompt: How many of the tokens that are sent are the prompt, where a response is sent too; None for all.
        logprobs: Bring back the log-probabilities of the response that is sent.
        sink_limits: See `persona_lens.backend.sinks`; needed where edits or reads leave out attention sinks.
        parts: The marks, separators and newlines that tell thinking from answer, see `persona_lens.backend.Parts`, by
            the client's chat template; None for what the server's own says.
        thinking_budget: How many thinking tokens the response may have, see `persona_lens.backend.Sampling`.
    """

    edits: tuple[Edit, ...] = ()
    reads: tuple[Read, ...] = ()
    noise: dict[str, Any] | None = None
    prompt: int | None = None
    logprobs: bool = False
    sink_limits: tuple[float, ...] | None = None
    parts: Markup | None = None
    thinking_budget: int | None = None

    @property
    def whole(self) -> bool:
        """Whether every token has to be computed anew: a cached beginning cannot be read."""
        return self.logprobs or self.prompt is not None or need_prompts(self.reads)

    @property
    def needs_last_token(self) -> bool:
        """See `persona_lens.backend.reads.need_last_token`."""
        return need_last_token(self.reads)

    def text(self) -> str:
        """The order as it is sent."""
        limits = self.sink_limits if depend_on_sinks(self.edits, self.reads) else None
        order = {
            "version": VERSION,
            "edits": [_edit_data(edit) for edit in self.edits],
            "reads": [_read_data(read) for read in self.reads],
            "noise": self.noise,
            "prompt": self.prompt,
            "logprobs": self.logprobs,
            "sink_limits": None if limits is None else list(limits),
            "thinking_budget": self.thinking_budget,
        }
        said = {name: value for name, value in order.items() if value is not None and value is not False}
        kept: dict[str, Any] = {name: value for name, value in said.items() if value != []}
        if self.parts is not None:  # no marks at all say that the model never thinks
            kept["marks"], kept["separators"], newlines = self.parts
            kept |= {"newlines": newlines} if any(newlines) else {}
        return json.dumps(kept)

    @staticmethod
    def read(text: object, n_layers: int, d_model: int) -> RowOrder:
        """The order that a client sent.

        Raises:
            OrderError: If it is none, or does not fit a model of that size.
        """
        if not isinstance(text, str) or len(text) > MOST_TEXT:
            raise OrderError(f"an order is a JSON text of at most {MOST_TEXT:,} characters")
        try:
            found = _Order.model_validate_json(text)
            order = RowOrder(
                tuple(_edit(each, d_model) for each in found.edits),
                tuple(_read(each, d_model) for each in found.reads),
                None if found.noise is None else found.noise.model_dump(),
                found.prompt,
                found.logprobs,
                None if found.sink_limits is None else tuple(found.sink_limits),
                None if found.marks is None else (tuple(found.marks), tuple(found.separators), tuple(found.newlines)),
                found.thinking_budget,
            )
            check_edits(order.edits, n_layers, d_model, 1, _width(order.edits))
            check_reads(order.reads, n_layers, d_model)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise OrderError(f"no order: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (PersonaLensError, ValueError) as error:
            raise OrderError(f"no order: {error}") from None
        _check(order, n_layers, d_model)
        return order

    def check_tokens(self, tokens: int, n_layers: int, d_model: int) -> TokenBatch:
        """The parts of a text of so many tokens, without their ids.

        Raises:
            OrderError: If the order is for another text.
        """
        prompt = tokens if self.prompt is None else self.prompt
        if prompt > tokens:
            raise OrderError(f"the prompt is to have {prompt} tokens, and {tokens} are sent")
        try:
            check_edits(self.edits, n_layers, d_model, 1, tokens)
        except PersonaLensError as error:
            raise OrderError(str(error)) from None
        numbers = sum(read.values_per_row(n_layers, d_model, tokens) for read in self.reads)
        if numbers > MOST_NUMBERS:
            raise OrderError(f"the reads bring back {numbers:,} numbers, and {MOST_NUMBERS:,} are the most")
        return TokenBatch.of([[0] * prompt], [[0] * (tokens - prompt)])


def tensor_data(tensor: Tensor) -> dict[str, Any]:
    """A tensor as JSON: its ``shape``, and its ``data`` as base64 of little-endian float32."""
    return {"shape": list(tensor.shape), "data": _text(tensor)}


def tensor_from(data: Any) -> Tensor:
    """The tensor that `tensor_data` wrote.

    Raises:
        ValueError: If it is none.
    """
    found = _Tensor.model_validate(data) if not isinstance(data, _Tensor) else data
    return _tensor(found.data, found.shape)


def _text(tensor: Tensor) -> str:
    return base64.b64encode(tensor.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()).decode()


def _tensor(text: str, shape: Sequence[int]) -> Tensor:
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a tensor is base64: {error}") from None
    if min(shape, default=1) < 0 or len(content) != 4 * prod(shape):
        raise ValueError(f"{len(content)} bytes are no float32 tensor {list(shape)}")
    return torch.from_numpy(np.frombuffer(content, dtype="<f4").astype(np.float32).reshape(tuple(shape)))


def _edit_data(edit: Edit) -> dict[str, Any]:
    span = edit.positions if isinstance(edit.positions, Span) else None
    kind, condition = (span.kind if span is not None else edit.positions), edit.condition
    mask = kind.flatten().tolist() if isinstance(kind, Tensor) else None
    found: dict[str, Any] = {
        "layer": edit.layer,
        "direction": _text(edit.direction),
        "operation": str(edit.operation),
        "coefficient": float(edit.coefficient),
        "level": edit.target if edit.threshold is None else edit.threshold,
        "relative": edit.relative,
        "positions": "all" if mask is not None else str(kind),
        "mask": None if mask is None else base64.b64encode(bytes(mask)).decode(),
        "span": None if span is None else [span.start, span.stop],
        "schedule": None if edit.schedule is None else [list(point) for point in edit.schedule.points],
        "sinks": edit.sinks,
    }
    if condition is not None:
        named = {"layer": condition.layer, "threshold": condition.threshold, "above": condition.above}
        found["condition"] = {**named, "direction": _text(condition.direction)}
    return {name: value for name, value in found.items() if value is not None}


def _edit(data: _Edit, d_model: int) -> Edit:
    operation, condition = Operation(data.operation), data.condition
    kind = data.positions
    positions: Any = kind if data.span is None else Span(kind, *data.span)
    if data.mask is not None:
        positions = torch.tensor([list(base64.b64decode(data.mask, validate=True))], dtype=torch.bool)
    if condition is not None:
        direction = _tensor(condition.direction, [d_model])
        condition_made = Condition(condition.layer, direction, condition.threshold, condition.above)
    argument = operation.argument or "threshold"
    return Edit(
        data.layer,
        _tensor(data.direction, [d_model]),
        operation,
        data.coefficient,
        relative=data.relative,
        positions=positions,
        schedule=None if data.schedule is None else Schedule(tuple(data.schedule)),
        condition=None if condition is None else condition_made,
        sinks=data.sinks,
        **{argument: data.level},
    )


def _read_data(read: Read) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": read.kind.value, "sinks": read.sinks}
    if read.layers is not None:
        found["layers"] = list(read.layers)
    if read.directions is not None:
        found["directions"] = tensor_data(read.directions)
    return found


def _read(data: _Read, d_model: int) -> Read:
    directions = None if data.directions is None else tensor_from(data.directions)
    layers = None if data.layers is None else tuple(data.layers)
    return Read(ReadKind(data.kind), layers, directions, data.sinks)


def _width(edits: Sequence[Edit]) -> int:
    """Tokens of the masks, which have to be for the same text."""
    return next((edit.positions.shape[1] for edit in edits if isinstance(edit.positions, Tensor)), 0)


def _check(order: RowOrder, n_layers: int, d_model: int) -> None:
    if order.thinking_budget is not None and (order.prompt is not None or order.logprobs):
        raise OrderError("thinking_budget limits what is generated; leave it out where a response is sent")
    if any(read.kind is ReadKind.ACTIVATIONS for read in order.reads):
        raise OrderError("activations are not sent over a network; read means, the last token or projections")
    given = [read.directions.shape[-2] for read in order.reads if read.directions is not None]
    if sum(given) * n_layers * d_model > MOST_NUMBERS:
        raise OrderError(f"directions to project on may be {MOST_NUMBERS // (n_layers * d_model)} for this model")
    if order.sink_limits is not None and len(order.sink_limits) != n_layers:
        raise OrderError(f"sink_limits are one number for each of {n_layers} layers, got {len(order.sink_limits)}")
    if order.sink_limits is None and depend_on_sinks(order.edits, order.reads):
        raise OrderError(
            "what is asked for leaves out attention sinks, so sink_limits are needed, the length of a residual at each "
            "layer beyond which a token is one; or set sinks to true"
        )
