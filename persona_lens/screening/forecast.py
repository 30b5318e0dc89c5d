"""`ShiftForecast`: how far finetuning on a dataset would move a trait's score, by a line that was fitted before.

The line is fitted on models that were finetuned on datasets whose projection difference is known. It is kept with the
vectors, so that every later screening with them has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from persona_lens.screening.samples import ScreeningError
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.provenance import FORECASTS, Quantity, ShiftForecast

KEY = "shift_forecasts"
_LEAST = 3


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
    return vectors.with_provenance(**{FORECASTS: [each.to_json() for each in forecasts]})
