"""Calls from several threads that run together on one model in this process, as continuous batching does."""

from __future__ import annotations

from persona_lens.backend.continuous.backend import ROWS, ContinuousBackend, continuous

__all__ = ["ROWS", "ContinuousBackend", "continuous"]
