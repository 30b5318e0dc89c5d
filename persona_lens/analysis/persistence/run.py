"""`persist`: the same conversations held in every way to steer, and what each keeps of the trait and of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lens.analysis.persistence.outcomes import Outcome, TurnRow, pairs_of
from persona_lens.analysis.persistence.plan import KIND, Plan
from persona_lens.analysis.persistence.settings import PersistSettings
from persona_lens.analysis.persistence.ways import Way
from persona_lens.backend import Backend
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.data.scripted import Scripted
from persona_lens.extraction.experiment import Answer, run_folder
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.reports.result import Answered
from persona_lens.runs.cost import Work
from persona_lens.vectors import PersonaVectors

SCORES = "turns-scores.jsonl"
LONGEST_SHOWN = 600  # characters of a reply in the summary


@dataclass(frozen=True, repr=False, eq=False)
class Persistence(Answered[TurnRow]):
    """What was found.

    Attributes:
        answers: Every reply, once for each trait that it was scored for.
        outcomes: By trait.
        summary: See `persona_lens.reports.result.Result`.
        folder: See `persona_lens.reports.result.Result`.
    """

    kind = KIND
    answers: tuple[TurnRow, ...]
    outcomes: Mapping[str, Outcome]
    summary: Mapping[str, Any]
    folder: Path | None = None


def persist(
    backend: Backend,
    vectors: Mapping[str, PersonaVectors],
    settings: PersistSettings | None = None,
    *,
    users: Sequence[Scripted] | None = None,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
    folder: Path | str | None = None,
    progress: Progress = shown_progress,
) -> Persistence:
    """Hold the same conversations in every way to steer, and measure each turn.

    Measured are the trait score of every reply (the judge sees it with the message it answers), its surprise under the
    unsteered model given all that was said before, its projection, and after some turns the probability of right
    answers to known questions in the steered conversation. Random directions and a system prompt stand beside.

    Args:
        backend: The model.
        vectors: Of the traits that are steered towards, by name.
        settings: See `PersistSettings`.
        users: Who talks; the built-in scripted users by default.
        judges: Who scores each trait; by default the same model, unsteered, by likelihood as it was calibrated when the
            trait's vectors were extracted.
        chat: Chat format; the model's own by default.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        progress: Told how far the work is.

    Raises:
        AnalysisError: If there are no vectors.
        ContextError: If conversations might become too long for the model.
        DataError: If there are too few scripted users.
        VectorsError: If vectors belong to another model, carry no calibration, or nothing was tuned and no layer named.
    """
    planned = Plan.of(backend, vectors, settings or PersistSettings(), users, judges, chat)
    planned.check()  # what cannot be run must not claim the folder
    with run_folder(folder, planned.config()) as run:
        planned.prepare(run)
        aims = planned.aimed(run, progress)
        turns = planned.held(aims, run, progress)
        outcomes, used = planned.outcomes(aims, turns, run, progress)
        summary = summary_of(planned, outcomes, used)
        answers = tuple(row for each in outcomes.values() for row in each.rows)
        if run is not None:
            run.write_rows(SCORES, map(Answer.to_row, answers))
            run.write_json("summary.json", summary)
    return Persistence(answers, outcomes, plain(summary), run.path if run else None)


def persist_work(
    backend: Backend,
    vectors: Mapping[str, PersonaVectors],
    settings: PersistSettings,
    *,
    users: Sequence[Scripted] | None = None,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
) -> tuple[Work, ...]:
    """What `persist` would ask of the model, and of the judges', were every reply as long as it may be."""
    return tuple(Plan.of(backend, vectors, settings, users, judges, chat, planned=True).work())


def summary_of(plan: Plan, outcomes: Mapping[str, Outcome], used: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure that is shown."""
    return {
        **{name: value for name, value in plan.config().items() if name != "traits"},
        "conversations": len(plan.users),
        "known_after": list(plan.settings.known_after),
        "domains": list(dict.fromkeys(user.domain for user in plan.users)),
        "judges": dict(used),
        "traits": {
            name: {
                "description": each.aim.trait.description,
                "vectors": each.aim.vectors.content_hash,
                "steering": str(each.aim.steering),
                "layer": each.aim.layer,
                "coefficient": each.aim.coefficient,
                "towards": each.aim.towards,
                "target": each.aim.target,
                "gate": each.aim.gate,
                "system": each.aim.system(Way.PROMPTED),
                "ways": {str(way): each.to_json(way) for way in each.ways},
                "pairs": pairs_of([each]),
                "samples": _samples(each),
            }
            for name, each in outcomes.items()
        },
        "together": pairs_of(list(outcomes.values())),
    }


def _samples(outcome: Outcome) -> list[dict[str, Any]]:
    """The first person's first and last replies in every way: not picked for what they say."""
    return [
        {"way": row.way, "turn": row.turn, "score": row.score, "text": row.text[:LONGEST_SHOWN]}
        for way in outcome.ways
        for row in outcome.rows
        if row.way == way and row.question == 0 and row.turn in (1, outcome.turns)
    ]
