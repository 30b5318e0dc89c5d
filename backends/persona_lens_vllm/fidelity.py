"""Whether what was to be done with a call was done: every position read once, every edit made, nothing skipped.

An engine that was made to be fast may run a compiled copy of a model, replay a graph, or go on from a cache, and then
no hook is called, silently. So the workers count what they do, and here it is compared with what had to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persona_lens.backend import BackendError
from persona_lens.backend.reads import OF_RESPONSES
from persona_lens_vllm.worker import Order, Outcome

_FURTHEST = 2**40


class FidelityError(BackendError):
    """The engine did not run a call as it had to be; what it found is not used."""


def check_outcome(order: Order, outcome: Outcome, lengths: Sequence[int], partly: Sequence[int] = ()) -> None:
    """Raise `FidelityError` unless everything was done.

    Args:
        order: What had to be done.
        outcome: What a worker did.
        lengths: Tokens of each row that had to be computed: of its prompt and response.
        partly: Rows whose reads are not used.
    """
    done, call = outcome.tallies, order.call
    rows = range(len(lengths))
    missed = [layer for layer, tokens in done.blocks.items() if tokens != done.tokens]
    if missed:
        _raise(f"blocks {', '.join(map(str, missed))} ran without being read or edited in some pass")
    if outcome.foreign:
        _raise(f"{_rows(outcome.foreign)} went on from a cache that was computed under other edits")
    if short := [row for row in rows if done.began[row] < 0 or done.computed[row] < lengths[row]]:
        _raise(f"{_rows(short)} were not computed to their end")
    whole = call.watched is not None or any(read["kind"] not in OF_RESPONSES for read in call.reads)
    if late := [row for row in rows if whole and done.began[row] > 0]:
        _raise(f"{_rows(late)} went on from a cache although their beginning was to be read")
    for number, edit in enumerate(_here(order, done.blocks)):
        wanted = torch.tensor([_positions(edit, order, row, outcome) for row in rows])
        made = done.edited.get(number, torch.zeros_like(wanted))
        if wrong := [row for row in rows if wanted[row] != made[row]]:
            _raise(
                f"{_rows(wrong)}: an edit at layer {edit['layer']} was made at {int(made[wrong[0]])} positions of row "
                f"{wrong[0]} instead of {int(wanted[wrong[0]])}"
            )
    for read in call.reads:
        counts = outcome.reads.get(read["kind"], {}).get("counts")
        if counts is not None:
            _check_counts(read, counts, call.prompts, lengths, partly)


def _here(order: Order, blocks: dict[int, int]) -> list[dict[str, Any]]:
    return [edit for edit in order.call.edits if edit["layer"] in blocks]


def _raise(what: str) -> None:
    raise FidelityError(
        f"{what}; nothing of this call is used. Open the model with enforce_eager=True, and if that is so, report it "
        "with the version of vLLM and the model"
    )


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:5]))
    return f"row{'s' * (len(rows) > 1)} {shown}{' …' * (len(rows) > 5)}"


def _check_counts(
    read: dict[str, Any], counts: Tensor, prompts: Sequence[int], lengths: Sequence[int], partly: Sequence[int]
) -> None:
    """Compare how many tokens a reduction is of; attention sinks may be left out of some."""
    kind, prompt = read["kind"], torch.tensor(prompts)
    response = torch.tensor(lengths) - prompt
    wanted = {"prompt_last": torch.ones_like(prompt), "prompt_mean": prompt}.get(kind, response)
    wrong = (counts != wanted.unsqueeze(1)) if read["sinks"] else (counts > wanted.unsqueeze(1))
    wrong[list(partly)] = False
    if bool(wrong.any()):
        row = int(wrong.any(dim=1).nonzero()[0])
        of = int(counts[row][wrong[row]][0])
        _raise(f"{kind} of row {row} is of {of} tokens instead of {int(wanted[row])}")


def _positions(edit: dict[str, Any], order: Order, row: int, outcome: Outcome) -> int:
    """How many of the positions that were computed are among those of an edit."""
    began, computed = int(outcome.tallies.began[row]), int(outcome.tallies.computed[row])
    prompt, text = order.call.prompts[row], order.call.texts[row]
    kind, span = edit["positions"], edit["span"]
    if isinstance(kind, Tensor):
        given = kind[row, kind.shape[1] - text :]
        return int(given[began : max(began, computed)].sum())
    first = {"response": prompt, "generating": prompt - 1}.get(kind, 0)
    last = prompt if kind == "prompt" else _FURTHEST
    if span is not None:
        start, stop = span
        begin = first + (start if start >= 0 else prompt + start)
        end = _FURTHEST if stop is None else first + (stop if stop >= 0 else prompt + stop)
        first, last = max(first, begin), min(last, end)
    return max(0, min(last, computed) - max(first, began))
