"""The contract between the engine and the libraries that run models: what can be read and written, and by whom."""

from __future__ import annotations

from persona_lens.backend.edits import Edit, Edits, Operation, as_edits
from persona_lens.backend.parts import Part, Parts
from persona_lens.backend.protocol import Backend, BackendError, BackendSpec, ForwardResult, Generation, ModelInfo
from persona_lens.backend.reads import Read, ReadError, ReadKind
from persona_lens.backend.registry import backend_statuses, find_backend, open_backend, wrap_model
from persona_lens.backend.streaming import (
    StopGeneration,
    Watch,
    WatchableBackend,
    WatchedTokens,
    WatchError,
    watched_generation,
)
from persona_lens.backend.tokens import (
    Condition,
    EditError,
    Positions,
    Sampling,
    Schedule,
    Span,
    TokenBatch,
    TokenError,
    TokenScore,
)

__all__ = [
    "Backend",
    "BackendError",
    "BackendSpec",
    "Condition",
    "Edit",
    "EditError",
    "Edits",
    "ForwardResult",
    "Generation",
    "ModelInfo",
    "Operation",
    "Part",
    "Parts",
    "Positions",
    "Read",
    "ReadError",
    "ReadKind",
    "Sampling",
    "Schedule",
    "Span",
    "StopGeneration",
    "TokenBatch",
    "TokenError",
    "TokenScore",
    "Watch",
    "WatchError",
    "WatchableBackend",
    "WatchedTokens",
    "as_edits",
    "backend_statuses",
    "find_backend",
    "open_backend",
    "watched_generation",
    "wrap_model",
]
