"""Whether edits and reads ask which tokens are thinking and which answer: where none does, nobody finds out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from persona_lens.backend.edits import Edit
from persona_lens.backend.parts import Parts
from persona_lens.backend.reads import OF_PARTS, Read, ReadError, ReadKind
from persona_lens.backend.tokens import EditError, Positions, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEVER = "this model's vocabulary and chat template have no marks of reasoning"


def parts_for(
    tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit] = (), reads: Sequence[Read] = ()
) -> Parts | None:
    """What edits and reads need to tell thinking from answer; None where none asks, or all of a response is answer.

    Raises:
        EditError: If one is made at thinking, and the model never thinks.
        ReadError: If one is of thinking, likewise.
    """
    kinds = [edit.positions.kind if isinstance(edit.positions, Span) else edit.positions for edit in edits]
    edited = {str(kind) for kind in kinds if not isinstance(kind, Tensor)} & {Positions.THINKING, Positions.ANSWER}
    read = {read.kind for read in reads}.intersection(OF_PARTS)
    if not edited and not read:
        return None
    parts = Parts.of(tokenizer)
    if parts.thinks:
        return parts
    if Positions.THINKING in edited:
        raise EditError(f"there is no thinking to edit: {NEVER}; use answer or response")
    if ReadKind.THINKING_MEAN in read:
        raise ReadError(f"there is no thinking to read: {NEVER}; read answer_mean or response_mean")
    return None
