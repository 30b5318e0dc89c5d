"""Screening: what a dataset would do to a model's character, before anything is trained on it (method, section 7)."""

from __future__ import annotations

from persona_lens.screening.findings import fit_forecast, with_forecasts
from persona_lens.screening.rows import Decision, ScoredRow
from persona_lens.screening.run import Screening, screen, screening_work
from persona_lens.screening.samples import BaseResponses, Counted, ScreeningError, ScreeningSettings, Turns
from persona_lens.screening.scoring import Scorer
from persona_lens.screening.survey import (
    Band,
    Flagging,
    RowThreshold,
    Separation,
    decide,
    separation_of,
    threshold_of,
)
from persona_lens.vectors.provenance import Forecast, Quantity, ShiftForecast

__all__ = [
    "Band",
    "BaseResponses",
    "Counted",
    "Decision",
    "Flagging",
    "Forecast",
    "Quantity",
    "RowThreshold",
    "ScoredRow",
    "Scorer",
    "Screening",
    "ScreeningError",
    "ScreeningSettings",
    "Separation",
    "ShiftForecast",
    "Turns",
    "decide",
    "fit_forecast",
    "screen",
    "screening_work",
    "separation_of",
    "threshold_of",
    "with_forecasts",
]
