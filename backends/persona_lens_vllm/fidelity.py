"""What a worker did, compared with what had to be done: see `persona_lens.backend.packed.checks`."""

from __future__ import annotations

from collections.abc import Sequence

from persona_lens.backend.packed.checks import FidelityError, check_done, rows_in_short
from persona_lens_vllm.worker import Order, Outcome


def check_outcome(
    order: Order,
    outcome: Outcome,
    lengths: Sequence[int],
    partly: Sequence[int] = (),
    kinds: Sequence[bytes] | None = None,
) -> None:
    """Raise `FidelityError` unless everything was done, and nothing under other edits; arguments as `check_done`."""
    try:
        if outcome.foreign:
            raise FidelityError(
                f"{rows_in_short(outcome.foreign)} went on from a cache that was computed under other edits"
            )
        check_done(order.call, outcome.tallies, outcome.reads, lengths, partly, kinds)
    except FidelityError as error:
        raise FidelityError(
            f"{error}; nothing of this call is used. Open the model with enforce_eager=True, and if that is so, report "
            "it with the version of vLLM and the model"
        ) from None
