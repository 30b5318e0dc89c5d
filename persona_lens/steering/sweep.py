"""Steered responses over layers and coefficients, with their scores (method, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from persona_lens.backend import Backend, Edit, Positions
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.cost import Work, run_work
from persona_lens.extraction.run import subject_config
from persona_lens.judging import Judge, Judgement, LikelihoodJudge, judge_rollouts, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.models.replies import chat_format
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import Request, Rollout, Rollouts, RolloutSettings, row_seed
from persona_lens.steering.steering import SteeringError, rowwise
from persona_lens.traits import Trait
from persona_lens.vectors import DEFAULT_REDUCTION, PersonaVectors

VECTOR, RANDOM, NONE = "vector", "random", "none"
QuestionSet = Literal["evaluation", "extraction"]


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep tries.

    Attributes:
        layers: Layers steered, each alone.
        coefficients: Multiples of the raw vector; 0 is always run too, once for all layers.
        questions: How many of the trait's questions are asked.
        question_set: ``evaluation`` (held out) for results, ``extraction`` for choices such as the layer's.
        samples: Responses for each question and setting; all settings share their seeds.
        random_directions: How many random directions of the vector's norm stand beside it; question i is steered along
            direction i modulo this number. 0 leaves the null out.
        positions: Tokens that are steered.
        reduction: Which of the vectors.
        seed: Base of every row's seed and of the random directions.
        rollouts: How responses are made.
    """

    layers: tuple[int, ...]
    coefficients: tuple[float, ...] = (-2.0, -1.0, 1.0, 2.0)
    questions: int = 20
    question_set: QuestionSet = "evaluation"
    samples: int = 1
    random_directions: int = 5
    positions: Positions = Positions.ALL
    reduction: str = DEFAULT_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise SteeringError(f"layers must be given, each once: got {list(self.layers)}")
        if not any(self.coefficients) or not all(map(isfinite, self.coefficients)):
            raise SteeringError(f"give finite coefficients, at least one of them not 0: got {list(self.coefficients)}")
        if self.question_set not in get_args(QuestionSet):
            raise SteeringError(f"question_set is {' or '.join(get_args(QuestionSet))}, got {self.question_set!r}")
        if self.samples < 1 or self.questions < 1 or self.random_directions < 0:
            raise SteeringError("samples and questions must be at least 1, random_directions at least 0")


@dataclass(frozen=True)
class SweepRow:
    """One steered response and its judgement.

    Attributes:
        direction: ``vector``, ``random``, or ``none`` for the unsteered responses.
        layer: Layer steered; None for the unsteered.
        coefficient: Multiple of the raw vector; 0 for the unsteered.
        question: Number of the question.
        sample: Number of the sample.
        score: Trait score, 0 to 100; None if the response is empty.
        surprise: -log p of the response under the unsteered model, nats a token; None if the response is empty, or from
            a judge that does not compute it.
        text: The response.
        coherence: 0 to 100; None from a judge that does not ask.
    """

    direction: str
    layer: int | None
    coefficient: float
    question: int
    sample: int
    score: float | None
    surprise: float | None
    text: str
    coherence: float | None = None


def sweep(
    backend: Backend,
    vectors: PersonaVectors,
    settings: SweepSettings,
    *,
    trait: str | Trait | None = None,
    folder: Path | str | None = None,
    name: str = "sweep",
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    allow_other_model: bool = False,
    progress: Progress = shown_progress,
) -> list[SweepRow]:
    """Steer along the vectors and score the responses.

    Steered and unsteered rows run in the same batches, through the same path.

    Args:
        backend: The model.
        vectors: What to steer along.
        settings: See `SweepSettings`.
        trait: The trait, if it is not the one stored with the vectors.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        name: Beginning of the names of the files in the folder.
        judge: Who scores the responses; by default the same model, unsteered, by likelihood as it was calibrated when
            the vectors were extracted.
        chat: Chat format; the model's own by default.
        allow_other_model: Steer a model that the vectors were not extracted from.
        progress: Told how far the work is.

    Raises:
        SteeringError: If the trait has too few questions.
        VectorsError: If the vectors belong to another model, or carry no calibration.
    """
    if not allow_other_model:
        vectors.check_model(backend)
    trait = vectors.trait_for(trait)
    chat = chat or chat_format(backend)
    judge = judge or LikelihoodJudge(backend, chat, trait, vectors.calibration)
    requests = plan_sweep(trait, settings)
    for layer in settings.layers:  # what cannot be run must not claim the folder
        vectors.vector(layer, settings.reduction)
    config = sweep_config(backend, vectors, trait, settings, chat, judge)
    with RunFolder(folder, config) if folder is not None else nullcontext() as run:
        collected = Rollouts(
            backend,
            chat,
            requests,
            settings.rollouts,
            folder=run,
            edits_for=edits_of(vectors, settings),
            prefix=f"{name}-",
        )
        prepare_judge(judge, run, f"{name}-", collected)
        rollouts = collected.run(progress)
        judged = judge_rollouts(judge, rollouts, chat, run, prefix=f"{name}-", progress=progress)
        rows = [_row(rollout, judgement) for rollout, judgement in zip(rollouts, judged, strict=True)]
        if run is not None:
            run.write_rows(f"{name}-scores.jsonl", map(asdict, rows))
    return rows


def sweep_work(
    backend: Backend,
    vectors: PersonaVectors,
    settings: SweepSettings,
    chat: ChatFormat,
    trait: Trait | None = None,
    judge: Judge | None = None,
) -> tuple[Work, ...]:
    """What `sweep` with these arguments would ask of the model, and of the judge's; nothing runs."""
    trait = trait or vectors.trait_definition
    requests = plan_sweep(trait, settings)
    collected = Rollouts(backend, chat, requests, settings.rollouts, edits_for=edits_of(vectors, settings))
    return run_work(collected, judge or LikelihoodJudge(backend, chat, trait))


def sweep_config(
    backend: Backend, vectors: PersonaVectors, trait: Trait, settings: SweepSettings, chat: ChatFormat, judge: Judge
) -> dict[str, Any]:
    """Everything that determines a sweep's result, as JSON values."""
    return {
        "kind": "sweep",
        "settings": asdict(settings),
        "vectors": vectors.content_hash,
        "judge": judge.describe(),
        **subject_config(backend, trait, chat),
    }


def plan_sweep(trait: Trait, settings: SweepSettings) -> list[Request]:
    """One request for each question, sample and setting; rows of a question share their seeds.

    Raises:
        SteeringError: If more questions are asked for than the trait has.
    """
    questions = trait.evaluation_questions if settings.question_set == "evaluation" else trait.extraction_questions
    if settings.questions > len(questions):
        raise SteeringError(
            f"{settings.questions} questions asked for, trait {trait.name} has {len(questions)} "
            f"for {settings.question_set}"
        )
    directions = [VECTOR, RANDOM] if settings.random_directions else [VECTOR]
    steered: list[tuple[str, int | None, float]] = [
        (direction, layer, coefficient)
        for layer in settings.layers
        for direction in directions
        for coefficient in sorted(set(settings.coefficients) - {0.0})
    ]
    return [
        Request(
            system=None,
            question=questions[number],
            seed=row_seed(settings.seed, "sweep", settings.question_set, number, sample),
            labels={
                "direction": direction,
                "layer": layer,
                "coefficient": coefficient,
                "question_number": number,
                "sample": sample,
            },
        )
        for number in range(settings.questions)
        for sample in range(settings.samples)
        for direction, layer, coefficient in [(NONE, None, 0.0), *steered]
    ]


def edits_of(vectors: PersonaVectors, settings: SweepSettings) -> Callable[[Sequence[Request]], list[Edit]]:
    """The edits of a batch: one for each layer and direction in it, its coefficient 0 in the rows of the others."""
    nulls = [vectors.random_like(settings.seed + i) for i in range(settings.random_directions)]

    def edit_of(request: Request) -> tuple[Edit, ...]:
        labels = request.labels
        if labels["direction"] == NONE:
            return ()
        source = vectors if labels["direction"] == VECTOR else nulls[labels["question_number"] % len(nulls)]
        edit = source.edit(
            labels["layer"], labels["coefficient"], positions=settings.positions, reduction=settings.reduction
        )
        return (edit,)

    return lambda requests: rowwise(map(edit_of, requests))


def _row(rollout: Rollout, judgement: Judgement) -> SweepRow:
    labels = rollout.request.labels
    return SweepRow(
        direction=labels["direction"],
        layer=labels["layer"],
        coefficient=labels["coefficient"],
        question=labels["question_number"],
        sample=labels["sample"],
        score=judgement.trait.value,
        surprise=judgement.surprise,
        text=rollout.response,
        coherence=judgement.coherence.value if judgement.coherence else None,
    )
