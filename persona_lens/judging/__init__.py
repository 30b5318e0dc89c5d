"""Judges: how strongly a response shows a trait, from 0 to 100."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from persona_lens.judging.protocol import (
    Exchange,
    Judge,
    Judged,
    Judgement,
    JudgingError,
    Method,
    Score,
)

if TYPE_CHECKING:
    from persona_lens.judging.llm import LLMJudge
    from persona_lens.judging.reading import Calibration, Evidence, LikelihoodJudge, LocalJudge, fit_calibration

__all__ = [
    "Calibration",
    "Evidence",
    "Exchange",
    "Judge",
    "Judged",
    "Judgement",
    "JudgingError",
    "LLMJudge",
    "LikelihoodJudge",
    "LocalJudge",
    "Method",
    "Score",
    "fit_calibration",
]


def __getattr__(name: str) -> Any:
    """Judges are loaded when they are first used: tables of judgements are compared without any model."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{'llm' if name == 'LLMJudge' else 'reading'}"), name)
