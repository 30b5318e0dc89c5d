"""`PartMasks`: what each token of a running batch belongs to, thinking or answer, as the batch grows.

Runs where the model runs, see `writing`: at run time it uses nothing but torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Bool, Int, UInt8
    from torch import Tensor

# The values of `persona_lens.backend.parts.machine.Part`, by the kinds of positions.
PARTS = {"thinking": 1, "answer": 2}


def part_of(kind: str) -> int | None:
    """The part that positions or a read are of; None for others."""
    return PARTS.get(kind.partition("_")[0])


def stepped(
    automaton: Mapping[str, Tensor], states: Int[Tensor, " rows"], ids: Int[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], UInt8[Tensor, " rows"]]:
    """The next state of each row, and what the token is that leads there.

    Args:
        automaton: See `persona_lens.backend.parts.Parts.plain`.
        states: Where each row stands.
        ids: Its next token.
    """
    ids = ids.contiguous()
    place = torch.searchsorted(automaton["ids"], ids, right=True) - 1
    known = automaton["ids"][place] == ids
    of_class = torch.where(known, automaton["classes"][place], 0)
    return automaton["following"][of_class, states], automaton["kinds"][of_class, states]


class PartMasks:
    """The tokens of a batch; one column more with each that is generated.

    Args:
        given: See `persona_lens.backend.parts.GivenParts.plain`.
        grows: Whether tokens will come that are not there yet; else the automaton need not be kept.
    """

    def __init__(self, given: Mapping[str, Tensor], *, grows: bool) -> None:
        self.kinds, self._states = given["begun"], given["states"]
        self._given = {name: value for name, value in given.items() if grows and name not in ("begun", "states")}

    def to(self, device: torch.device) -> None:
        """Go where the model is."""
        self._given = {name: value.to(device) for name, value in self._given.items()}
        self.kinds, self._states = self.kinds.to(device), self._states.to(device)

    def append(self, newest: Int[Tensor, " batch"]) -> None:
        """Take the next token of each row."""
        self._states, kinds = stepped(self._given, self._states, newest)
        self.kinds = torch.cat([self.kinds, kinds.unsqueeze(1)], dim=1)

    def mask(self, part: int) -> Bool[Tensor, "batch width"]:
        """True at the tokens of a part, those behind the end of a response among them."""
        return self.kinds == part
