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


def ask_parts(edits: Sequence[Edit] = (), reads: Sequence[Read] = ()) -> set[str]:
    """The positions and kinds of reads among these that are of a part of a response."""
    kinds = [edit.positions.kind if isinstance(edit.positions, Span) else edit.positions for edit in edits]
    edited = {str(kind) for kind in kinds if not isinstance(kind, Tensor)} & {Positions.THINKING, Positions.ANSWER}
    return {*edited, *{read.kind for read in reads}.intersection(OF_PARTS)}


def parts_for(
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit] = (),
    reads: Sequence[Read] = (),
    told: Parts | None = None,
) -> Parts | None:
    """What edits and reads need to tell thinking from answer; None where none asks, or all of a response is answer.

    Args:
        tokenizer: The model's.
        edits: What is written.
        reads: What is read.
        told: What tells the two apart, where that is not what the tokenizer says.

    Raises:
        EditError: If one is made at thinking, and the model never thinks.
        ReadError: If one is of thinking, likewise.
    """
    asked = ask_parts(edits, reads)
    if not asked:
        return None
    parts = told or Parts.of(tokenizer)
    if parts.thinks:
        return parts
    if Positions.THINKING in asked:
        raise EditError(f"there is no thinking to edit: {NEVER}; use answer or response")
    if ReadKind.THINKING_MEAN in asked:
        raise ReadError(f"there is no thinking to read: {NEVER}; read answer_mean or response_mean")
    return None
