"""How far results lie apart that must not, each as one number and where it comes from; `Point` says what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend.protocol import ForwardResult, Generation

Measurement = tuple[float, str]


@dataclass(frozen=True)
class Point:
    """One thing that was tried, and what it came to.

    Attributes:
        name: What must hold.
        expected: The value that is known beforehand.
        measured: The value that was found; NaN where there is none.
        unit: What both count.
        error: How far it is off, relative to what was to be; infinite where it could not be tried.
        tolerance: What is allowed of that.
        detail: Where, what it is without an edit, or what went wrong.
    """

    name: str
    expected: float
    measured: float
    unit: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether it holds; it does not where there is no number."""
        return self.error <= self.tolerance

    @property
    def in_short(self) -> str:
        """What was expected and what was measured, in words."""
        if not isfinite(self.measured):
            return self.detail
        rest = f" ({self.detail})" if self.detail else ""
        return f"expected {self.expected:.4g} {self.unit}, measured {self.measured:.4g}{rest}"

    @staticmethod
    def apart(name: str, measured: float, tolerance: float, detail: str) -> Point:
        """Of two results that must not lie apart, and lie so far apart."""
        return Point(name, 0.0, measured, "", measured, tolerance, detail)

    @staticmethod
    def failure(name: str, detail: str) -> Point:
        """Of something that could not be tried at all."""
        return Point(name, nan, nan, "", inf, 0.0, detail)

    def to_json(self) -> dict[str, Any]:
        """The values by name; JSON has neither infinity nor NaN."""
        values = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in asdict(self).items()}
        return {**values, "passed": self.passed}


def tokens_differ(got: Generation, want: Generation) -> Measurement:
    """Share of rows whose tokens, or whose reason to stop, differ."""
    rows = list(zip(got.responses, got.ended, strict=True)), list(zip(want.responses, want.ended, strict=True))
    if len(rows[0]) != len(rows[1]):
        return float("inf"), f"{len(rows[0])} rows instead of {len(rows[1])}"
    different = [row for row, (a, b) in enumerate(zip(*rows, strict=True)) if a != b]
    if not different:
        return 0.0, f"{sum(map(len, got.responses))} tokens in {len(got.responses)} rows"
    row = different[0]
    a, b = got.responses[row], want.responses[row]
    at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
    return len(different) / len(rows[0]), f"rows {different} differ, row {row} from token {at} on"


def forwards_differ(got: ForwardResult, want: ForwardResult) -> Measurement:
    """Largest error of a read, or of a log-probability relative to it or to 1, whichever is larger."""
    worst = reads_differ(got.reads, want.reads)
    for row, (a, b) in enumerate(zip(got.logprobs or (), want.logprobs or (), strict=True)):
        if a.shape != b.shape:
            return float("inf"), f"row {row}: {len(a)} log-probabilities instead of {len(b)}"
        error = float(((a - b).abs() / b.abs().clamp(min=1)).max()) if len(b) else 0.0
        worst = max(worst, (error, f"log-probabilities of row {row}"), key=lambda measurement: measurement[0])
    return worst


def reads_differ(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Measurement:
    """Largest error of a residual, relative to its length, over rows, layers and tokens."""
    worst, where = 0.0, f"{', '.join(want)} equal"
    for name, expected in want.items():
        measured = got.get(name)
        if measured is None or measured.shape != expected.shape:
            shape = None if measured is None else list(measured.shape)
            return float("inf"), f"{name}: shape {shape} instead of {list(expected.shape)}"
        if not torch.equal(measured.isnan(), expected.isnan()):
            return float("inf"), f"{name}: missing values stand elsewhere"
        errors = _relative_errors(measured, expected)
        error = float(errors.max())
        if error > worst:
            row, layer = divmod(int(errors.argmax()), expected.shape[1])
            worst, where = error, f"largest at {name} of row {row}, layer {layer} of those read"
    return worst, where


def _relative_errors(measured: Tensor, expected: Tensor) -> Tensor:
    """Length of the difference relative to the residual's; of every token the largest, [batch, layers]."""
    distance = (measured - expected).norm(dim=-1)
    errors: Tensor = (distance / token_lengths(expected)).nan_to_num()
    return errors.flatten(2).amax(dim=-1) if errors.ndim > 2 else errors


def token_lengths(values: Tensor) -> Tensor:
    """Length of each residual, [batch, layers, ...], and never 0: what an error is relative to."""
    length: Tensor = values.norm(dim=-1)
    if length.ndim > 2:  # an edit may leave next to nothing of a token, so a typical one of its row counts too
        length = length.maximum(length.nanmedian(dim=-1, keepdim=True).values)
    return length.clamp(min=torch.finfo(torch.float32).tiny)
