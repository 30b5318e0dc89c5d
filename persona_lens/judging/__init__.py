"""Judges: how strongly a response shows a trait, from 0 to 100."""

from persona_lens.judging.calibration import Calibration, fit_calibration
from persona_lens.judging.likelihood import Evidence, LikelihoodJudge
from persona_lens.judging.protocol import Exchange, Judge, JudgingError, Score
from persona_lens.judging.recording import weigh_rollouts

__all__ = [
    "Calibration",
    "Evidence",
    "Exchange",
    "Judge",
    "JudgingError",
    "LikelihoodJudge",
    "Score",
    "fit_calibration",
    "weigh_rollouts",
]
