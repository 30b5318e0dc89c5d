"""Whether what was to be done with a call was done: every position read once, every edit made, nothing skipped.

An engine that was made to be fast may run a compiled copy of a model, replay a graph, or go on from a cache, and then
no hook is called, silently. So whoever runs a call counts what it does, and here it is compared with what had to be
done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend.packed.call import PackedCall
from persona_lens.backend.packed.masks import Tallies
from persona_lens.backend.parts.masks import part_of
from persona_lens.backend.protocol import BackendError
from persona_lens.backend.reads import OF_RESPONSES

_FURTHEST = 2**40


class FidelityError(BackendError):
    """A call was not run as it had to be; what it found is not used."""


def check_done(
    call: PackedCall,
    done: Tallies,
    reads: Mapping[str, Mapping[str, Tensor]],
    lengths: Sequence[int],
    partly: Sequence[int] = (),
    kinds: Sequence[bytes] | None = None,
) -> None:
    """Raise `FidelityError` unless everything was done.

    Args:
        call: What had to be done.
        done: What was.
        reads: What was read, see `persona_lens.backend.packed.intervention.PackedIntervention.results`.
        lengths: Tokens of each row that had to be computed: of its prompt and response.
        partly: Rows whose reads are not used.
        kinds: For each row what its tokens are, a value of `persona_lens.backend.parts.machine.Part` for each; None
            where it is not known here, or does not matter.
    """
    rows = range(len(lengths))
    found = [] if done.kinds is None else [bytes(row) for row in done.kinds.tolist()]
    for row, known in enumerate(kinds or ()):
        if found[row][: len(known)] != known:
            raise FidelityError(f"tokens of row {row} were taken for thinking that are answer, or for answer")
    missed = [layer for layer, tokens in done.blocks.items() if tokens != done.tokens]
    if missed:
        raise FidelityError(f"blocks {', '.join(map(str, missed))} ran without being read or edited in some pass")
    if short := [row for row in rows if done.began[row] < 0 or done.computed[row] < lengths[row]]:
        raise FidelityError(f"{rows_in_short(short)} were not computed to their end")
    whole = call.watched is not None or any(read["kind"] not in OF_RESPONSES for read in call.reads)
    if late := [row for row in rows if whole and done.began[row] > 0]:
        raise FidelityError(f"{rows_in_short(late)} went on from a cache although their beginning was to be read")
    for number, edit in enumerate(edit for edit in call.edits if edit["layer"] in done.blocks):
        wanted = torch.tensor([_positions(edit, call, row, done, found) for row in rows])
        made = done.edited.get(number, torch.zeros_like(wanted))
        if wrong := [row for row in rows if wanted[row] != made[row]]:
            raise FidelityError(
                f"{rows_in_short(wrong)}: an edit at layer {edit['layer']} was made at {int(made[wrong[0]])} positions "
                f"of row {wrong[0]} instead of {int(wanted[wrong[0]])}"
            )
    for read in call.reads:
        counts = reads.get(read["kind"], {}).get("counts")
        if counts is not None:
            _check_counts(read, counts, call.prompts, lengths, partly, found)


def rows_in_short(rows: Sequence[int]) -> str:
    """The first of some rows, by their numbers."""
    shown = ", ".join(map(str, rows[:5]))
    return f"row{'s' * (len(rows) > 1)} {shown}{' …' * (len(rows) > 5)}"


def _check_counts(
    read: dict[str, Any],
    counts: Tensor,
    prompts: Sequence[int],
    lengths: Sequence[int],
    partly: Sequence[int],
    found: Sequence[bytes],
) -> None:
    """Compare how many tokens a reduction is of; attention sinks may be left out of some."""
    kind, prompt = read["kind"], torch.tensor(prompts)
    response = torch.tensor(lengths) - prompt
    if found and (part := part_of(kind)) is not None:
        response = torch.tensor([row[:length].count(part) for row, length in zip(found, lengths, strict=True)])
    wanted = {"prompt_last": torch.ones_like(prompt), "prompt_mean": prompt}.get(kind, response)
    wrong = (counts != wanted.unsqueeze(1)) if read["sinks"] else (counts > wanted.unsqueeze(1))
    wrong[list(partly)] = False
    if bool(wrong.any()):
        row = int(wrong.any(dim=1).nonzero()[0])
        of = int(counts[row][wrong[row]][0])
        raise FidelityError(f"{kind} of row {row} is of {of} tokens instead of {int(wanted[row])}")


def _positions(edit: dict[str, Any], call: PackedCall, row: int, done: Tallies, found: Sequence[bytes]) -> int:
    """How many of the positions that were computed are among those of an edit."""
    began, computed = int(done.began[row]), int(done.computed[row])
    prompt, text = call.prompts[row], call.texts[row]
    kind, span = edit["positions"], edit["span"]
    if isinstance(kind, Tensor):
        given = kind[row, kind.shape[1] - text :]
        return int(given[began : max(began, computed)].sum())
    if found and (part := part_of(kind)) is not None:
        of_part = [at for at, each in enumerate(found[row]) if each == part]
        return sum(began <= at < computed for at in (of_part if span is None else of_part[slice(*span)]))
    first = {"response": prompt, "answer": prompt, "generating": prompt - 1}.get(kind, 0)
    last = prompt if kind == "prompt" else _FURTHEST
    if span is not None:
        start, stop = span
        begin = first + (start if start >= 0 else prompt + start)
        end = _FURTHEST if stop is None else first + (stop if stop >= 0 else prompt + stop)
        first, last = max(first, begin), min(last, end)
    return max(0, min(last, computed) - max(first, began))
