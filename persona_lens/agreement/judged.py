"""Responses scored by another judge than the one that scored them first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from persona_lens.agreement.scored import AgreementError, Scored
from persona_lens.files import PART, named, read_bytes, remove, write_bytes
from persona_lens.judging import Exchange, Judge, check_scored, judge_exchanges
from persona_lens.progress import Progress, shown_progress
from persona_lens.runs import RunFolder

WORKING = ".working"


def judge_scored(
    judge: Judge, responses: Sequence[Scored], file: Path | None = None, progress: Progress = shown_progress
) -> list[Scored]:
    """Score responses, whatever scores they have.

    Args:
        judge: Who scores.
        responses: What is scored; equal ones once.
        file: A JSONL file to write, which `read_scored` reads; None writes nothing. While the work lasts, what is done
            is kept in a folder beside it, from which the same call goes on.
        progress: Told how far the work is.

    Returns:
        The responses with the judge's scores, each response once.

    Raises:
        AgreementError: If the file is there already.
        JudgingError: If no response got a score.
    """
    working = file.with_name(file.name + WORKING) if file is not None else None
    if working is not None:
        with named(working, AgreementError, "removed"):
            remove(working.with_name(working.name + PART))  # of a call that was stopped at its very end
    if file is not None and file.exists() and not (working is not None and working.exists()):
        raise _there_already(file)
    unique = list({each.id: each for each in responses}.values())
    exchanges = [Exchange(each.question, each.response) for each in unique]
    config = {"kind": "judging", "judge": judge.describe(), "responses": [each.id for each in unique]}
    with RunFolder(working, config) if working is not None else nullcontext() as run:
        judged = judge_exchanges(judge, exchanges, run, progress=progress)
        check_scored(judged)
        rows = [
            {
                "question": each.question,
                "response": each.response,
                "score": judgement.trait.value,
                "reason": judgement.trait.reason,
                "method": judgement.trait.method,
                "coherence": judgement.coherence.value if judgement.coherence else None,
            }
            for each, judgement in zip(unique, judged, strict=True)
        ]
        if run is not None and file is not None:
            content = read_bytes(run.write_lines(file.name, rows), AgreementError)
            if not file.exists():
                write_bytes(file, content, new=True, failed=AgreementError)
            elif read_bytes(file, AgreementError) != content:
                raise _there_already(file)
    if working is not None:
        with named(working, AgreementError, "removed"):
            remove(working.rename(working.with_name(working.name + PART)))
    return [
        Scored(each.id, each.question, each.response, judgement.trait.value, judgement.trait.reason, each.labels)
        for each, judgement in zip(unique, judged, strict=True)
    ]


def _there_already(file: Path) -> AgreementError:
    return AgreementError(f"{file} is there already; choose another file, or remove it to judge again")
