"""`screen`: datasets are scored row by row into a run folder, and then summed up, flagged and split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lens.backend import Backend, Parts, Read, TokenBatch
from persona_lens.backend.parts.asked import limited_for
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.data.datasets import Dataset
from persona_lens.judging import Judge
from persona_lens.judging.recording import as_used, prepare_judge
from persona_lens.models.chat import chat_format, note_reasoning
from persona_lens.monitoring import Panel
from persona_lens.reports.result import Result
from persona_lens.runs import RunFolder
from persona_lens.runs.chunks import is_signed, signed
from persona_lens.runs.cost import Work, generating_work, reading_work
from persona_lens.screening.findings import Findings, sum_up, write_rows
from persona_lens.screening.rows import SCORES
from persona_lens.screening.samples import BaseResponses, Counted, ScreeningError, ScreeningSettings, windows_of
from persona_lens.screening.scoring import MEANS, Job, Reading, Scorer, Unit
from persona_lens.screening.survey import Flagging, Survey

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat

SUMMARY = "summary.json"
ROWS, TOKENS = "screening rows", "tokens read"


@dataclass(frozen=True, repr=False, eq=False)
class Screening(Result):
    """A finished screening, whose rows are those of ``results.parquet``.

    Attributes:
        folder: The run folder, with ``results.parquet``, ``rejects.jsonl`` and the split files.
        summary: See `Result`.
        scored: Rows that were scored or rejected by this call; those of an earlier, interrupted one are left out.
        tokens: Tokens that the model ran over for them.
        seconds: How long that took.
    """

    kind = "screening"
    folder: Path
    summary: Mapping[str, Any]
    scored: int
    tokens: int
    seconds: float


def screen(
    backend: Backend,
    datasets: Sequence[Dataset],
    panel: Panel,
    settings: ScreeningSettings | None = None,
    *,
    folder: Path | str,
    reference: Sequence[Dataset] = (),
    flagging: Flagging | None = None,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
    progress: Progress = shown_progress,
) -> Screening:
    """Say what datasets would do to a model's character (method, section 7).

    Memory grows by some dozens of bytes for each row. A run that was stopped goes on with the same call, and ends with
    the same bytes.

    Args:
        backend: The model, before it is trained on any of this.
        datasets: What is screened.
        panel: The traits, each at its layers.
        settings: How rows are scored; by default raw projections of the last answer.
        folder: Run folder.
        reference: Clean datasets, from which thresholds are taken.
        flagging: How rows are ranked and flagged.
        judges: By trait: asked for a second opinion on the flagged rows.
        chat: Chat format; by default the model's own.
        progress: Told the rows that are done, and the tokens that were run over.

    Raises:
        ScreeningError: If something asked for cannot be done, or a dataset cannot be read at all.
        VectorsError: If vectors belong to another model.
        RunError: If the folder holds another run.
    """
    settings, flagging, judges = settings or ScreeningSettings(), flagging or Flagging(), judges or {}
    flagging = replace(flagging, score=flagging.resolved_score(settings))
    everything = _checked(backend, datasets, reference, panel, settings, judges)
    chat = chat or chat_format(backend)
    if settings.base is BaseResponses.GENERATE:
        note_reasoning(chat)
    labelled = any(dataset.label for dataset in everything)
    whole = panel.with_random_directions(flagging.random_directions if labelled else 0)
    scorer = Scorer(backend, chat, whole, settings)
    about = {"model": asdict(backend.info), "settings": settings.to_json(), "flagging": flagging.to_json()}
    with RunFolder(folder, {**about, **_config(scorer, everything, len(reference), judges)}) as run:
        for trait, judge in judges.items() if not (run.path / SUMMARY).exists() else ():
            prepare_judge(judge, run, f"{trait}-")
        course = _score(run, scorer, everything, progress)
        findings = Findings.of(Survey(run, everything, len(reference), len(whole.gauges)), panel, flagging)
        figures, decisions, opinions = sum_up(findings, whole, flagging, judges, progress)
        generated, subsets = settings.base is BaseResponses.GENERATE, flagging.subsets
        write_rows(findings, decisions, opinions, whole, generated=generated, subsets=subsets)
        used = {trait: as_used(judges[trait].describe(), said.values()) for trait, said in opinions.items()}
        summary = {**about, "judges": used, **figures}
        run.write_json(SUMMARY, summary)
    return Screening(Path(folder), plain(summary), *course)


def _config(
    scorer: Scorer, datasets: Sequence[Dataset], references: int, judges: Mapping[str, Judge]
) -> dict[str, Any]:
    return {
        "kind": "screening",
        "chat": scorer.chat.digest,
        "gauges": [[str(gauge), gauge.vectors.content_hash, gauge.reduction] for gauge in scorer.panel.gauges],
        "datasets": [dataset.describe() for dataset in datasets],
        "reference": references,
        "judges": {trait: judge.describe() for trait, judge in judges.items()},
    }


def screening_work(
    backend: Backend,
    datasets: Sequence[Dataset],
    panel: Panel,
    settings: ScreeningSettings | None = None,
    *,
    reference: Sequence[Dataset] = (),
    chat: ChatFormat | None = None,
) -> tuple[Work, ...]:
    """What a screening would ask of the model; the datasets are read and encoded, nothing runs."""
    settings = settings or ScreeningSettings()
    everything = _checked(backend, datasets, reference, panel, settings, {})
    scorer = Scorer(backend, chat or chat_format(backend), panel, settings)
    reading, generating = Work("reading", 0, 0, 0), Work("base responses", 0, 0, 0)
    means = (Read(MEANS[settings.part], panel.layers),)
    for window in windows_of(everything, settings.look_ahead):
        batches = scorer.plan(window).batches
        passes = [TokenBatch.of([text.ids for _, text in each.texts]) for each in batches if isinstance(each, Reading)]
        calls = [(*scorer.asked(each), (), means) for each in batches if not isinstance(each, Reading)]
        reading += reading_work(reading.label, backend, passes, [panel.read])
        generating += generating_work(generating.label, backend, calls)
    return (reading, generating) if generating.calls else (reading,)


def _checked(
    backend: Backend,
    datasets: Sequence[Dataset],
    reference: Sequence[Dataset],
    panel: Panel,
    settings: ScreeningSettings,
    judges: Mapping[str, Judge],
) -> tuple[Dataset, ...]:
    """The datasets, those of the reference behind the others."""
    limited_for(backend.tokenizer, settings.thinking_budget)  # raises for thinking that the model never does
    if not datasets:
        raise ScreeningError("there is no dataset to screen; give at least one")
    panel.check_model(backend)
    supplied = settings.base is BaseResponses.SUPPLIED
    for dataset in (*datasets, *reference):
        if supplied != (dataset.base is not None):
            raise ScreeningError(
                f"{dataset.name} {'has no' if supplied else 'comes with'} base responses, though they are "
                f"{'to be supplied' if supplied else 'not asked for'}"
            )
    generated = settings.base is BaseResponses.GENERATE
    if generated and settings.part is Counted.THINKING and not Parts.of(backend.tokenizer).thinks:
        raise ScreeningError(
            "base responses of this model hold no thinking, since its vocabulary and chat template have no marks of "
            "any; count its answers, or take no base responses"
        )
    if judges and not reference:
        raise ScreeningError("a judge is asked about flagged rows, and nothing is flagged without a reference set")
    return (*datasets, *reference)


def _score(run: RunFolder, scorer: Scorer, datasets: Sequence[Dataset], progress: Progress) -> tuple[int, int, float]:
    """Score what is not scored yet; rows, tokens and seconds of that."""
    done, ran, last = 0, 0, None
    for line, unit in run.each_line(SCORES):
        if not is_signed(unit, SCORES) or not _follows(unit, last):
            raise run.damaged(SCORES, line, below=True)
        done += _finished(unit, scorer.settings)
        ran += unit["ran"]
        last = unit
    counts = [dataset.count() for dataset in datasets]
    total = None if None in counts else sum(count for count in counts if count is not None)
    rows, tokens, begun = 0, 0, time.perf_counter()
    progress(done, total, ROWS)
    jobs = _jobs(datasets, scorer.settings.look_ahead, last)
    for units in scorer.each(jobs):
        for unit in units:
            run.append(SCORES, [signed(unit, SCORES)])
            rows += _finished(unit, scorer.settings)
            tokens += unit["ran"]
            progress(done + rows, total, ROWS)
            progress(ran + tokens, None, TOKENS)
    return rows, tokens, time.perf_counter() - begun


def _place_after(last: Unit | None) -> tuple[int, int, int]:
    """Dataset, window and number of the unit behind another; a dataset that is through has no further window."""
    if last is None:
        return 0, 0, 0
    if last["unit"] + 1 < last["of"]:
        return last["dataset"], last["window"], last["unit"] + 1
    return last["dataset"], last["window"] + 1, 0


def _follows(unit: Unit, last: Unit | None) -> bool:
    """Whether a unit is the one that was to be saved behind another; a dataset may have no rows at all."""
    place, expected = (unit["dataset"], unit["window"], unit["unit"]), _place_after(last)
    return place == expected or (expected[2] == 0 and place[0] > expected[0] and place[1:] == (0, 0))


def _finished(unit: Unit, settings: ScreeningSettings) -> int:
    """How many rows a unit finishes; base responses come last of all."""
    if unit["kind"] == "rows":
        return sum("problem" in row for row in unit["rows"])
    return len({row["row"] for row in unit["rows"]}) if unit["kind"] == "own" else 0


def _jobs(datasets: Sequence[Dataset], size: int, last: Unit | None) -> Iterator[Job]:
    """Every window but for those that are whole; the first may be there in part."""
    dataset, window, skip = _place_after(last)
    for found in windows_of(datasets, size, (dataset, window)):
        yield found, skip
        skip = 0
