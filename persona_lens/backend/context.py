"""How many tokens a model takes: found in its configuration, told by the backends that know it, and never exceeded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from persona_lens.backend.protocol import Backend
from persona_lens.errors import PersonaLensError

UNLIMITED = 10**9  # tokenizers that know no limit name a number beyond this
_STRETCHED_BEYOND = ("linear", "dynamic")  # rotary positions whose stretch the configuration's length leaves out


class ContextError(PersonaLensError):
    """A text that is longer than the model takes."""


@runtime_checkable
class BoundedBackend(Protocol):
    """A backend that knows how many tokens its model takes. Backends need not."""

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt and its response together at most; None where the model has no limit."""
        ...


def context_length(backend: Backend) -> int | None:
    """Tokens of a prompt and its response together at most; None where nothing says so."""
    if isinstance(backend, BoundedBackend):
        return backend.context_length
    limit = getattr(backend.tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < UNLIMITED else None


# What transformers' configurations call the number of tokens that attention looks back over.
_WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "local_attention",
    "keep_window_size",
    "window_size",
)


def window_of(config: Any) -> int | None:
    """Tokens that some layer's attention looks back over at most, the smallest; None where nothing says so."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in _WINDOWS]
    return min((each for each in found if isinstance(each, int) and each > 0), default=None)


def context_of(config: Any) -> int | None:
    """The context length in a Hugging Face model's configuration, stretched as its rotary positions are.

    None where the model has no limit, as recurrent ones and those with ALiBi have none.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if original is None and rope.get("rope_type") in _STRETCHED_BEYOND:
        original = longest
    return max(longest, int(original * factor)) if original and factor else longest


def check_fits(limit: int | None, lengths: Iterable[int], new: int = 0) -> None:
    """Raise unless every text fits: beyond a model's context it fails, or runs and writes nonsense.

    Args:
        limit: Tokens that the model takes, as `context_length` tells them; None for any number.
        lengths: Tokens of each text.
        new: Tokens that are to be generated behind each.

    Raises:
        ContextError: Naming the longest text and the limit.
    """
    longest = max(lengths, default=0)
    if limit is None or longest + new <= limit:
        return
    if new:
        raise ContextError(
            f"the longest prompt has {longest:,} tokens and {new:,} new ones are asked for, but the model takes "
            f"{limit:,} together; ask for fewer new tokens, or shorten the prompt"
        )
    raise ContextError(f"the longest text has {longest:,} tokens, but the model takes {limit:,}; shorten it")
