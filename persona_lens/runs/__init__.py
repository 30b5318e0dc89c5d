"""Runs: the folder that one fills and continues, chunks of work saved as they come, rollouts, and what they cost."""

from __future__ import annotations

from persona_lens.runs.folder import (
    ACCEPTED,
    BOUND,
    RunError,
    RunFolder,
    accepting_changes,
    differences,
    file_prefix,
)

__all__ = [
    "ACCEPTED",
    "BOUND",
    "RunError",
    "RunFolder",
    "accepting_changes",
    "differences",
    "file_prefix",
]
