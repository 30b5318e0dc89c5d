"""Where scored responses come from: run folders, tables, the reference implementation's files, people's ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.core.documents import json_lines
from persona_lens.core.files import PART, named, read_bytes, remove, write_bytes
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.data.tables import read_rows, row_key
from persona_lens.judging.blind import (
    RATING,
    REFUSAL,
    AgreementError,
    Scored,
    from_cell,
    is_response_id,
    parse_score,
    read_back,
    response_id,
)
from persona_lens.judging.protocol import Exchange, Judge, Judgement
from persona_lens.runs import RunFolder

if TYPE_CHECKING:
    from persona_lens.runs.cost import Work

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
    from persona_lens.judging.recording import check_scored, judge_exchanges  # which imports torch

    unique, exchanges = _asked(responses)

    def judged(run: RunFolder | None) -> list[Judgement]:
        found = judge_exchanges(judge, exchanges, run, progress=progress)
        check_scored(found)
        return found

    if file is None:
        found = judged(None)
    else:
        working = file.with_name(file.name + WORKING)
        stopped = working.with_name(working.name + PART)
        with named(working, AgreementError, "removed"):
            remove(stopped)  # of a call that was stopped at its very end
        if file.exists() and not working.exists():
            raise _there_already(file)
        config = {"kind": "judging", "judge": judge.describe(), "responses": [each.id for each in unique]}
        with RunFolder(working, config) as run:
            found = judged(run)
            content = json_lines(_row(each, judgement) for each, judgement in zip(unique, found, strict=True))
            if not file.exists():
                write_bytes(file, content, new=True, failed=AgreementError)
            elif read_bytes(file, AgreementError) != content:
                raise _there_already(file)
        with named(working, AgreementError, "removed"):
            remove(working.rename(stopped))
    scores = [judgement.trait for judgement in found]
    return [replace(each, score=score.value, reason=score.reason) for each, score in zip(unique, scores, strict=True)]


def scoring_work(judge: Judge, responses: Sequence[Scored]) -> tuple[Work, ...]:
    """What `judge_scored` would ask; nothing runs."""
    from persona_lens.judging.recording import judging_work

    return judging_work(judge, _asked(responses)[1])


def _asked(responses: Sequence[Scored]) -> tuple[list[Scored], list[Exchange]]:
    """Equal responses once, and what a judge is shown of each."""
    unique = list({each.id: each for each in responses}.values())
    return unique, [Exchange(each.question, each.response) for each in unique]


def _row(response: Scored, judgement: Judgement) -> dict[str, Any]:
    coherence = judgement.coherence.value if judgement.coherence else None
    texts = {"question": response.question, "response": response.response}
    score = judgement.trait
    return {**texts, "score": score.value, "reason": score.reason, "method": score.method, "coherence": coherence}


def _there_already(file: Path) -> AgreementError:
    return AgreementError(f"{file} is there already; choose another file, or remove it to judge again")


SCORE = "score"
ROLLOUTS, SCORES = "rollouts.jsonl", "scores.jsonl"
RESPONSES = ("response", "answer")
# The columns of a per-response file of the reference implementation (safety-research/persona_vectors) besides the
# trait's.
REFERENCE = frozenset({"question", "prompt", "answer", "question_id"})
COHERENCE = "coherence"
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
NOT_RATED, NO_SCORE = "not rated", "no score"

NumberedRow = tuple[int, Mapping[str, Any]]


def read_scored(path: Path | str, *, column: str | None = None, scores_required: bool = True) -> list[Scored]:
    """Read responses with their scores.

    Args:
        path: One of: the run folder of an extraction, or its ``scores.jsonl``; the folder of a sweep, or its
            ``NAME-scores.jsonl``; a table (JSONL, CSV or Parquet) with the columns ``question``, ``response`` or
            ``answer``, and ``score``; a per-response CSV file of the reference implementation; a table of
            `persona_lens.judging.agreement.write_blinded` that people have filled in, as a spreadsheet saved it.
        column: The column that holds the score, if it is not ``score`` (in people's tables ``rating``). In a file of
            the reference implementation it need not be given if one column is neither its own nor ``coherence``.
        scores_required: Whether a table without scores, or a run that has none yet, is refused.

    Raises:
        AgreementError, DataError: If there is no such source, or something in it is not as it should be; with the file
            and the line where there is one.
    """
    path = Path(path)
    if path.is_dir() or path.name == SCORES or path.name.endswith(f"-{SCORES}"):
        found = _read_run(path, column or SCORE, scores_required)
    else:
        found = _read_table(path, column, scores_required)
    if not found:
        raise AgreementError(f"{path} holds no responses")
    return found


def _read_run(path: Path, column: str, scores_required: bool) -> list[Scored]:
    """A run's responses; they and their scores go by the number that each has in the run's plan."""
    folder, name = (path, _scores_in(path)) if path.is_dir() else (path.parent, path.name)
    rollouts, scores = folder / f"{name.removesuffix(SCORES)}{ROLLOUTS}", folder / name
    if not rollouts.exists():
        if not path.is_dir():  # somebody's table that happens to have that name
            return _read_table(path, None if column == SCORE else column, scores_required)
        raise AgreementError(f"{folder} has no {rollouts.name}, which holds the responses of its {scores.name}")
    made = _by_number(rollouts)
    if not scores.exists():
        if scores_required:
            raise AgreementError(f"{folder} has no {scores.name}: the command that began this run goes on with it")
        return [_scored(row, None, "not scored yet") for _, row in made.values()]
    judged = _by_number(scores)
    if judged.keys() != made.keys():
        raise AgreementError(
            f"{scores} ({len(judged)} rows) is not a score for each of the {len(made)} responses of {rollouts.name}"
        )
    found = []
    for number, (_, rollout) in made.items():
        line, row = judged[number]
        if any(row[text] != rollout.get("response") for text in ("response", "text") if text in row):
            raise AgreementError(f"{scores}:{line}: the response is another one than in the run's rollouts")
        if column not in row:
            raise AgreementError(f"{scores}:{line}: there is no column {column!r}; there are {', '.join(row)}")
        score, refused = parse_score(row[column], f"{scores}:{line}, {column}")
        found.append(_scored(rollout, score, REFUSAL if refused else str(row.get("reason") or NO_SCORE)))
    return found


def _by_number(file: Path) -> dict[Any, NumberedRow]:
    return {row_key(file, line, row, ("row",), AgreementError): (line, row) for line, row in read_rows(file)}


def _scores_in(folder: Path) -> str:
    """The name of a run folder's scores."""
    if (folder / ROLLOUTS).exists():
        return SCORES
    names = [file.name.removesuffix(ROLLOUTS) + SCORES for file in sorted(folder.glob(f"*-{ROLLOUTS}"))]
    if len(names) == 1:
        return names[0]
    inside = ", ".join(str(file.parent) for file in sorted(folder.glob(f"*/*{ROLLOUTS}"))[:5])
    hint = (
        f"give one of its {', '.join(names)}" if names else f"give a folder in it, such as {inside}" if inside else ""
    )
    raise AgreementError(f"{folder} is no run folder with one set of responses{'; ' if hint else ''}{hint}")


def _scored(rollout: Mapping[str, Any], score: float | None, reason: str) -> Scored:
    question, response = str(rollout.get("question", "")), str(rollout.get("response", ""))
    labels = {name: rollout[name] for name in rollout if name not in ("question", "response", "response_ids")}
    return Scored(response_id(question, response), question, response, score, reason if score is None else None, labels)


def _read_table(path: Path, column: str | None, scores_required: bool) -> list[Scored]:
    if path.suffix.lower() in SPREADSHEETS:
        raise AgreementError(f"{path} is a spreadsheet; save the sheet as CSV (UTF-8) and give that file")
    if path.suffix.lower() in (".csv", ".tsv", ".txt") and path.is_file():
        rows = read_back(path)
        if rows and _filled_in(rows):
            return _read_ratings(path, rows, column, scores_required)
    rows = list(read_rows(path))
    if _filled_in(rows):
        return _read_ratings(path, rows, column, scores_required)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    response = next((name for name in RESPONSES if name in names), None)
    if "question" not in names or response is None:
        raise AgreementError(
            f"{path}: the columns question and response (or answer) are needed; there are {', '.join(names)}"
        )
    chosen = _score_column(path, rows, names, column, scores_required)
    return [_from_table(path, line, row, response, chosen) for line, row in rows]


def _filled_in(rows: Sequence[NumberedRow]) -> bool:
    """Whether rows are those of a table for people: they go by the ids that it was written with."""
    return any(is_response_id(row.get("id")) for _, row in rows)


def _score_column(
    path: Path, rows: Sequence[NumberedRow], names: Sequence[str], column: str | None, scores_required: bool
) -> str | None:
    if column is not None:
        if column not in names:
            raise AgreementError(f"{path}: there is no column {column!r}; there are {', '.join(names)}")
        return column
    if chosen := next((name for name in (SCORE, RATING) if name in names), None):
        return chosen
    others = [name for name in names if name not in REFERENCE | {COHERENCE}]
    candidates = [name for name in others if all(_is_score(row.get(name)) for _, row in rows)]
    if set(names) >= REFERENCE and len(candidates) == 1:
        return candidates[0]
    if not scores_required:
        return None
    listed = ", ".join(candidates or names)
    raise AgreementError(f"{path}: there is no column score; name the one that holds the scores (columns: {listed})")


def _is_score(value: object) -> bool:
    try:
        parse_score(value, "")
    except AgreementError:
        return False
    return True


def _from_table(path: Path, line: int, row: Mapping[str, Any], response_column: str, column: str | None) -> Scored:
    question, response = row.get("question"), row.get(response_column)
    if not isinstance(question, str) or not question.strip():
        raise AgreementError(f"{path}:{line}: the question is missing or no text")
    if response is not None and not isinstance(response, str):
        raise AgreementError(f"{path}:{line}: the {response_column} is no text: {response!r:.40}")
    response = response or ""
    value = None if column is None else row.get(column)
    score, refused = parse_score(value, f"{path}:{line}, {column}")
    # The reference implementation leaves a cell empty where its judge named no number, which it takes for a refusal.
    refused = refused or (score is None and row.keys() >= REFERENCE and column is not None)
    reason = None if score is not None else REFUSAL if refused else str(row.get("reason") or NO_SCORE)
    labels = {name: row[name] for name in row if name not in ("question", response_column, column, "reason")}
    return Scored(response_id(question, response), question, response, score, reason, labels)


def _read_ratings(path: Path, rows: Sequence[NumberedRow], column: str | None, scores_required: bool) -> list[Scored]:
    column = column or RATING
    if not any(column in row for _, row in rows):  # names of columns are in lower case there
        column = column.lower()
    if scores_required and not any(column in row for _, row in rows):
        raise AgreementError(f"{path}: there is no column {column!r}; there are {', '.join(rows[0][1])}")
    found = []
    for line, row in rows:
        if not is_response_id(row.get("id")):
            raise AgreementError(
                f"{path}:{line}: {row.get('id')!r} is not an id as `judge sample` writes them; restore the column id"
            )
        score, refused = parse_score(row.get(column), f"{path}:{line}, {column}")
        reason = None if score is not None else REFUSAL if refused else NOT_RATED
        question, response = (from_cell(str(row.get(name) or "")) for name in ("question", "response"))
        found.append(Scored(row["id"].strip().lower(), question, response, score, reason))
    return found
