"""Chat completions from an OpenAI-compatible server: many at a time, each paid for once."""

from __future__ import annotations

from persona_lens.models.server.messages import (
    Completion,
    CompletionCache,
    CompletionRequest,
    Prices,
    Refused,
    Sampled,
    ServerError,
    ServerSettings,
    Spending,
    SpendingLimitError,
    Usage,
)
from persona_lens.models.server.server import CompletionServer

__all__ = [
    "Completion",
    "CompletionCache",
    "CompletionRequest",
    "CompletionServer",
    "Prices",
    "Refused",
    "Sampled",
    "ServerError",
    "ServerSettings",
    "Spending",
    "SpendingLimitError",
    "Usage",
]
