"""Crossing: steering along one trait, and what becomes of all the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.cost import Work, reading_work, run_work
from persona_lens.extraction.external import GivenRollouts, ReadRollouts
from persona_lens.extraction.run import model_config
from persona_lens.judging import Judge, Judgement, LikelihoodJudge, as_used, judge_rollouts, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.models.replies import chat_format
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.runs.rollouts import Rollout, RolloutBatches, Rollouts, RolloutSettings
from persona_lens.steering.comparison import ArmSettings, arm_edits, arm_requests
from persona_lens.steering.effects import CrossEffects, CrossRow, CrossTrait
from persona_lens.steering.steering import Steering, SteeringError
from persona_lens.traits import Trait
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors, VectorsError

STEERED, TEXT = "effects-", "effects-text-"
SCORES = "effects-scores.jsonl"


@dataclass(frozen=True)
class CrossSettings:
    """What is asked, and what is read.

    Attributes:
        questions: Of each trait this many evaluation questions; all of them are asked under every steering.
        samples: Responses for each question and steering; all steerings share their seeds.
        random_directions: How many random rotations of each steering stand beside it; 0 leaves the null out.
        layer: Where projections are read; by default each trait's where it is steered alone, else where it was tuned.
        reduction: Which of the vectors projections are taken on.
        seed: Base of every row's seed and of the random directions.
        rollouts: How responses are made.
    """

    questions: int = 5
    samples: int = 1
    random_directions: int = 5
    layer: int | None = None
    reduction: str = DEFAULT_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.questions < 1 or self.random_directions < 0:
            raise SteeringError("samples and questions must be at least 1, random_directions at least 0")


def cross_effects(
    backend: Backend,
    steerings: Mapping[str, Steering],
    traits: Mapping[str, PersonaVectors],
    settings: CrossSettings | None = None,
    *,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
    folder: Path | str | None = None,
    allow_other_model: bool = False,
    progress: Progress = shown_progress,
) -> CrossEffects:
    """Steer in several ways, and measure every trait in what comes.

    All steerings, the unsteered model and the random rotations answer the same questions with the same seeds: some
    evaluation questions of every trait, of which none was used in extracting any of them. So every cell of the matrix
    rests on the same questions. Each response is scored for every trait, and projected on every trait's vector twice:

    - *steered*: in the residual stream that the steered model had while it wrote. From the edited layer on it holds the
      edit itself: a vector with a positive cosine to the edit moves even if the text does not.
    - *text*: in the residual stream of the unsteered model that reads the same text. It holds what the text carries.

    Args:
        backend: The model.
        steerings: By name; usually one a trait, under its name.
        traits: What is measured, by name: vectors with their traits, and for the default judge its calibration.
        settings: See `CrossSettings`.
        judges: Who scores each trait; by default the same model, unsteered, by likelihood as it was calibrated when the
            trait's vectors were extracted.
        chat: Chat format; the model's own by default.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        allow_other_model: Steer a model that the vectors do not belong to.
        progress: Told how far the work is.

    Raises:
        SteeringError: If the traits have too few questions, a layer to read is not known, or a trait has no judge.
        VectorsError: If vectors belong to another model, or lack the layer or reduction.
    """
    crossing = Crossing(backend, steerings, traits, settings or CrossSettings(), judges, chat)
    if not allow_other_model:
        crossing.check_model()
    with RunFolder(folder, crossing.config()) if folder is not None else nullcontext() as run:
        rows = crossing.rows(run, progress)
        effects = CrossEffects(
            steerings=dict(steerings),
            vectors=dict(traits),
            traits=crossing.measured(),
            questions=crossing.questions,
            rows=tuple(rows),
            reduction=crossing.settings.reduction,
            config=crossing.config(used=True),
        )
        if run is not None:
            run.write_rows(SCORES, map(asdict, rows))
            run.write_json("summary.json", effects.to_json())
    return effects


def cross_work(
    backend: Backend,
    steerings: Mapping[str, Steering],
    traits: Mapping[str, PersonaVectors],
    settings: CrossSettings,
    *,
    judges: Mapping[str, Judge] | None = None,
    chat: ChatFormat | None = None,
) -> tuple[Work, ...]:
    """What `cross_effects` with these arguments would ask of the model, and of the judges'; nothing runs."""
    crossing = Crossing(backend, steerings, traits, settings, judges, chat)
    collected = crossing.collected(None)
    length = (0,) * settings.rollouts.max_new_tokens
    longest = [Rollout(request, 0, length, None, "word" * len(length)) for request in collected.requests]
    reading = reading_work(crossing.reread(longest, None), None, crossing.chat)
    by_judge = {name: run_work(collected, judge) for name, judge in crossing.judges.items()}
    generation = next(iter(by_judge.values()))[0]
    judging = [replace(work, label=f"judging {name}") for name, works in by_judge.items() for work in works[1:]]
    return generation, *reading, *judging


class Crossing:
    """A planned crossing: everything that is known before the model is asked.

    Args:
        backend: The model.
        steerings: By name.
        traits: Vectors of what is measured, by name.
        settings: See `CrossSettings`.
        judges: Who scores each trait.
        chat: Chat format; the model's own by default.
    """

    def __init__(
        self,
        backend: Backend,
        steerings: Mapping[str, Steering],
        traits: Mapping[str, PersonaVectors],
        settings: CrossSettings,
        judges: Mapping[str, Judge] | None = None,
        chat: ChatFormat | None = None,
    ) -> None:
        if not steerings or not traits:
            raise SteeringError("a crossing needs at least one steering, and at least one trait to measure")
        self.backend = backend
        self.steerings = dict(steerings)
        self.vectors = dict(traits)
        self.settings = settings
        self.chat = chat or chat_format(backend)
        self.traits = {name: each.trait_definition for name, each in traits.items()}
        self.questions = _questions(self.traits, self._steered_traits(), settings.questions)
        self.requests = arm_requests(dict(enumerate(self.questions)), list(steerings), self._arm_settings(), "effects")
        self.layers = {name: self._layer(name) for name in traits}
        for name, layer in self.layers.items():  # what cannot be run must not claim the folder
            self.vectors[name].vector(layer, settings.reduction)
        if judges is not None and (missing := [name for name in traits if name not in judges]):
            raise SteeringError(f"there is no judge for {', '.join(missing)}")
        self._methods: dict[str, set[str]] = {name: set() for name in traits}
        self.judges: dict[str, Judge] = {name: judges[name] if judges else self._likelihood(name) for name in traits}

    def check_model(self) -> None:
        """Raise `persona_lens.vectors.vectors.VectorsError` unless all vectors belong to the backend's model."""
        for steering in self.steerings.values():
            steering.check_model(self.backend)
        for each in self.vectors.values():
            each.check_model(self.backend)

    def config(self, used: bool = False) -> dict[str, Any]:
        """Everything that determines the result, as JSON values.

        Args:
            used: With the methods that the judges have used in `rows`, where that was left to them.
        """
        judges = {name: judge.describe() for name, judge in self.judges.items()}
        return {
            "kind": "effects",
            "settings": asdict(self.settings),
            "steerings": {name: steering.describe() for name, steering in self.steerings.items()},
            "traits": {
                name: {
                    "vectors": each.content_hash,
                    "trait": self.traits[name].content_hash(),
                    "layer": self.layers[name],
                    "judge": as_used(judges[name], self._methods[name]) if used else judges[name],
                }
                for name, each in self.vectors.items()
            },
            **model_config(self.backend, self.chat),
        }

    def measured(self) -> tuple[CrossTrait, ...]:
        """The traits, with where they are read."""
        reduction = self.settings.reduction
        return tuple(
            CrossTrait(name, each.description, self.layers[name], float(self.vectors[name].norms(reduction)[layer]))
            for (name, each), layer in zip(self.traits.items(), self.layers.values(), strict=True)
        )

    def collected(self, run: RunFolder | None) -> Rollouts:
        """The responses, to be made."""
        return Rollouts(
            self.backend,
            self.chat,
            self.requests,
            self.settings.rollouts,
            folder=run,
            reads=[self._read()],
            edits_for=arm_edits(self.steerings, self._arm_settings()),
            prefix=STEERED,
        )

    def reread(self, rollouts: Sequence[Rollout], run: RunFolder | None) -> ReadRollouts:
        """The same texts, to be read by the model without any edit."""
        prompts = tuple(tuple(self.chat.encode(r.request.system, r.request.question)) for r in rollouts)
        given = GivenRollouts(tuple(rollouts), prompts, None, ())
        return ReadRollouts(self.backend, given, self.settings.rollouts, folder=run, reads=[self._read()], prefix=TEXT)

    def rows(self, run: RunFolder | None, progress: Progress) -> list[CrossRow]:
        """Run what is not there yet: generate, read again, judge."""
        collected = self.collected(run)
        for name in self.vectors:
            prepare_judge(self.judges[name], run, self._prefix(name), collected)
        rollouts = collected.run(progress)
        again = self.reread(rollouts, run)
        again.run(progress)
        judged = {name: self._judge(name, rollouts, run, progress) for name in self.vectors}
        while_steered, of_text = self._projections(collected), self._projections(again)
        return [
            _row(
                rollout,
                {name: found[number] for name, found in judged.items()},
                while_steered[number],
                of_text[number],
            )
            for number, rollout in enumerate(rollouts)
        ]

    def _judge(
        self, name: str, rollouts: Sequence[Rollout], run: RunFolder | None, progress: Progress
    ) -> list[Judgement]:
        prefix = self._prefix(name)
        judge, methods = self.judges[name], self._methods[name]
        return judge_rollouts(judge, rollouts, self.chat, run, prefix=prefix, methods=methods, progress=progress)

    def _prefix(self, name: str) -> str:
        return STEERED + file_prefix(list(self.vectors).index(name), name)

    def _projections(self, batches: RolloutBatches) -> dict[int, dict[str, float | None]]:
        """Of each row the mean response token's projection on each unit vector, in residual-stream units."""
        layers = self._read().layers or ()
        found: dict[int, dict[str, float | None]] = {}
        units = {
            name: torch.nn.functional.normalize(each.vector(self.layers[name], self.settings.reduction), dim=0)
            for name, each in self.vectors.items()
        }
        for batch, tensors in batches.reductions():
            means = tensors[ReadKind.RESPONSE_MEAN.value].float()
            values = {name: means[:, layers.index(self.layers[name])] @ unit for name, unit in units.items()}
            for place, row in enumerate(batch):
                here = {name: float(each[place]) for name, each in values.items()}
                # A response without tokens has no mean.
                found[row] = {name: None if value != value else value for name, value in here.items()}
        return found

    def _read(self) -> Read:
        return Read(ReadKind.RESPONSE_MEAN, tuple(sorted(set(self.layers.values()))))

    def _arm_settings(self) -> ArmSettings:
        each = self.settings
        return ArmSettings(
            questions=tuple(range(len(self.questions))),
            samples=each.samples,
            random_directions=each.random_directions,
            seed=each.seed,
            rollouts=each.rollouts,
        )

    def _likelihood(self, name: str) -> Judge:
        try:
            calibration = self.vectors[name].calibration
        except VectorsError as error:
            raise VectorsError(f"{name}: {error}") from None
        return LikelihoodJudge(self.backend, self.chat, self.traits[name], calibration)

    def _layer(self, name: str) -> int:
        if self.settings.layer is not None:
            return self.settings.layer
        own = {edit.layer for edit in self.steerings[name].edits()} if name in self.steerings else set()
        if len(own) == 1:
            return own.pop()
        tuned = self.vectors[name].tuned
        if tuned is None:
            raise SteeringError(
                f"it is not known where to read {name!r}: it is not steered at one layer of its own, and no layer was "
                "tuned for it; name a layer (layer=..., --read-layer)"
            )
        return tuned.layer

    def _steered_traits(self) -> list[Trait]:
        """The traits steered along, as far as their vectors carry them."""
        steered = (each for steering in self.steerings.values() for each in steering.vectors.values())
        return [each.trait_definition for each in steered if each.stored("trait")]


def _questions(traits: Mapping[str, Trait], others: Sequence[Trait], count: int) -> dict[str, str]:
    """The questions that are asked, each with the name of the trait it comes from.

    Held out for one trait may be used in extracting another: such questions are left out.
    """
    used = {question for trait in (*traits.values(), *others) for question in trait.extraction_questions}
    asked: dict[str, str] = {}
    for name, trait in traits.items():
        held_out = [question for question in trait.evaluation_questions if question not in used]
        if count > len(held_out):
            raise SteeringError(
                f"{count} questions of each trait asked for; {name} has {len(held_out)} that no trait was extracted "
                "with"
            )
        for question in held_out[:count]:
            asked.setdefault(question, name)
    return asked


def _row(
    rollout: Rollout,
    judged: Mapping[str, Judgement],
    while_steered: dict[str, float | None],
    of_text: dict[str, float | None],
) -> CrossRow:
    labels = rollout.request.labels
    surprise = [each.surprise for each in judged.values() if each.surprise is not None]
    coherence = [
        each.coherence.value for each in judged.values() if each.coherence and each.coherence.value is not None
    ]
    return CrossRow(
        arm=labels["arm"],
        direction=labels["direction"],
        question=labels["question_number"],
        sample=labels["sample"],
        scores={name: each.trait.value for name, each in judged.items()},
        steered_projections=while_steered,
        text_projections=of_text,
        # Neither depends on the trait that the judge looks for.
        surprise=surprise[0] if surprise else None,
        coherence=coherence[0] if coherence else None,
        text=rollout.response,
    )
