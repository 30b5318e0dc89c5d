"""`RunningCall`: a call whose rows run in passes together with those of others; what it does at each block.

Runs where the model runs, see `writing`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from persona_lens.backend.packed.intervention import PackedIntervention
from persona_lens.backend.tokens import EditError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from persona_lens.backend.packed.call import PackedCall

# A residual beyond this makes keys and values that are no numbers, and these harm whoever is given their memory next:
# attention multiplies what it does not attend to by 0. No model comes near it, in half precision but by overflowing.
LARGEST = {torch.float16: 3e4}
LARGEST_OF_OTHERS = 1e15
TOO_STRONG = "makes a residual too large for the model; weaken it"


class RunningCall:
    """A call whose rows run.

    Attributes:
        intervention: What carries it out.
        error: What went wrong in a block, after which nothing more is read or edited.
        places: Places of its tokens among those of the pass that runs, ascending; where the model runs.
        whole: Whether the pass has no other tokens.
    """

    def __init__(self, call: PackedCall) -> None:
        self.intervention = PackedIntervention(call)
        self.error: str | None = None
        self.places: Tensor = torch.empty(0)
        self.whole = False
        self._beyond: dict[int, Tensor] = {}

    def begin_pass(
        self, rows: Int[Tensor, " some"], at: Int[Tensor, " some"], places: Int[Tensor, " some"], ids: Tensor
    ) -> None:
        """Tell which tokens of the coming pass are the call's.

        Args:
            rows: Each token's row, on the CPU.
            at: Its position in its row, on the CPU.
            places: Its place in the pass, on the CPU, ascending.
            ids: All tokens of the pass.
        """
        self.rows, self.at = rows, at
        self.whole = len(places) == len(ids)
        self.places = places.to(ids.device, non_blocking=True)
        self.intervention.begin_pass(rows, at, ids if self.whole else ids[self.places])

    def at_block(self, layer: int, stream: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "some d_model"] | None:
        """The residual of the call's own tokens after its edits; None where there are none."""
        h = stream[self.within(stream)]
        made = self.intervention.block(layer, h)
        return None if made is h else self._within_reach(layer, made)

    def within(self, stream: Float[Tensor, "tokens d_model"]) -> slice | Int[Tensor, " some"]:
        """Where its own tokens are; an engine's stream may have some behind the last."""
        return slice(len(self.places)) if self.whole else self.places.to(stream.device)

    def _within_reach(self, layer: int, made: Tensor) -> Tensor:
        """What a model can go on from; it is told when it was not."""
        most = LARGEST.get(made.dtype, LARGEST_OF_OTHERS)
        kept = made.nan_to_num(0.0, most, -most).clamp_(-most, most)
        beyond = (kept != made).any()
        self._beyond[layer] = beyond | self._beyond[layer] if layer in self._beyond else beyond
        return kept

    def failure(self) -> str | None:
        """What went wrong, an edit that was too strong among it."""
        if self.error is None and (beyond := [layer for layer, found in self._beyond.items() if bool(found)]):
            return f"an edit at layer {min(beyond)} {TOO_STRONG}"
        return self.error


def as_error(failure: str) -> Exception:
    """What went wrong in a call, as it is raised: too strong an edit is the caller's to mend, all else a bug."""
    return EditError(failure) if failure.endswith(TOO_STRONG) else RuntimeError(failure)


def edited_pass(
    calls: Iterable[RunningCall], layer: int, stream: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, "tokens d_model"] | None:
    """The residual of a pass after the edits of all calls that have tokens in it; None where nothing was changed.

    An error in one call is its own: it is noted there, and the others go on.
    """
    changed: Tensor | None = None
    for call in calls:
        if call.error is not None or layer not in call.intervention.layers:
            continue
        try:
            made = call.at_block(layer, stream)
            if made is not None and len(made) == len(stream):
                changed = made
            elif made is not None:
                changed = stream.clone() if changed is None else changed
                changed[call.within(stream)] = made
        except Exception as error:  # noqa: BLE001 - told when the call ends
            call.error = f"{type(error).__name__}: {error}"
    return changed
