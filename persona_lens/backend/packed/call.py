"""`PackedCall`: edits and reads of some rows as plain data, for engines that make up their passes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from persona_lens.backend.edits import Edit
    from persona_lens.backend.parts import GivenParts
    from persona_lens.backend.reads import Read


@dataclass(frozen=True)
class PackedCall:
    """What is to be done with some rows; plain data, which travels to where the model runs.

    Attributes:
        prompts: Tokens of each row's prompt.
        texts: Tokens of each row that are handed over: those of the prompt, and of a response that is there already.
        room: How many tokens that are still to be generated count as a row's response.
        end_ids: Token ids that end a response that is being generated; they are not part of it.
        edits: See `persona_lens.backend.edits.Edit.plain`.
        reads: See `persona_lens.backend.reads.Read.plain`.
        sink_limits: See `persona_lens.backend.sinks`.
        watched: The read whose values are told at once, see `persona_lens.backend.streaming.Watch`.
        parts: Which of the tokens handed over are thinking and which answer, and what the next will be; None where
            nobody asks, or every token of a response is answer.
    """

    prompts: tuple[int, ...]
    texts: tuple[int, ...]
    room: int = 0
    end_ids: tuple[int, ...] = ()
    edits: tuple[dict[str, Any], ...] = ()
    reads: tuple[dict[str, Any], ...] = ()
    sink_limits: tuple[float, ...] | None = None
    watched: dict[str, Any] | None = None
    parts: GivenParts | None = None

    def within(self, first: int, stop: int) -> PackedCall:
        """The part at layers ``first`` to ``stop``, where a model's blocks are spread over several processes.

        Raises:
            ValueError: If an edit depends on a condition at a layer elsewhere.
        """
        edits = tuple(edit for edit in self.edits if first <= edit["layer"] < stop)
        for edit in edits:
            if edit["condition"] is not None and edit["condition"]["layer"] < first:
                raise ValueError("a condition and its edit are at layers that different processes run; use one stage")
        reads = [_within(read, first, stop) for read in self.reads]
        watched = None if self.watched is None else _within(self.watched, first, stop)
        if watched is not None and not watched["layers"]:
            watched = None
        return replace(self, edits=edits, reads=tuple(read for read in reads if read["layers"]), watched=watched)

    @staticmethod
    def of(
        prompts: Sequence[int],
        texts: Sequence[int],
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
        *,
        n_layers: int,
        watched: Read | None = None,
        **more: Any,
    ) -> PackedCall:
        """The call with edits and reads as plain data; ``more`` are its other attributes."""
        plain = tuple(
            {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in edit.plain().items()}
            for edit in edits
        )
        return PackedCall(
            tuple(prompts),
            tuple(texts),
            edits=plain,
            reads=tuple(read.plain(n_layers) for read in reads),
            watched=None if watched is None else watched.plain(n_layers),
            **more,
        )


def _within(read: dict[str, Any], first: int, stop: int) -> dict[str, Any]:
    kept = [number for number, layer in enumerate(read["layers"]) if first <= layer < stop]
    units = None if read["units"] is None else [read["units"][number] for number in kept]
    return {**read, "layers": tuple(read["layers"][number] for number in kept), "units": units}
