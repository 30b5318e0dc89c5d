"""`Plan`: which steps are compared, beside what, and on which questions; everything that is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.known_questions import check_count, known_requests, right_answers
from persona_lens.analysis.weighing import Weighing
from persona_lens.backend import Backend, Positions
from persona_lens.backend.batches import context_length
from persona_lens.extraction.experiment import Experiment, Subject
from persona_lens.judging import Judge
from persona_lens.models import ChatFormat
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import Request
from persona_lens.steering import ArmSettings, Prompted, Steering
from persona_lens.steering.comparison import UNSTEERED, Arms, arm_edits, arm_variants, arms_experiment
from persona_lens.steering.surface import norms_experiment, shown_layers, significant
from persona_lens.steering.tune_settings import Towards
from persona_lens.traits import Trait
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors

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
        towards: More of the trait, or less.
        known_questions: How many known questions are asked under each step, for capability; 0 asks none.
        positions: Tokens that are steered.
        reduction: Which of the vectors.
        asked: Which held-out questions are answered, and how.
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
        method: Name of the method.
        strength: Length over the mean length of the residual.
        steering: What is done.
    """

    method: str
    strength: float
    steering: Steering

    @property
    def arm(self) -> str:
        """The name of its arm."""
        return f"{self.method} at {_shown(self.strength)}"


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is known before the model is asked.

    Attributes:
        subject: The model, the trait, and who scores.
        methods: Vectors by the names of the methods that made them.
        settings: See `MethodSettings`; the layer is known.
        tuned_for: The methods whose vectors the layer was tuned for; empty where it was not.
    """

    subject: Subject
    methods: Mapping[str, PersonaVectors]
    settings: MethodSettings
    tuned_for: tuple[str, ...] = ()

    @staticmethod
    def of(
        backend: Backend,
        methods: Mapping[str, PersonaVectors],
        settings: MethodSettings,
        trait: str | Trait | None = None,
        judge: Judge | None = None,
        chat: ChatFormat | None = None,
        *,
        planned: bool = False,
    ) -> Plan:
        """The plan; arguments as for `persona_lens.analysis.method_effects.compare_methods`."""
        if not methods:
            raise AnalysisError("there are no methods to compare; give the vectors of at least one, by its name")
        if taken := [name for name in methods if name in (UNSTEERED, PROMPTED, RANDOM)]:
            raise AnalysisError(
                f"a method cannot be called {taken[0]!r}, which stands beside all; give it another name"
            )
        calibrated = [each for each in methods.values() if each.judge.get("calibration")]
        scored = next(iter([*calibrated, *methods.values()]))
        subject = Subject.of(backend, scored, trait, judge, chat, planned=planned)
        for name, each in methods.items():
            if each.trait != scored.trait:
                raise AnalysisError(
                    f"methods are compared on one trait, but the vectors of {name!r} are of {each.trait!r}, and others "
                    f"of {scored.trait!r}; leave one of them out"
                )
            if not planned:
                each.check_model(backend, allowable=False)
        layer, tuned_for = _layer(methods, settings.layer, backend.info.n_layers)
        for each in methods.values():
            each.vector(layer, settings.reduction)  # one that is not there is refused before anything runs
        return Plan(subject, methods, replace(scored.settled(settings), layer=layer), tuned_for)

    @property
    def layer(self) -> int:
        """Where is steered."""
        assert self.settings.layer is not None  # it was settled when this was made
        return self.settings.layer

    def steps(self, residual: float) -> list[Step]:
        """Every method at every strength.

        Args:
            residual: Mean length of the residual at the layer.
        """
        return [
            Step(name, strength, self._steering(each, strength * residual))
            for strength in sorted(self.settings.strengths)
            for name, each in self.methods.items()
        ]

    def _steering(self, vectors: PersonaVectors, length: float) -> Steering:
        asked, own = self.settings, float(vectors.vector(self.layer, self.settings.reduction).norm())
        coefficient = asked.towards.sign * significant(length / own, DIGITS)
        return Steering.adding(vectors, self.layer, coefficient, reduction=asked.reduction, positions=asked.positions)

    @cached_property
    def prompt(self) -> Prompted:
        """The system prompt that asks for what steering is to do."""
        return Prompted(self.subject.trait.middle_prompt(self.settings.towards.arm))

    def arms(self, steps: list[Step]) -> Arms:
        """Every step, and the system prompt."""
        return {PROMPTED: self.prompt, **{step.arm: step.steering for step in steps}}

    def null_of(self, steps: list[Step]) -> dict[str, str]:
        """Random directions of one length are the same for all methods, so that those of the first are made alone."""
        first = next(iter(self.methods))
        return {step.arm: replace(step, method=first).arm for step in steps}

    def experiment(self, steps: list[Step]) -> Experiment:
        """The held-out questions under every arm."""
        return arms_experiment(self.subject, self.arms(steps), self.settings.asked, null_of=self.null_of(steps))

    def known(self, steps: list[Step]) -> tuple[list[Request], Weighing]:
        """The known questions under every arm, and what weighs the right answers to them.

        Raises:
            AnalysisError: If they would not fit the model.
        """
        asked, arms = self.settings.asked, self.arms(steps)
        variants = arm_variants(arms, asked.random_directions, self.null_of(steps))
        requests, answers = known_requests(variants, self.settings.known_questions, asked.seed)
        edits_for = arm_edits(arms, asked.random_directions, asked.seed)
        weighing = right_answers(self.subject.backend, self.subject.chat, requests, answers, edits_for, CAPABILITY)
        longest = max((len(each.ids) for each in weighing.passages), default=0)
        if (limit := context_length(self.subject.backend)) is not None and longest > limit:
            raise AnalysisError(
                f"known questions take up to {longest:,} tokens with the system prompt and those shown before them, "
                f"and the model takes {limit:,}; ask none (--known-questions 0)"
            )
        return requests, weighing

    def config(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON values."""
        hashes = {name: each.content_hash for name, each in self.methods.items()}
        return self.subject.config(KIND, self.settings, methods=hashes, prompt=self.prompt.system)

    def check(self) -> None:
        """Refuse what cannot be run, before anything is."""
        steps = self.steps(1.0)
        self.experiment(steps).rollouts()
        self.known(steps)

    def work(self) -> Iterator[Work]:
        """What a run would ask; nothing runs."""
        steps = self.steps(1.0)
        yield replace(norms_experiment(self.subject, self.settings.asked).rollouts().work(), label="unsteered rollouts")
        yield from self.experiment(steps).work()
        if self.settings.known_questions:
            yield self.known(steps)[1].work()


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
