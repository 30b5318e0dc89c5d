"""`Plan`: the conversations, ways and measures of a run, and how each of them is had."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from torch import Tensor

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.known_questions import probabilities
from persona_lens.analysis.persistence.measures import (
    capability,
    known_length,
    surprise,
    surprise_of,
)
from persona_lens.analysis.persistence.outcomes import Outcome, TurnRow
from persona_lens.analysis.persistence.settings import PersistSettings
from persona_lens.analysis.persistence.ways import FROM, UNSTEERED, Aim, EditsOf, Way, edits_by_labels, edits_for
from persona_lens.analysis.weighing import Weighing
from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.core.progress import Progress
from persona_lens.data.scripted import Scripted, scripted_users, spread_over_domains
from persona_lens.extraction.conversations import Conversation, Conversations
from persona_lens.extraction.experiment import Subject, Variant, model_config
from persona_lens.extraction.means import described_mean, mean_read
from persona_lens.judging import Judge, Judgement, LikelihoodJudge
from persona_lens.judging.recording import as_used, exchange_of, judge_rollouts, judging_work, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import Rollout
from persona_lens.runs.settings import settings_json
from persona_lens.vectors import PersonaVectors

KIND = "persistence"


@dataclass(frozen=True)
class HeldTurn:
    """A turn of every conversation: how they stand after it, and the replies with their means by kind and layer."""

    conversations: tuple[Conversation, ...]
    rollouts: Sequence[Rollout]
    means: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is known before the model is asked.

    Attributes:
        backend: The model.
        subjects: The traits, with who scores them.
        settings: See `PersistSettings`.
        users: Who talks.
        chat: The model's chat format.
    """

    backend: Backend
    subjects: Mapping[str, Subject]
    settings: PersistSettings
    users: tuple[Scripted, ...]
    chat: ChatFormat

    @staticmethod
    def of(
        backend: Backend,
        vectors: Mapping[str, PersonaVectors],
        settings: PersistSettings,
        users: Sequence[Scripted] | None,
        judges: Mapping[str, Judge] | None,
        chat: ChatFormat | None,
        *,
        planned: bool = False,
    ) -> Plan:
        """The plan; arguments as for `persona_lens.analysis.persistence.persist`."""
        if not vectors:
            raise AnalysisError("name at least one trait's vectors to steer along")
        chat, settings = chat or chat_format(backend), next(iter(vectors.values())).settled(settings)
        subjects = {
            name: Subject.of(backend, each, None, judges[name] if judges else None, chat, planned=planned)
            for name, each in vectors.items()
        }
        everybody = scripted_users() if users is None else users
        talking = spread_over_domains(everybody, settings.conversations, settings.turns)
        return Plan(backend, subjects, settings, talking, chat)

    @cached_property
    def aims(self) -> dict[str, Aim]:
        """The traits; without a target, where none was named."""
        return {name: self._aim(each) for name, each in self.subjects.items()}

    def _aim(self, subject: Subject) -> Aim:
        asked = self.settings
        if asked.layer is None or asked.coefficient is None:
            tuned = subject.vectors.tuned_choice("give a layer and a coefficient (--layer, --coefficient)")
            where = (tuned.layer, tuned.coefficient, tuned.reduction)
        else:
            where = (asked.layer, asked.coefficient, asked.reduction)
        aim = Aim(subject.vectors, subject.trait, *where, target=asked.target, gate=asked.gate)
        aim.vector  # noqa: B018 - a layer that is not there is refused before anything runs
        return aim

    @property
    def layers(self) -> tuple[int, ...]:
        """Where projections are read."""
        return tuple(sorted({aim.layer for aim in self.aims.values()}))

    def mean_of(self, aim: Aim) -> ReadKind:
        """Which mean of a reply is projected for a trait."""
        return mean_read(self.chat, aim.reduction)

    @property
    def means(self) -> tuple[ReadKind, ...]:
        """All that are."""
        return tuple(sorted(set(map(self.mean_of, self.aims.values()))))

    def edits(self, aims: Mapping[str, Aim]) -> EditsOf:
        """What each conversation is steered by."""
        return edits_by_labels(aims, self.settings.random_directions, self.settings.seed)

    def conversations(
        self, aims: Mapping[str, Aim], variants: Sequence[Variant] | None = None, turns: int | None = None,
        prefix: str = "",
    ) -> Conversations:  # fmt: skip
        """The conversations that are held; all of them by default."""
        every = [UNSTEERED, *(aim.variant(way) for aim in aims.values() for way in self.settings.held_ways)]
        return Conversations(
            self.backend,
            self.chat,
            self.users,
            every if variants is None else variants,
            turns or self.settings.turns,
            self.settings.seed,
            self.settings.rollouts,
            edits_for(self.edits(aims), self.chat),
            [Read(kind, self.layers) for kind in self.means],
            prefix=prefix,
        )

    def config(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON values."""
        said = json.dumps([user.turns[: self.settings.turns] for user in self.users])
        return {
            "kind": KIND,
            "settings": settings_json(self.settings),
            "users": {
                "names": [user.name for user in self.users],
                "messages": "sha256:" + hashlib.sha256(said.encode()).hexdigest(),
            },
            "traits": {
                name: {
                    "vectors": each.vectors.content_hash,
                    "trait": each.trait.content_hash(),
                    "layer": self.aims[name].layer,
                    "coefficient": self.aims[name].coefficient,
                    "reduction": self.aims[name].reduction,
                    "judge": each.judge.describe(),
                    **described_mean(self.mean_of(self.aims[name])),
                }
                for name, each in self.subjects.items()
            },
            **model_config(self.backend, self.chat),
        }

    def check(self) -> None:
        """Refuse what might become too long for the model, known questions included, before anything is asked."""
        asked = self.settings.known_questions if self.settings.known_after else 0
        chains = [known_length(self.chat, number, asked, self.settings.seed) for number in range(len(self.users))]
        self.conversations(self.aims).check(max(chains) if asked else 0)

    def prepare(self, run: RunFolder | None) -> None:
        """Let judges find out whether they can work."""
        messages = {message for user in self.users for message in user.turns[: self.settings.turns]}
        for number, (name, each) in enumerate(self.subjects.items()):
            prepare_judge(each.judge, run, file_prefix(number, name))
            if isinstance(each.judge, LikelihoodJudge):
                each.judge.check_room(messages, self.settings.rollouts.max_new_tokens)

    def aimed(self, run: RunFolder | None, progress: Progress) -> dict[str, Aim]:
        """The traits with what is held, as far as it was not named: projections of replies of the first turn."""
        missing = [
            way for way in self.settings.held_ways if way in FROM and getattr(self.settings, FROM[way][0]) is None
        ]
        if not missing:
            return self.aims
        aims = self.aims
        variants = [aim.variant(FROM[way][1]) for aim in aims.values() for way in missing]
        (turn,) = self.conversations(aims, variants, 1, "target-").hold(run, progress)
        held = HeldTurn(turn.conversations, turn.rollouts, turn.reads())
        for way in missing:
            name, source = FROM[way]
            found: dict[str, Any] = {trait: {name: self._mean(trait, aim, source, held)} for trait, aim in aims.items()}
            aims = {trait: replace(aim, **found[trait]) for trait, aim in aims.items()}
        return aims

    def _mean(self, trait: str, aim: Aim, source: Way, turn: HeldTurn) -> float:
        """The mean projection of the replies to a way."""
        own = {"trait": trait, "way": str(source)}
        found = [
            value
            for place, rollout in enumerate(turn.rollouts)
            if own.items() <= rollout.request.labels.items()
            and (value := self._projection(aim, turn, place)) is not None
        ]
        if not found:
            raise AnalysisError(
                f"every reply of the first turn is empty that is to say what floor and gated hold of {trait}; name a "
                "target and a gate"
            )
        return round(fmean(found), 6)

    def _projection(self, aim: Aim, turn: HeldTurn, place: int) -> float | None:
        means = turn.means.get(self.mean_of(aim))
        return None if means is None else aim.projection(means[place, self.layers.index(aim.layer)])

    def held(self, aims: Mapping[str, Aim], run: RunFolder | None, progress: Progress) -> list[HeldTurn]:
        """Every turn, of which only the means of its replies are kept."""
        return [
            HeldTurn(turn.conversations, turn.rollouts, turn.reads())
            for turn in self.conversations(aims).hold(run, progress)
        ]

    def outcomes(
        self, aims: Mapping[str, Aim], turns: Sequence[HeldTurn], run: RunFolder | None, progress: Progress
    ) -> tuple[dict[str, Outcome], dict[str, Any]]:
        """Judge and weigh what was said; by trait what came of it, and what its judge used."""
        finished = turns[-1].conversations
        weighing = surprise(self.backend, self.chat, finished, "surprise")
        surprises = surprise_of(finished, weighing, weighing.run(run, progress))
        known = self._known(aims, finished, run, progress)
        outcomes, used = {}, {}
        for number, (name, aim) in enumerate(aims.items()):
            judge = self.subjects[name].judge
            own = [
                (each, place)
                for each in range(len(turns))
                for place, rollout in enumerate(turns[each].rollouts)
                if rollout.request.labels["trait"] in ("", name)
            ]
            replies = [turns[each].rollouts[place] for each, place in own]
            prefix = file_prefix(number, name)
            judged = judge_rollouts(judge, replies, self.chat, run, prefix=prefix, progress=progress)
            rows = [
                _row(
                    rollout,
                    judgement,
                    trait=name,
                    nll=surprises[place][each],
                    projection=self._projection(aim, turns[each], place),
                    capability=known.get((each + 1, place)),
                )
                for (each, place), rollout, judgement in zip(own, replies, judged, strict=True)
            ]
            outcomes[name] = Outcome(aim, rows, self.settings.turns, self.settings.last)
            used[name] = as_used(judge.describe(), judged)
        return outcomes, used

    def _known(
        self, aims: Mapping[str, Aim], finished: Sequence[Conversation], run: RunFolder | None, progress: Progress
    ) -> dict[tuple[int, int], float]:
        """What the model still knows, by turn and place of the conversation."""
        return {
            (turn, place): value
            for turn, weighing in self._weighings(aims, finished)
            for place, value in enumerate(probabilities(weighing, weighing.run(run, progress)))
        }

    def _weighings(self, aims: Mapping[str, Aim], finished: Sequence[Conversation]) -> Iterator[tuple[int, Weighing]]:
        for turn in self.settings.known_after:
            stood = [each.until(turn) for each in finished]
            count, seed, name = self.settings.known_questions, self.settings.seed, f"capability-{turn:02d}"
            yield turn, capability(self.backend, self.chat, stood, self.edits(aims), count, seed, name)

    def work(self) -> Iterator[Work]:
        """What a run would ask; nothing runs."""
        aims = {name: replace(aim, target=aim.target or 0.0, gate=aim.gate or 0.0) for name, aim in self.aims.items()}
        held = self.conversations(aims)
        finished = held.longest()
        yield from held.work()
        yield surprise(self.backend, self.chat, finished, "surprise").work()
        for _, weighing in self._weighings(aims, finished):
            yield weighing.work()
        for name, each in self.subjects.items():
            own = [one for one in finished if one.variant.labels["trait"] in ("", name)]
            exchanges = [
                exchange_of(Rollout(one.until(turn).request(said, 0), 0, (), None, reply), self.chat)
                for one in own
                for turn, (said, reply) in enumerate(one.exchanges)
            ]
            yield from (replace(work, label=f"{work.label} {name}") for work in judging_work(each.judge, exchanges))


def _row(
    rollout: Rollout,
    judgement: Judgement,
    *,
    trait: str,
    nll: float | None,
    projection: float | None,
    capability: float | None,
) -> TurnRow:
    labels = rollout.request.labels
    return TurnRow(
        question=labels["question_number"],
        sample=labels["sample"],
        score=judgement.trait.value,
        nll=nll,
        coherence=judgement.coherence.value if judgement.coherence else None,
        text=rollout.response,
        trait=trait,
        way=labels["way"],
        turn=labels["turn"],
        user=labels["user"],
        domain=labels["domain"],
        projection=projection,
        capability=capability,
    )
