"""`drift`: where a model's replies stand along traits as conversations go on, where that begins, and what moves it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.data.scripted import Scripted
from persona_lens.extraction.conversations import Turn, reads_in_order
from persona_lens.extraction.experiment import run_folder
from persona_lens.extraction.means import described_mean
from persona_lens.models import ChatFormat
from persona_lens.monitoring.drift.plan import BEFORE, KIND, Drifting, DriftSettings, plan_drift
from persona_lens.monitoring.drift.simulated_user import UserModel, described
from persona_lens.monitoring.drift.trajectories import MessageTable, Trajectories, Way
from persona_lens.monitoring.gauges import projected
from persona_lens.reports.result import Answered
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import ReadRollouts, Request, Rollout, Texts
from persona_lens.runs.settings import settings_json
from persona_lens.steering import Steering
from persona_lens.steering.arms import NONE, UNSTEERED
from persona_lens.vectors import PersonaVectors

Values = NDArray[np.float64]
DIGITS = 6
TURNS = "drift-turns.jsonl"
MESSAGES = "messages-"  # begins the names of files
READ_ALONE = ReadKind.RESPONSE_MEAN  # of a user's message, in which nobody thinks


@dataclass(frozen=True)
class DriftRow:
    """One reply.

    Attributes:
        way: Name of the steering; `UNSTEERED` without one.
        direction: ``vector``, ``random``, or ``none`` for the unsteered.
        domain: Of the conversation.
        user: Who talks.
        turn: Number of the turn, from 1.
        message: What the user said.
        text: The reply.
        means: By gauge, the mean over the reply's tokens, of a model that thinks those of the answer; None without any.
        before: By gauge, the value at the last token before the reply.
    """

    way: str
    direction: str
    domain: str
    user: str
    turn: int
    message: str
    text: str
    means: Mapping[str, float | None]
    before: Mapping[str, float | None]

    def to_row(self) -> dict[str, Any]:
        """The reply as JSON values."""
        return asdict(self)


@dataclass(frozen=True, repr=False, eq=False)
class Drift(Answered[DriftRow]):
    """What became of conversations.

    Attributes:
        answers: Every reply.
        summary: See `persona_lens.reports.result.Result`.
        folder: See `persona_lens.reports.result.Result`.
    """

    kind = KIND
    answers: tuple[DriftRow, ...]
    summary: dict[str, Any]
    folder: Path | None = None


def drift(
    backend: Backend,
    vectors: PersonaVectors | Iterable[PersonaVectors],
    settings: DriftSettings | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    users: Sequence[Scripted] | None = None,
    user_model: UserModel | None = None,
    steerings: Mapping[str, Steering] | None = None,
    folder: Path | str | None = None,
    chat: ChatFormat | None = None,
    allow_other_model: bool = False,
    progress: Progress = shown_progress,
) -> Drift:
    """Hold conversations, and say how their replies, or answers after thinking, move along traits turn by turn.

    Args:
        backend: The model.
        vectors: What is read; any trait, and the axis.
        settings: See `DriftSettings`.
        layers: Where each is read; by default where it was tuned.
        users: Who talks; by default the built-in people of four domains.
        user_model: Plays the people: their first messages are those of their scripts, all others its own. By default
            they follow their scripts.
        steerings: By name, those under which the same messages are said again.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        chat: Chat format; the model's own by default.
        allow_other_model: Use vectors that belong to another model.
        progress: Told how far the work is.

    Raises:
        MonitoringError: If scikit-learn is missing, or settings or vectors do not fit.
        DataError: If there are too few people with so many messages.
        ContextError: If a conversation is too long for the model.
        VectorsError: If vectors belong to another model, or nothing was tuned.
    """
    planned = plan_drift(
        backend,
        vectors,
        settings,
        layers=layers,
        users=users,
        user_model=user_model,
        steerings=steerings,
        chat=chat,
        allow_other_model=allow_other_model,
    )
    planned.check()
    with run_folder(folder, planned.config()) as run:
        unsteered = list(planned.plain().hold(run, progress))
        said = [replace(each.user, turns=tuple(q for q, _ in each.exchanges)) for each in unsteered[-1].conversations]
        again = planned.replayed(said)
        rows, values = _read([*unsteered, *(again.hold(run, progress) if again else ())], planned)
        summary = _summary(planned, said, rows, values, _embedded(planned, said, run, progress))
        found = Drift(tuple(rows), plain(summary), run.path if run else None)
        if run is not None:
            run.write_rows(TURNS, (row.to_row() for row in rows))
            run.write_json("summary.json", found.summary)
    return found


def _read(turns: Sequence[Turn], planned: Drifting) -> tuple[list[DriftRow], dict[Way, Values]]:
    """Every reply; and by way the projections, [conversations, turns, gauges of the wide panel]."""
    names, wide = list(map(str, planned.panel.gauges)), planned.wide.gauges
    rows: list[DriftRow] = []
    values: dict[Way, list[Values]] = {}
    for turn in turns:
        reads = turn.reads()
        means, before = (
            projected(reads[kind.value], planned.panel.layers, wide).double().numpy().round(DIGITS)
            for kind in (planned.mean, BEFORE)
        )
        places: dict[Way, list[int]] = {}
        for place, rollout in enumerate(turn.rollouts):
            labels = rollout.request.labels
            places.setdefault((labels["arm"], labels["direction"]), []).append(place)
            said: Any = [dict(zip(names, plain(each[place].tolist()), strict=False)) for each in (means, before)]
            rows.append(
                DriftRow(
                    labels["arm"],
                    labels["direction"],
                    labels["domain"],
                    labels["user"],
                    turn.number,
                    rollout.request.question,
                    rollout.response,
                    *said,
                )
            )
        for way, own in places.items():
            values.setdefault(way, []).append(means[own])
    return rows, {way: np.stack(each, axis=1) for way, each in values.items()}


def _embedded(
    planned: Drifting, said: Sequence[Scripted], run: RunFolder | None, progress: Progress
) -> dict[int, Values]:
    """By layer, the mean residual of each message, read alone: [conversations * turns, d_model]."""
    texts = [message for user in said for message in user.turns]
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    read = ReadRollouts(
        planned.backend,
        alone(planned.chat, list(place)),
        planned.settings.rollouts,
        folder=run,
        reads=[Read(READ_ALONE, planned.panel.layers)],
        prefix=MESSAGES,
    )
    read.run(progress)
    means = reads_in_order(read)[READ_ALONE.value].double().numpy()[[place[text] for text in texts]]
    return {layer: means[:, at] for at, layer in enumerate(planned.panel.layers)}


def alone(chat: ChatFormat, texts: Sequence[str]) -> Texts:
    """Messages as conversations begin with them: the template's head is the prompt, and the message is what is read."""
    # What the template writes before any message is what two of them have in common.
    both = zip(chat.encode(None, "zebra"), chat.encode(None, "walnut"), strict=False)
    head = tuple(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both)) or chat.closing_ids()
    ids = [tuple(chat.encode_answer(text)) for text in texts]
    rollouts = (
        Rollout(Request(None, text, 0), len(head), own, None, text) for text, own in zip(texts, ids, strict=True)
    )
    return Texts(tuple(rollouts), (head,) * len(texts))


def _summary(
    planned: Drifting,
    said: Sequence[Scripted],
    rows: Sequence[DriftRow],
    values: Mapping[Way, Values],
    embedded: Mapping[int, Values],
) -> dict[str, Any]:
    settings, gauges = planned.settings, len(planned.panel.gauges)
    domains, names = [user.domain for user in said], [user.name for user in said]
    found = Trajectories(
        planned.panel,
        domains,
        values[UNSTEERED, NONE],
        {way: table[:, :, :gauges] for way, table in values.items() if way[1] != NONE},
        settings.seed,
    )
    messages = MessageTable([user.turns for user in said], names, domains, embedded)
    return {
        "model": asdict(planned.backend.info),
        "settings": settings_json(settings),
        "domains": {domain: domains.count(domain) for domain in dict.fromkeys(domains)},
        "played_by": described(planned.played),
        "counts": {
            "conversations": len(said),
            "turns": settings.turns,
            "replies": len(rows),
            "empty": sum(not row.text.strip() for row in rows),
        },
        "steerings": {name: str(steering) for name, steering in planned.steerings.items()},
        **described_mean(planned.mean),
        "gauges": found.figures(messages, settings.permutations),
    }
