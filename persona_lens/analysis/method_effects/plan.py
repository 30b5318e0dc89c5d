"""`Plan`: which steps are compared, beside what, and on which questions; everything that is known beforehand.

Directions of one trait or of several: then all ways to steer answer the same questions, and every judge every answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.known_questions import check_count, known_requests, right_answers
from persona_lens.analysis.weighing import Weighing
from persona_lens.backend import Backend, Positions, Read, ReadKind
from persona_lens.backend.batches import context_length
from persona_lens.extraction.experiment import Experiment, Subject, model_config, questions_of, requests_of
from persona_lens.judging import Judge
from persona_lens.judging.recording import prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import Request
from persona_lens.runs.settings import settings_json
from persona_lens.steering import ArmSettings, Prompted, Steering
from persona_lens.steering.arms import ARMS, UNSTEERED, Arms, arm_edits, arm_variants
from persona_lens.steering.tuning.settings import Towards
from persona_lens.steering.tuning.surface import shown_layers, significant
from persona_lens.traits import Trait
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors
from persona_lens.vectors.samples import RunSamples

KIND = "methods"
PROMPTED, RANDOM = "prompted", "random"
CAPABILITY = "capability"
DIGITS = 7  # of a coefficient, as many as float32 has: a step that is longer by little is a difference that is clear


@dataclass(frozen=True)
class MethodSettings:
    """What is compared, and how.

    Attributes:
        layer: Where to steer; None for the layer that was tuned for any of the vectors, or else the middle one of those
            that tuning tries.
        strengths: Lengths of the step over the mean length of the residual there.
        towards: More of each trait, or less.
        known_questions: How many known questions are asked under each step, for capability; 0 asks none.
        positions: Tokens that are steered.
        reduction: Which of the vectors.
        asked: Which held-out questions are answered, of each trait, and how.
    """

    layer: int | None = None
    strengths: tuple[float, ...] = (0.2, 0.4)
    towards: Towards = Towards.MORE
    known_questions: int = 40
    positions: Positions = Positions.ALL
    reduction: str = OWN_REDUCTION
    asked: ArmSettings = field(default_factory=ArmSettings)

    def __post_init__(self) -> None:
        if not self.strengths or not all(0 < strength < 10 for strength in self.strengths):
            raise AnalysisError(
                f"strengths are step lengths in residual norms, such as 0.2 and 0.4: got {list(self.strengths)}"
            )
        if len(set(map(_shown, self.strengths))) < len(self.strengths):
            raise AnalysisError(f"give each strength once: got {list(self.strengths)}")
        check_count(self.known_questions)


def _shown(strength: float) -> str:
    return f"{strength:g}"


@dataclass(frozen=True)
class Step:
    """A step along a method's direction.

    Attributes:
        trait: The trait that it is along.
        method: Name of the method.
        strength: Length over the mean length of the residual.
        steering: What is done.
    """

    trait: str
    method: str
    strength: float
    steering: Steering

    @property
    def arm(self) -> str:
        """The name of its arm."""
        return f"{self.method} of {self.trait} at {_shown(self.strength)}"


def prompted(trait: str) -> str:
    """The name of the arm in which a system prompt asks for a trait."""
    return f"{PROMPTED} of {trait}"


Methods = Mapping[str, PersonaVectors | Sequence[PersonaVectors]]
"""Vectors by the names of the methods that made them: those of one trait, or of several."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is known before the model is asked.

    Attributes:
        backend: The model.
        chat: Its chat format.
        subjects: By trait the model as it is judged for it.
        methods: By trait its vectors, by the names of the methods that made them.
        settings: See `MethodSettings`; the layer is known.
        runs: By trait the extraction that its directions are held against, to see what they detect.
        tuned_for: The methods whose vectors the layer was tuned for; empty where it was not.
    """

    backend: Backend
    chat: ChatFormat
    subjects: Mapping[str, Subject]
    methods: Mapping[str, Mapping[str, PersonaVectors]]
    settings: MethodSettings
    runs: Mapping[str, RunSamples] = field(default_factory=dict)
    tuned_for: tuple[str, ...] = ()

    @staticmethod
    def of(
        backend: Backend,
        methods: Methods,
        settings: MethodSettings,
        runs: Sequence[RunSamples] = (),
        traits: Mapping[str, str | Trait] | None = None,
        judges: Mapping[str, Judge] | None = None,
        chat: ChatFormat | None = None,
        *,
        planned: bool = False,
    ) -> Plan:
        """The plan; arguments as for `persona_lens.analysis.method_effects.compare_methods`."""
        found, chat = _by_trait(methods), chat or chat_format(backend)
        subjects = {}
        for trait, own in found.items():
            calibrated = [each for each in own.values() if each.judge.get("calibration")]
            scored, judge = next(iter([*calibrated, *own.values()])), (judges or {}).get(trait)
            if judge is None and judges is not None:
                raise AnalysisError(f"there is no judge for {trait!r}; give one for every trait, or none at all")
            settings = scored.settled(settings)
            subjects[trait] = Subject.of(backend, scored, (traits or {}).get(trait), judge, chat, planned=planned)
        every = {
            name if len(found) == 1 else f"{name} of {trait}": each
            for trait, own in found.items()
            for name, each in own.items()
        }
        layer, tuned_for = _layer(every, settings.layer, backend.info.n_layers)
        for each in every.values():
            if not planned:
                each.check_model(backend, allowable=False)
            each.vector(layer, settings.reduction)  # one that is not there is refused before anything runs
        known = {run.vectors.trait: run for run in runs}
        if len(known) < len(runs) or not known.keys() <= found.keys():
            raise AnalysisError(
                f"runs are of traits that are compared ({', '.join(found)}), one of each; got runs of "
                f"{', '.join(run.vectors.trait for run in runs)}"
            )
        return Plan(backend, chat, subjects, found, replace(settings, layer=layer), known, tuned_for)

    @property
    def layer(self) -> int:
        """Where is steered."""
        assert self.settings.layer is not None  # it was settled when this was made
        return self.settings.layer

    @property
    def names(self) -> list[str]:
        """The methods."""
        return list(dict.fromkeys(name for own in self.methods.values() for name in own))

    @cached_property
    def questions(self) -> dict[int, tuple[str, str]]:
        """What is asked, with the trait that each question comes from.

        Held out for one trait may be used in extracting another: such questions are left out.
        """
        asked = self.settings.asked
        used = {
            question
            for each in self.subjects.values()
            for question in (each.trait.extraction_questions if asked.question_set == "evaluation" else ())
        }
        found: dict[str, str] = {}
        for name, each in self.subjects.items():
            own = questions_of(each.trait, asked.questions, asked.question_set, AnalysisError)
            for question in own.values():
                if question not in used:
                    found.setdefault(question, name)
        if not found:
            raise AnalysisError("all questions were used in extracting one of the traits; ask others, or more")
        return dict(enumerate(found.items()))

    def steps(self, residual: float) -> list[Step]:
        """Every method of every trait at every strength.

        Args:
            residual: Mean length of the residual at the layer.
        """
        return [
            Step(trait, name, strength, self._steering(each, strength * residual))
            for strength in sorted(self.settings.strengths)
            for trait, own in self.methods.items()
            for name, each in own.items()
        ]

    def _steering(self, vectors: PersonaVectors, length: float) -> Steering:
        asked, own = self.settings, float(vectors.vector(self.layer, self.settings.reduction).norm())
        coefficient = asked.towards.sign * significant(length / own, DIGITS)
        return Steering.adding(vectors, self.layer, coefficient, reduction=asked.reduction, positions=asked.positions)

    @cached_property
    def prompts(self) -> dict[str, Prompted]:
        """By trait the system prompt that asks for what steering is to do."""
        arm = self.settings.towards.arm
        return {name: Prompted(each.trait.middle_prompt(arm)) for name, each in self.subjects.items()}

    def arms(self, steps: list[Step]) -> Arms:
        """Every step, and the system prompts."""
        asking = {prompted(trait): prompt for trait, prompt in self.prompts.items()}
        return {**asking, **{step.arm: step.steering for step in steps}}

    def null_of(self, steps: list[Step]) -> dict[str, str]:
        """Random directions of one length are the same for all steps, so that those of the first are made alone."""
        first: dict[float, str] = {}
        return {step.arm: first.setdefault(step.strength, step.arm) for step in steps}

    def norms(self) -> Experiment:
        """The unsteered responses whose residuals are measured."""
        return self._experiment({}, "norms-", {}, [Read(ReadKind.RESPONSE_NORM)])

    def experiment(self, steps: list[Step]) -> Experiment:
        """The held-out questions under every arm, with every judge for every answer."""
        return self._experiment(self.arms(steps), ARMS, self.null_of(steps))

    def _experiment(
        self, arms: Arms, prefix: str, null_of: Mapping[str, str], reads: Sequence[Read] = ()
    ) -> Experiment:
        asked = self.settings.asked
        variants = arm_variants(arms, asked.random_directions, null_of)
        questions = {number: question for number, (question, _) in self.questions.items()}
        requests = requests_of(questions, variants, asked.samples, asked.seed, "arms", asked.question_set)
        edits_for = arm_edits(arms, asked.random_directions, asked.seed)
        judges = {name: each.judge for name, each in self.subjects.items()}
        return Experiment(self.backend, self.chat, requests, asked.rollouts, judges, edits_for, reads, prefix)

    def known(self, steps: list[Step]) -> tuple[list[Request], Weighing]:
        """The known questions under every arm, and what weighs the right answers to them.

        Raises:
            AnalysisError: If they would not fit the model.
        """
        asked, arms = self.settings.asked, self.arms(steps)
        variants = arm_variants(arms, asked.random_directions, self.null_of(steps))
        requests, answers = known_requests(variants, self.settings.known_questions, asked.seed)
        edits_for = arm_edits(arms, asked.random_directions, asked.seed)
        weighing = right_answers(self.backend, self.chat, requests, answers, edits_for, CAPABILITY)
        longest = max((len(each.ids) for each in weighing.passages), default=0)
        if (limit := context_length(self.backend)) is not None and longest > limit:
            raise AnalysisError(
                f"known questions take up to {longest:,} tokens with the system prompt and those shown before them, "
                f"and the model takes {limit:,}; ask none (--known-questions 0)"
            )
        return requests, weighing

    def config(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON values."""
        return {
            "kind": KIND,
            "settings": settings_json(self.settings),
            "questions": len(self.questions),
            "traits": {
                name: {
                    "trait": each.trait.content_hash(),
                    "judge": each.judge.describe(),
                    "prompt": self.prompts[name].system,
                    "methods": {method: vectors.content_hash for method, vectors in self.methods[name].items()},
                    "run": self.runs[name].vectors.content_hash if name in self.runs else None,
                }
                for name, each in self.subjects.items()
            },
            **model_config(self.backend, self.chat),
        }

    def check(self) -> None:
        """Refuse what cannot be run, before anything is."""
        steps = self.steps(1.0)
        self.experiment(steps).rollouts()
        self.known(steps)

    def prepare(self, run: RunFolder | None) -> None:
        """Let judges find out whether they can work."""
        for number, (name, each) in enumerate(self.subjects.items()):
            prepare_judge(each.judge, run, ARMS + file_prefix(number, name))

    def work(self) -> Iterator[Work]:
        """What a run would ask; nothing runs."""
        steps = self.steps(1.0)
        yield replace(self.norms().rollouts().work(), label="unsteered rollouts")
        yield from self.experiment(steps).work()
        if self.settings.known_questions:
            yield self.known(steps)[1].work()


def _by_trait(methods: Methods) -> dict[str, dict[str, PersonaVectors]]:
    """By trait its vectors by their methods.

    Raises:
        AnalysisError: If there are none, a name is taken, or a method has two of one trait.
    """
    found: dict[str, dict[str, PersonaVectors]] = {}
    for name, given in methods.items():
        if name in (UNSTEERED, PROMPTED, RANDOM):
            raise AnalysisError(f"a method cannot be called {name!r}, which stands beside all; give it another name")
        for each in (given,) if isinstance(given, PersonaVectors) else given:
            if name in found.setdefault(each.trait, {}):
                raise AnalysisError(f"the method {name!r} has two vectors of {each.trait!r}; give it one of each trait")
            found[each.trait][name] = each
    if not found:
        raise AnalysisError("there are no methods to compare; give the vectors of at least one, by its name")
    return found


def _layer(methods: Mapping[str, PersonaVectors], named: int | None, n_layers: int) -> tuple[int, tuple[str, ...]]:
    """Where is steered, and for which methods that was tuned."""
    if named is not None:
        return named, ()
    tuned = {name: each.tuned.layer for name, each in methods.items() if each.tuned is not None}
    if not tuned:
        tried = shown_layers(n_layers)
        return tried[len(tried) // 2], ()
    if len(layers := sorted(set(tuned.values()))) > 1:
        raise AnalysisError(
            f"the vectors were tuned to different layers, {', '.join(map(str, layers))}; name one for all (--layer)"
        )
    return layers[0], tuple(tuned)
