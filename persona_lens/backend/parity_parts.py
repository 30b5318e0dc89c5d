"""Whether a backend tells thinking from answer as `persona_lens.backend.parts` does; a part of the parity suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend.differences import Measurement, reads_differ
from persona_lens.backend.edits import Edit
from persona_lens.backend.parts import Part, Parts
from persona_lens.backend.protocol import Backend
from persona_lens.backend.reads import Read, ReadKind
from persona_lens.backend.tokens import Positions, Sampling, TokenBatch, TokenIds, pad_left
from persona_lens.core.marks import ANSWERS, THOUGHTS

KINDS = {Positions.THINKING: Part.THINKING, Positions.ANSWER: Part.ANSWER}


def kinds_of(backend: Backend) -> tuple[Positions, ...]:
    """The parts that responses of a model have."""
    return tuple(KINDS) if Parts.of(backend.tokenizer).thinks else (Positions.ANSWER,)


def part_of_text(backend: Backend, text: TokenBatch, edit: Edit) -> Measurement:
    """Compare an edit at a part, and the mean of it, with those at a mask that is made here.

    Args:
        backend: What is checked.
        text: Prompts and responses; the first half of these is made thinking, if the model knows how.
        edit: At one of `KINDS`.
    """
    opening, closing = _marks(backend.tokenizer)
    responses = [(*opening, *r[: len(r) // 2], *closing, *r[len(r) // 2 :]) for r in text.responses]
    text = TokenBatch.of(text.prompts, responses)
    return _by_hand(backend, text, edit, backend.forward(text, [edit], _reads(edit)).reads)


def part_generated(backend: Backend, prompts: Sequence[TokenIds], sampling: Sampling, edit: Edit) -> Measurement:
    """The same of what the model says, to prompts of which every other one has begun to think."""
    opening, _ = _marks(backend.tokenizer)
    begun = [(*prompt, *opening) if row % 2 else prompt for row, prompt in enumerate(prompts)]
    made = backend.generate(begun, sampling, [edit], _reads(edit))
    return _by_hand(backend, TokenBatch.of(begun, made.responses), edit, made.reads)


def _reads(edit: Edit) -> tuple[Read, ...]:
    return Read(ReadKind(f"{edit.positions}_mean")), Read(ReadKind.ACTIVATIONS)


def _by_hand(backend: Backend, text: TokenBatch, edit: Edit, got: Mapping[str, Tensor]) -> Measurement:
    assert isinstance(edit.positions, Positions)
    parts, mask = Parts.of(backend.tokenizer), pad_left(text, 0).response
    for row, (prompt, response) in enumerate(zip(text.prompts, text.responses, strict=True)):
        mine = [part is KINDS[edit.positions] for part in parts.of_response(prompt, response)]
        mask[row, mask.shape[1] - len(mine) :] = torch.tensor(mine, dtype=torch.bool)
    every = backend.forward(text, [replace(edit, positions=mask)], [Read(ReadKind.ACTIVATIONS)]).reads["activations"]
    total = (every.nan_to_num() * mask[:, None, :, None]).sum(dim=2)
    count = torch.where(mask.any(dim=1), mask.sum(dim=1).float(), torch.nan)
    want = {f"{edit.positions}_mean": total / count[:, None, None], "activations": every}
    error, where = reads_differ(got, want)
    return error, f"{where}; {int(mask.sum())} tokens"


def _marks(tokenizer: Any) -> tuple[TokenIds, TokenIds]:
    """What thinking begins and ends with; nothing for a model that never thinks."""
    found = Parts.of(tokenizer).marks
    if not found:
        return (), ()
    first = found[0][0]
    marks = (THOUGHTS[first], ANSWERS[first]) if first in THOUGHTS else found[0]
    opening, closing = (tuple(tokenizer.encode(mark, add_special_tokens=False)) for mark in marks)
    return opening, closing
