"""`Separation`: how well a value tells labelled rows from clean ones: ROC, and AUC with its interval."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_lens.screening.errors import ScreeningError
from persona_lens.statistics import auc, auc_interval

CLEAN = ("normal", "clean", "none", "0", "false", "False", "no")
_POINTS = 100
_MOST = 20  # labels


@dataclass(frozen=True)
class Separation:
    """Rows of one label against the clean ones.

    Attributes:
        auc: Probability that a labelled row has a larger value than a clean one, ties counting half.
        low: Lower end of its 95% interval over rows (`persona_lens.statistics.auc_interval`).
        high: Upper end.
        labelled: How many rows have the label.
        clean: How many are clean.
        roc: Points of the curve: shares of clean and of labelled rows above a threshold, from (0, 0) to (1, 1).
    """

    auc: float
    low: float
    high: float
    labelled: int
    clean: int
    roc: tuple[tuple[float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


def separation_of(labelled: NDArray[np.float64], clean: NDArray[np.float64]) -> Separation | None:
    """ROC and AUC; None if either kind has no row with a value.

    Args:
        labelled: Values of the rows with a label; NaN is left out.
        clean: Those of the clean rows.
    """
    labelled, clean = (values[np.isfinite(values)] for values in (labelled, clean))
    if not len(labelled) or not len(clean):
        return None
    places, where = np.unique(np.concatenate([labelled, clean]), return_inverse=True)
    positive, negative = where[: len(labelled)], where[len(labelled) :]
    found = auc(labelled, clean)
    low, high = auc_interval(labelled, clean)
    return Separation(found, low, high, len(labelled), len(clean), _roc(positive, negative, len(places)))


def _roc(positive: NDArray[np.intp], negative: NDArray[np.intp], places: int) -> tuple[tuple[float, float], ...]:
    shares = [
        np.concatenate([[0.0], np.bincount(each, minlength=places)[::-1].cumsum() / len(each)])
        for each in (negative, positive)
    ]
    kept = np.unique(np.linspace(0, places, min(places + 1, _POINTS)).round().astype(int))
    return tuple((float(x), float(y)) for x, y in zip(shares[0][kept], shares[1][kept], strict=True))


class LabelledValues:
    """The values of labelled rows, 8 bytes each, by label.

    Args:
        columns: How many values a row has.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._values: dict[str, array[float]] = {}

    def add(self, label: str, values: NDArray[np.float64]) -> None:
        """Take in a row: float64 [columns].

        Raises:
            ScreeningError: If there are more labels than can be labels.
        """
        if label not in self._values and len(self._values) == _MOST:
            raise ScreeningError(
                f"the column of labels has more than {_MOST} different values, such as {label[:40]!r}; name one of few"
            )
        self._values.setdefault(label, array("d")).extend(values.tolist())

    def by_label(self) -> Mapping[str, NDArray[np.float64]]:
        """Float64 [rows, columns] by label, labels in their order of appearance."""
        return {label: np.array(values).reshape(-1, self._columns) for label, values in self._values.items()}


def clean_label(labels: Sequence[str], chosen: str | None) -> str:
    """The label of clean rows.

    Args:
        labels: The labels there are.
        chosen: What was asked for; None finds one that is usual.

    Raises:
        ScreeningError: If it is not among them, or none of them is usual.
    """
    found = next((name for name in CLEAN if name in labels), None) if chosen is None else chosen
    if found is None or found not in labels:
        there = ", ".join(repr(label[:40]) for label in labels) or "none"
        raise ScreeningError(f"which label do clean rows have? Name one with clean (--clean); the labels are: {there}")
    if len(labels) < 2:
        raise ScreeningError(f"all rows have the label {found!r}; AUC needs another one to tell from it")
    return found
