"""Capability: what a model can do, steered or not, measured by lm-evaluation-harness and inspect_ai.

Neither of the two is imported before it is used.
"""

from __future__ import annotations

from persona_lens.capability.change import CapabilityChange, capability_changes
from persona_lens.capability.errors import CapabilityError
from persona_lens.capability.evaluation import BUILTIN_TASK, accuracy, check_task, evaluate_capability
from persona_lens.capability.result import CapabilityResult, Metric, TaskResult

__all__ = [
    "BUILTIN_TASK",
    "CapabilityChange",
    "CapabilityError",
    "CapabilityResult",
    "Metric",
    "TaskResult",
    "accuracy",
    "capability_changes",
    "check_task",
    "evaluate_capability",
]
