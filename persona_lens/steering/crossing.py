"""Crossing: steering along one trait, and what becomes of all the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from persona_lens.backend import Backend, Read, ReadKind
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.experiment import Experiment, Subject, model_config, requests_of, run_folder
from persona_lens.extraction.means import described_mean, mean_read
from persona_lens.judging import Judge
from persona_lens.judging.recording import as_used
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import Request, RolloutBatches, Rollouts, Texts
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.steering.arms import arm_edits, arm_variants, check_asked
from persona_lens.steering.effects import CrossEffects, CrossRow, CrossTrait
from persona_lens.steering.steering import Steering, SteeringError
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors, VectorsError

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
        reduction: Which of the vectors projections are taken on; of a model that thinks, the mean of the answer is, or
            with `thinking_mean` that of the thinking.
        seed: Base of every row's seed and of the random directions.
        rollouts: How responses are made.
    """

    questions: int = 5  # fewer than elsewhere: those of every trait are asked under every steering
    samples: int = 1
    random_directions: int = 5
    layer: int | None = None
    reduction: str = OWN_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        check_asked("evaluation", self.random_directions, samples=self.samples, questions=self.questions)


def effects(
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
        VectorsError: If vectors belong to another model, lack the layer or reduction, or carry no calibration.
    """
    settings = settings or CrossSettings()
    if traits:
        settings = next(iter(traits.values())).settled(settings)
    crossing = Crossing(backend, steerings, traits, settings, judges, chat)
    if not allow_other_model:
        crossing.check_model()
    with run_folder(folder, crossing.config()) as run:
        rows, used = crossing.rows(run, progress)
        found = CrossEffects(
            steerings=dict(steerings),
            vectors=dict(traits),
            traits=crossing.measured(),
            questions=crossing.questions,
            answers=tuple(rows),
            reduction=crossing.settings.reduction,
            config=crossing.config(used),
            folder=run.path if run else None,
        )
        if run is not None:
            run.write_rows(SCORES, map(asdict, rows))
            run.write_json("summary.json", found.summary)
    return found


@dataclass(frozen=True, eq=False)
class Crossing:
    """A planned crossing: everything that is known before the model is asked.

    Attributes:
        backend: The model.
        steerings: By name.
        vectors: Of the traits that are measured, by name.
        settings: See `CrossSettings`.
        judges: Who scores each trait; as in `effects`.
        own_chat: Chat format; the model's own by default.
    """

    backend: Backend
    steerings: Mapping[str, Steering]
    vectors: Mapping[str, PersonaVectors]
    settings: CrossSettings
    judges: Mapping[str, Judge] | None = None
    own_chat: ChatFormat | None = None

    def __post_init__(self) -> None:
        if not self.steerings or not self.vectors:
            raise SteeringError("a crossing needs at least one steering, and at least one trait to measure")
        if self.judges is not None and (missing := [name for name in self.vectors if name not in self.judges]):
            raise SteeringError(f"there is no judge for {', '.join(missing)}")
        self.requests  # noqa: B018 - what cannot be run must not claim the folder
        for name, layer in self.layers.items():
            self.vectors[name].vector(layer, self.settings.reduction)

    @cached_property
    def chat(self) -> ChatFormat:
        """The chat format."""
        return self.own_chat or chat_format(self.backend)

    @cached_property
    def questions(self) -> dict[str, str]:
        """The questions that are asked, each with the name of the trait it comes from.

        Held out for one trait may be used in extracting another: such questions are left out.
        """
        traits = {name: each.trait_definition for name, each in self.vectors.items()}
        steered = (each for steering in self.steerings.values() for each in steering.vectors.values())
        others = [each.trait_definition for each in steered if each.stored("trait")]
        used = {question for trait in (*traits.values(), *others) for question in trait.extraction_questions}
        asked: dict[str, str] = {}
        for name, trait in traits.items():
            held_out = [question for question in trait.evaluation_questions if question not in used]
            if self.settings.questions > len(held_out):
                raise SteeringError(
                    f"{self.settings.questions} questions of each trait asked for; {name} has {len(held_out)} that no "
                    "trait was extracted with"
                )
            for question in held_out[: self.settings.questions]:
                asked.setdefault(question, name)
        return asked

    @cached_property
    def requests(self) -> list[Request]:
        """What is asked."""
        variants = arm_variants(self.steerings, self.settings.random_directions)
        numbered = dict(enumerate(self.questions))
        return requests_of(numbered, variants, self.settings.samples, self.settings.seed, "effects", "evaluation")

    @cached_property
    def layers(self) -> dict[str, int]:
        """Where projections are read, by trait."""
        return {name: self._layer(name, each) for name, each in self.vectors.items()}

    @property
    def mean(self) -> ReadKind:
        """Which mean of a response is projected."""
        return mean_read(self.chat, self.settings.reduction)

    @cached_property
    def subjects(self) -> dict[str, Subject]:
        """The model as it is judged for each trait."""
        found = {}
        for name, vectors in self.vectors.items():
            judge = self.judges[name] if self.judges else None
            try:
                found[name] = Subject.of(self.backend, vectors, None, judge, self.chat, allow_other_model=True)
            except VectorsError as error:
                raise VectorsError(f"{name}: {error}") from None
        return found

    def check_model(self) -> None:
        """Raise `persona_lens.vectors.vectors.VectorsError` unless all vectors belong to the backend's model."""
        for steering in self.steerings.values():
            steering.check_model(self.backend)
        for each in self.vectors.values():
            each.check_model(self.backend)

    def config(self, judges: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything that determines the result, as JSON values.

        Args:
            judges: What is said of each trait's judge, where more is known than it says itself.
        """
        return {
            "kind": "effects",
            "settings": settings_json(self.settings),
            "steerings": {name: steering.describe() for name, steering in self.steerings.items()},
            "traits": {
                name: {
                    "vectors": each.vectors.content_hash,
                    "trait": each.trait.content_hash(),
                    "layer": self.layers[name],
                    "judge": judges[name] if judges else each.judge.describe(),
                }
                for name, each in self.subjects.items()
            },
            **described_mean(self.mean),
            **model_config(self.backend, self.chat),
        }

    def measured(self) -> tuple[CrossTrait, ...]:
        """The traits, with where they are read."""
        found = []
        for name, each in self.subjects.items():
            layer, lengths = self.layers[name], each.vectors.norms(self.settings.reduction)
            found.append(CrossTrait(name, each.trait.description, layer, float(lengths[layer])))
        return tuple(found)

    @property
    def experiment(self) -> Experiment:
        """What is asked, and who scores it."""
        judges = {name: each.judge for name, each in self.subjects.items()}
        edits_for = arm_edits(self.steerings, self.settings.random_directions, self.settings.seed)
        asked = (self.backend, self.chat, self.requests, self.settings.rollouts)
        return Experiment(*asked, judges, edits_for, [self._read()], STEERED)

    def reread(self, texts: Texts) -> Experiment:
        """The same texts, to be read by the model without any edit."""
        asked = (self.backend, self.chat, self.requests, self.settings.rollouts)
        return Experiment(*asked, {}, reads=[self._read()], prefix=TEXT, given=texts)

    def work(self) -> tuple[Work, ...]:
        """What a run would ask of the model, and of the judges'; nothing runs."""
        generating, *judging = self.experiment.work()
        rollouts = self.experiment.rollouts()
        assert isinstance(rollouts, Rollouts)
        return generating, *self.reread(rollouts.longest()).work(), *judging

    def rows(self, run: RunFolder | None, progress: Progress) -> tuple[list[CrossRow], dict[str, Any]]:
        """Run what is not there yet: generate, judge, read again. With the rows comes what the judges used."""
        answers = self.experiment.run(run, progress)
        prompts = tuple(tuple(self.chat.encode(each.system, each.question)) for each in self.requests)
        again = self.reread(Texts(tuple(answers.rollouts), prompts)).run(run, progress)
        steered, of_text = self._projections(answers.collected), self._projections(again.collected)
        rows = []
        for number, rollout in enumerate(answers.rollouts):
            judged = {name: each[number] for name, each in answers.judged.items()}
            nll = (each.nll for each in judged.values() if each.nll is not None)
            coherence = (each.coherence.value for each in judged.values() if each.coherence)
            labels = dict(rollout.request.labels)
            row = CrossRow(
                question=labels.pop("question_number"),
                scores={name: each.trait.value for name, each in judged.items()},
                steered_projections=steered[number],
                text_projections=of_text[number],
                # Neither depends on the trait that the judge looks for.
                nll=next(nll, None),
                coherence=next((value for value in coherence if value is not None), None),
                text=rollout.response,
                **labels,
            )
            rows.append(row)
        used = {name: as_used(self.subjects[name].judge.describe(), answers.judged[name]) for name in self.subjects}
        return rows, used

    def _projections(self, batches: RolloutBatches) -> dict[int, dict[str, float | None]]:
        """Of each row the mean token's projection on each unit vector, in residual-stream units."""
        layers = self._read().layers or ()
        found: dict[int, dict[str, float | None]] = {}
        units = {
            name: torch.nn.functional.normalize(each.vectors.vector(self.layers[name], self.settings.reduction), dim=0)
            for name, each in self.subjects.items()
        }
        for batch, tensors in batches.reductions():
            means = tensors[self.mean.value].float()
            values = {name: means[:, layers.index(self.layers[name])] @ unit for name, unit in units.items()}
            for place, row in enumerate(batch):
                here = {name: float(each[place]) for name, each in values.items()}
                # A response without tokens, or without an answer, has no mean.
                found[row] = {name: None if value != value else value for name, value in here.items()}
        return found

    def _read(self) -> Read:
        return Read(self.mean, tuple(sorted(set(self.layers.values()))))

    def _layer(self, name: str, vectors: PersonaVectors) -> int:
        if self.settings.layer is not None:
            return self.settings.layer
        own = {edit.layer for edit in self.steerings[name].edits()} if name in self.steerings else set()
        if len(own) == 1:
            return own.pop()
        tuned = vectors.tuned
        if tuned is None:
            raise SteeringError(
                f"it is not known where to read {name!r}: it is not steered at one layer of its own, and no layer was "
                "tuned for it; name a layer (layer=..., --read-layer)"
            )
        return tuned.layer
