"""Judges: how strongly a response shows a trait, from 0 to 100."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_lens.judging.likelihood import Calibration, Evidence, LikelihoodJudge, fit_calibration
    from persona_lens.judging.llm import LLMJudge, Method
    from persona_lens.judging.local import LocalJudge
    from persona_lens.judging.protocol import (
        Exchange,
        Judge,
        Judgement,
        JudgingError,
        PlannedJudge,
        PreparedJudge,
        Score,
    )
    from persona_lens.judging.recording import (
        as_used,
        check_scored,
        exchange_of,
        judge_exchanges,
        judge_rollouts,
        judging_work,
        longest_exchanges,
        methods_of,
        prepare_judge,
        weigh_rollouts,
    )

__all__ = [
    "Calibration",
    "Evidence",
    "Exchange",
    "Judge",
    "Judgement",
    "JudgingError",
    "LLMJudge",
    "LikelihoodJudge",
    "LocalJudge",
    "Method",
    "PlannedJudge",
    "PreparedJudge",
    "Score",
    "as_used",
    "check_scored",
    "exchange_of",
    "fit_calibration",
    "judge_exchanges",
    "judge_rollouts",
    "judging_work",
    "longest_exchanges",
    "methods_of",
    "prepare_judge",
    "weigh_rollouts",
]


def __getattr__(name: str) -> Any:
    """A name's module is loaded when it is first used: tables of judgements are compared without any model."""
    for home in ("protocol", "likelihood", "llm", "local", "recording") if name in __all__ else ():
        if hasattr(module := importlib.import_module(f"{__name__}.{home}"), name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
