"""`ShiftForecast`: how far finetuning on a dataset would move a trait's score, by a line that was fitted before.

The line is fitted on models that were finetuned on datasets whose projection difference is known. It is kept with the
vectors, so that every later screening with them has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from persona_lens.screening.rows import Quantity
from persona_lens.screening.samples import ScreeningError
from persona_lens.vectors import PersonaVectors

KEY = "shift_forecasts"
_LEAST = 3


@dataclass(frozen=True)
class Forecast:
    """A shift of the mean trait score that is to be expected.

    Attributes:
        shift: In points of the score, 0 to 100.
        low: Lower end of the 95% prediction interval for another dataset.
        high: Upper end.
        outside: Whether the dataset's value lies outside those that the line was fitted on.
    """

    shift: float
    low: float
    high: float
    outside: bool

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


@dataclass(frozen=True)
class ShiftForecast:
    """A line from a dataset's mean value to the shift of the trait score after finetuning on it.

    Attributes:
        trait: The trait.
        layer: Layer at which the values were taken.
        quantity: Which value.
        slope: Points of the score for one unit of the residual stream.
        intercept: Points at 0.
        residual: Standard deviation of the residuals, in points, with n - 2 in the denominator.
        n: Datasets that it was fitted on.
        mean: Their mean value.
        spread: Sum of squared deviations from it.
        lowest: Their smallest value.
        highest: Their largest one.
        source: What was finetuned, in words.
    """

    trait: str
    layer: int
    quantity: str
    slope: float
    intercept: float
    residual: float
    n: int
    mean: float
    spread: float
    lowest: float
    highest: float
    source: str = ""

    def predict(self, value: float) -> Forecast:
        """The shift to expect of a dataset with this mean value."""
        shift = self.intercept + self.slope * value
        error = self.residual * np.sqrt(1 + 1 / self.n + (value - self.mean) ** 2 / self.spread)
        reach = float(stats.t.ppf(0.975, self.n - 2) * error)
        return Forecast(shift, shift - reach, shift + reach, not self.lowest <= value <= self.highest)

    def to_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


def fit_forecast(
    trait: str,
    layer: int,
    values: Sequence[float],
    shifts: Sequence[float],
    *,
    quantity: Quantity = Quantity.DIFFERENCE,
    source: str = "",
) -> ShiftForecast:
    """Fit a line by least squares.

    Args:
        trait: The trait.
        layer: Layer of the values.
        values: Mean value of each dataset.
        shifts: Trait score after finetuning on it, minus that before.
        quantity: Which value.
        source: What was finetuned, in words.

    Raises:
        ScreeningError: If there are fewer than three datasets, or their values are all the same.
    """
    x, y = np.asarray(values, dtype=np.float64), np.asarray(shifts, dtype=np.float64)
    if len(x) != len(y) or len(x) < _LEAST or not np.ptp(x):
        raise ScreeningError(
            f"a forecast is fitted on at least {_LEAST} datasets of different values, each with a shift; got "
            f"{len(x)} values and {len(y)} shifts"
        )
    line = stats.linregress(x, y)
    residuals = y - line.intercept - line.slope * x
    return ShiftForecast(
        trait,
        layer,
        quantity.value,
        float(line.slope),
        float(line.intercept),
        float(np.sqrt((residuals**2).sum() / (len(x) - 2))),
        len(x),
        float(x.mean()),
        float(((x - x.mean()) ** 2).sum()),
        float(x.min()),
        float(x.max()),
        source,
    )


def with_forecasts(vectors: PersonaVectors, forecasts: Sequence[ShiftForecast]) -> PersonaVectors:
    """The same vectors with forecasts in their provenance, where `screen` finds them.

    Raises:
        ScreeningError: If a forecast is of another trait.
    """
    if other := [each.trait for each in forecasts if each.trait != vectors.trait]:
        raise ScreeningError(f"the forecast is of {other[0]!r}, but the vectors are of {vectors.trait!r}")
    kept = {**vectors.provenance, KEY: [each.to_json() for each in forecasts]}
    return PersonaVectors(vectors.trait, vectors.model, vectors.directions, kept)


def forecasts_of(vectors: PersonaVectors) -> tuple[ShiftForecast, ...]:
    """The forecasts that the vectors carry; almost always none.

    Raises:
        ScreeningError: If they are damaged.
    """
    stored = vectors.provenance.get(KEY, [])
    try:
        return tuple(_of_json(each) for each in stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ScreeningError(
            f"the forecasts that the vectors of {vectors.trait!r} carry are damaged: {error}"
        ) from error


def _of_json(given: Mapping[str, Any]) -> ShiftForecast:
    Quantity(given["quantity"])
    found = ShiftForecast(**given)
    for name, value in given.items():
        kinds = (
            (str,) if name in ("trait", "quantity", "source") else (int,) if name in ("layer", "n") else (int, float)
        )
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{name} is a {type(value).__name__}")
    return found
