"""Capability: what a model can do, steered or not, measured by lm-evaluation-harness and inspect_ai.

Neither of the two is imported before it is used.
"""

from __future__ import annotations

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.capability.cost import capability_changes_work, capability_work
from persona_lens.analysis.capability.evaluation import (
    BUILTIN_TASK,
    CapabilityChange,
    CapabilityResult,
    Metric,
    TaskResult,
    accuracy,
    capability_changes,
    check_task,
    evaluate_capability,
)

__all__ = [
    "BUILTIN_TASK",
    "AnalysisError",
    "CapabilityChange",
    "CapabilityResult",
    "Metric",
    "TaskResult",
    "accuracy",
    "capability_changes",
    "capability_changes_work",
    "capability_work",
    "check_task",
    "evaluate_capability",
]
