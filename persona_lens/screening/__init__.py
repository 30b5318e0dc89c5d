"""Screening: what a dataset would do to a model's character, before anything is trained on it (method, section 7)."""

from persona_lens.screening.crews import Crew, OneProcess
from persona_lens.screening.datasets import Dataset, GivenRow, open_dataset
from persona_lens.screening.errors import ScreeningError
from persona_lens.screening.flagging import Flagging
from persona_lens.screening.forecast import Forecast, ShiftForecast, fit_forecast, forecasts_of, with_forecasts
from persona_lens.screening.forms import SampleForm, conversation_of, detect_form
from persona_lens.screening.labels import Separation, separation_of
from persona_lens.screening.rays import KnownModel, OpenedBy, RayCrew
from persona_lens.screening.run import Screening, screen, screening_work
from persona_lens.screening.samples import Turns
from persona_lens.screening.scored import Quantity, ScoredRow
from persona_lens.screening.scoring import Scorer
from persona_lens.screening.settings import BaseResponses, ScreeningSettings
from persona_lens.screening.sources import find_source
from persona_lens.screening.thresholds import Band, Decision, RowThreshold, threshold_of

__all__ = [
    "Band",
    "BaseResponses",
    "Crew",
    "Dataset",
    "Decision",
    "Flagging",
    "Forecast",
    "GivenRow",
    "KnownModel",
    "OneProcess",
    "OpenedBy",
    "Quantity",
    "RayCrew",
    "RowThreshold",
    "SampleForm",
    "ScoredRow",
    "Scorer",
    "Screening",
    "ScreeningError",
    "ScreeningSettings",
    "Separation",
    "ShiftForecast",
    "Turns",
    "conversation_of",
    "detect_form",
    "find_source",
    "fit_forecast",
    "forecasts_of",
    "open_dataset",
    "screen",
    "screening_work",
    "separation_of",
    "threshold_of",
    "with_forecasts",
]
