"""Whether edits and reads ask which tokens are thinking and which answer: where none does, nobody finds out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from persona_lens.backend.edits import Edit
from persona_lens.backend.parts import Parts
from persona_lens.backend.parts.budget import ThinkingBudget
from persona_lens.backend.reads import OF_PARTS, Read, ReadError, ReadKind
from persona_lens.backend.tokens import EditError, Positions, Sampling, Span, TokenError

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


def budgets_for(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[ThinkingBudget, ...]:
    """The thinking that is left to the response to each prompt; none where it is not limited.

    Raises:
        TokenError: If it is to be limited, and the model never thinks.
    """
    limited = limited_for(tokenizer, sampling.thinking_budget)
    return () if limited is None else tuple(limited.parts.budget(prompt, limited.most) for prompt in prompts)


def check_limited(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    responses: Sequence[Sequence[int]],
) -> None:
    """Raise `TokenError` where a response thought on, as a backend of others lets it that knows no such limit."""
    for row, budget in enumerate(budgets_for(tokenizer, prompts, sampling)):
        for token in responses[row]:
            if budget.forced not in (None, token):
                raise TokenError(
                    f"row {row} thinks beyond its budget: this backend does not limit thinking; leave out the thinking "
                    "budget (--thinking-budget), or open the model with another backend"
                )
            budget.take(token)


class Limited(NamedTuple):
    """A limit on thinking.

    Attributes:
        parts: What tells thinking from answer.
        most: How many thinking tokens a response may have.
    """

    parts: Parts
    most: int


def limited_for(tokenizer: PreTrainedTokenizerBase, most: int | None, told: Parts | None = None) -> Limited | None:
    """A limit of so many thinking tokens for a tokenizer's model; None where there is none.

    Args:
        tokenizer: The model's.
        most: So many.
        told: See `parts_for`.

    Raises:
        TokenError: If the model never thinks.
    """
    if most is None:
        return None
    parts = told or Parts.of(tokenizer)
    if not parts.closing:
        raise TokenError(f"there is no thinking to limit: {NEVER}; leave out the thinking budget (--thinking-budget)")
    return Limited(parts, most)
