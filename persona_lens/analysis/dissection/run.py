"""`dissect`: which features a trait's vector is made of, where they are active, and what each does alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection.decomposition import RankedFeature, decoder_cosines, pursue, rank
from persona_lens.analysis.dissection.examples import (
    WHOLE,
    FeatureEffect,
    arm_name,
    feature_effects,
    feature_steering,
    find_examples,
)
from persona_lens.analysis.dissection.features import Features
from persona_lens.backend import Backend
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.experiment import Answer, Answers, Subject, json_of, model_config, run_folder
from persona_lens.judging import Judge
from persona_lens.judging.recording import as_used, prepare_judge
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.reports.result import Answered
from persona_lens.runs import RunError, RunFolder
from persona_lens.runs.chunks import CHECK, is_signed, signed
from persona_lens.runs.cost import Work
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.steering import ArmRow, ArmSettings, Steering
from persona_lens.steering.arms import ARMS, UNSTEERED, arms_experiment, unsteered_means
from persona_lens.traits import Trait
from persona_lens.vectors import OWN_REDUCTION, PersonaVectors, random_directions
from persona_lens.vectors.geometry import chance

DECOMPOSITION = "decomposition.json"
SHOWN_SHARES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class DissectSettings:
    """What is looked at, and what is steered.

    Attributes:
        show: Features shown at either end of the ranking.
        pursuit: Features of the sparse reconstruction.
        random_directions: Random directions beside the vector's cosines; a quarter of them are also reconstructed.
        examples: Places in the corpus shown for each feature.
        steered: How many of the top features are steered alone; 0 steers nothing.
        random_features: How many random features are steered beside them.
        coefficient: Multiple of the raw vector whose length every step has; None takes what was tuned at this layer.
        questions: How many of the trait's evaluation questions are asked.
        samples: Responses for each question and arm.
        reduction: Which of the vectors.
        seed: Of the random directions and features, and base of every row's seed.
        rollouts: How responses are made.
    """

    show: int = 20
    pursuit: int = 64
    random_directions: int = 20
    examples: int = 3
    steered: int = 5
    random_features: int = 10
    coefficient: float | None = None
    questions: int = 20
    samples: int = 1
    reduction: str = OWN_REDUCTION
    seed: int = 0
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        least = {"show": 1, "pursuit": 1, "random_directions": 1, "examples": 1, "steered": 0, "random_features": 0}
        for name, smallest in {**least, "questions": 1, "samples": 1}.items():
            if getattr(self, name) < smallest:
                raise AnalysisError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        if self.coefficient == 0:
            raise AnalysisError("a coefficient of 0 steers nothing; give another, or steered=0")


@dataclass(frozen=True, repr=False, eq=False)
class Dissection(Answered[ArmRow]):
    """What was found.

    Attributes:
        answers: Every response; empty if nothing was steered.
        effects: By arm: ``vector`` and ``feature_N``.
        summary: See `persona_lens.reports.result.Result`.
        folder: See `persona_lens.reports.result.Result`.
    """

    kind = "dissection"
    answers: tuple[ArmRow, ...]
    effects: Mapping[str, FeatureEffect | None]
    summary: Mapping[str, Any]
    folder: Path | None = None


def dissect(
    backend: Backend,
    vectors: PersonaVectors,
    features: Features,
    settings: DissectSettings | None = None,
    *,
    corpus: Sequence[str] = (),
    folder: Path | str | None = None,
    trait: str | Trait | None = None,
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    allow_other_model: bool = False,
    progress: Progress = shown_progress,
) -> Dissection:
    """Take a trait's vector apart into the features of a sparse autoencoder (method, section 8).

    Cosines with every decoder direction and a sparse reconstruction stand beside those of random directions. With a
    corpus, features get the text that they are most active on. Then the top features are steered, each alone and as far
    as the vector, beside random features: of those active anywhere in the corpus, since a dead one is no comparison.

    Args:
        backend: The model.
        vectors: Of this model.
        features: The dictionary; its layer is the one dissected.
        settings: See `DissectSettings`.
        corpus: Texts in which features are looked for.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        trait: The trait, if it is not the one stored with the vectors.
        judge: Who scores; by default the same model by likelihood, as it was calibrated for the vectors.
        chat: Chat format; the model's own by default.
        allow_other_model: Accept a dictionary of a model with another name.
        progress: Told how far the work is.

    Raises:
        AnalysisError: If the dictionary does not fit the vectors, or no coefficient is known.
        SteeringError: If the trait has too few questions.
        VectorsError: If the vectors belong to another model, or carry no calibration.
    """
    settings, chat = vectors.settled(settings or DissectSettings()), chat or chat_format(backend)
    vectors.check_model(backend, allowable=False)
    features.check(vectors, allow_other_model=allow_other_model)
    subject = None
    if settings.steered:
        coefficient_of(vectors, features, settings)  # what cannot be run must not claim the folder
        subject = Subject.of(backend, vectors, trait, judge, chat)
    asked = model_config(backend, chat) if subject is None else subject.describe()
    config = _config(vectors, features, settings, corpus, asked)
    with run_folder(folder, config) as run:
        if subject is not None:
            prepare_judge(subject.judge, run, ARMS)
        found = _kept(run, lambda: decompose(backend, vectors, features, settings, corpus, progress))
        answers = None
        if subject is not None:
            arms = steered_arms(vectors, features, settings, found)
            answers = arms_experiment(subject, arms, _arm_settings(settings)).run(run, progress)
        dissection = _dissection(answers, found, vectors, features, settings, run.config if run else config)
        if run is not None:
            run.write_rows(f"{ARMS}scores.jsonl", map(Answer.to_row, dissection.answers))
            run.write_json("summary.json", dissection.summary)
    return replace(dissection, folder=run.path if run else None)


def _config(
    vectors: PersonaVectors,
    features: Features,
    settings: DissectSettings,
    corpus: Sequence[str],
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    hashed = "sha256:" + hashlib.sha256("\0".join(corpus).encode()).hexdigest()
    return {
        "kind": "dissection",
        "settings": settings_json(settings),
        "features": features.describe(),
        "corpus": {"texts": len(corpus), "content_hash": hashed} if corpus else None,
        **asked,
        "vectors": {"trait": vectors.trait, "content_hash": vectors.content_hash},
    }


def _kept(run: RunFolder | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the same run found before it was interrupted, or else what is found now."""
    if run is None:
        return make()
    file = run.path / DECOMPOSITION
    if not file.exists():
        run.write_json(DECOMPOSITION, signed(make(), DECOMPOSITION))
    found = run.read_json(DECOMPOSITION)
    if not is_signed(found, DECOMPOSITION):
        raise RunError(f"{file} is damaged; remove it, and the same command makes it again")
    return {name: value for name, value in found.items() if name != CHECK}


def decompose(
    backend: Backend,
    vectors: PersonaVectors,
    features: Features,
    settings: DissectSettings,
    corpus: Sequence[str] = (),
    progress: Progress = shown_progress,
) -> dict[str, Any]:
    """Everything but the steering, as JSON values; arguments as for `dissect`."""
    vector = vectors.vector(features.layer, settings.reduction)
    random = random_directions(features.d_model, settings.random_directions, settings.seed)
    cosines = decoder_cosines(features.decoder, torch.cat([vector.unsqueeze(0), random]))
    ranking = rank(cosines[0], settings.show, cosines[1:])
    ends = [each.feature for each in (*ranking.top, *ranking.bottom)]
    beside = max(1, settings.random_directions // 4)
    nulls = [pursue(features, random[i], cosines[1 + i], settings.pursuit).shares for i in range(beside)]
    most = min(map(len, nulls))
    activity = (
        find_examples(backend, features, ends, corpus, count=settings.examples, progress=progress) if corpus else None
    )
    chosen = _random_features(cosines[0], ends, activity.alive if activity else None, settings)
    return {
        "layer": features.layer,
        "norm": float(vector.norm()),
        "chance": chance(features.d_model),
        "ranking": ranking.to_json(),
        "pursuit": {
            **pursue(features, vector, cosines[0], settings.pursuit).to_json(),
            "random": [{"features": k, "shares": [s[k - 1] for s in nulls]} for k in SHOWN_SHARES if k <= most],
        },
        "corpus": {
            "texts": len(corpus),
            "tokens": activity.tokens,
            "alive": int(activity.alive.sum()),
            "features": [each.to_json() for each in activity.found],
        }
        if activity
        else None,
        "random_features": [asdict(RankedFeature(i, float(cosines[0, i]))) for i in chosen],
        "links": {str(i): link for i in (*ends, *chosen) if (link := features.link(i))},
    }


def coefficient_of(vectors: PersonaVectors, features: Features, settings: DissectSettings) -> float:
    """How strongly features are steered: what was asked for, or tuned at this layer.

    Raises:
        AnalysisError: If neither is known.
    """
    if settings.coefficient is not None:
        return settings.coefficient
    tuned = vectors.tuned
    if tuned is None or tuned.layer != features.layer or tuned.reduction != settings.reduction:
        raise AnalysisError(
            f"no coefficient was tuned for the {settings.reduction} vector of {vectors.trait!r} at layer "
            f"{features.layer}; give one (--coefficient), or steer nothing (--steered 0)"
        )
    return tuned.coefficient


def steered_arms(
    vectors: PersonaVectors, features: Features, settings: DissectSettings, found: Mapping[str, Any]
) -> dict[str, Steering]:
    """The whole vector, the top features and the random ones, each a steering as long as the vector's."""
    coefficient = coefficient_of(vectors, features, settings)
    where = f".{vectors.settled(settings).reduction}"
    whole = Steering.parse(f"{WHOLE}{where}@{features.layer}:{coefficient:+.6g}", {WHOLE: vectors})
    chosen = [each["feature"] for each in (*found["ranking"]["top"][: settings.steered], *found["random_features"])]
    singles = {
        arm_name(i): feature_steering(vectors, features, i, coefficient, reduction=settings.reduction) for i in chosen
    }
    return {WHOLE: whole, **singles}


def dissection_work(
    backend: Backend,
    vectors: PersonaVectors,
    features: Features,
    settings: DissectSettings,
    chat: ChatFormat,
    judge: Judge | None = None,
) -> tuple[Work, ...]:
    """What steering the features would ask of the model and the judge; the corpus is left out, and nothing runs."""
    if not settings.steered:
        return ()
    whole = Steering.parse(f"{WHOLE}@{features.layer}:+1", {WHOLE: vectors})
    names = [WHOLE, *(f"feature {i}" for i in range(settings.steered + settings.random_features))]
    subject = Subject.of(backend, vectors, None, judge, chat, planned=True)
    return arms_experiment(subject, dict.fromkeys(names, whole), _arm_settings(settings)).work()


def _dissection(
    answers: Answers | None,
    found: Mapping[str, Any],
    vectors: PersonaVectors,
    features: Features,
    settings: DissectSettings,
    config: Mapping[str, Any],
) -> Dissection:
    summary: dict[str, Any] = {**config, **found, "trait": vectors.trait, "steering": None}
    effects: Mapping[str, FeatureEffect | None] = {}
    rows = answers.rows(ArmRow) if answers is not None else []
    if answers is not None:
        summary["judge"] = as_used(config["judge"], answers.judgements)
        coefficient = coefficient_of(vectors, features, settings)
        top = [each["feature"] for each in found["ranking"]["top"][: settings.steered]]
        random = [each["feature"] for each in found["random_features"]]
        effects = feature_effects(rows, top, random, coefficient)
        plain = unsteered_means(rows)
        summary["steering"] = {
            "coefficient": coefficient,
            "top": top,
            "random": random,
            "unsteered": {name: json_of(plain[name]) for name in ("score", "nll")},
            "effects": {name: json_of(each) for name, each in effects.items()},
            "stand_out": [i for i in top if (each := effects[arm_name(i)]) is not None and each.stands_out],
            "samples": _samples(rows, [UNSTEERED, WHOLE, *map(arm_name, top)]),
        }
    return Dissection(tuple(rows), effects, json.loads(json.dumps(summary)))


def _samples(rows: Sequence[ArmRow], arms: Sequence[str]) -> list[dict[str, Any]]:
    """The first question's first response of each arm: not picked for what they say."""
    first = min(row.question for row in rows)
    by_arm = {row.arm: row for row in rows if row.question == first and row.sample == 0}
    return [{"arm": arm, "score": by_arm[arm].score, "text": by_arm[arm].text} for arm in arms]


def _arm_settings(settings: DissectSettings) -> ArmSettings:
    return ArmSettings(
        questions=tuple(range(settings.questions)),
        samples=settings.samples,
        random_directions=0,  # random features are the null
        seed=settings.seed,
        rollouts=settings.rollouts,
    )


def _random_features(
    cosines: Float[Tensor, " features"],
    ends: Sequence[int],
    alive: Bool[Tensor, " features"] | None,
    settings: DissectSettings,
) -> list[int]:
    if not settings.steered:
        return []
    eligible = torch.isfinite(cosines) if alive is None else torch.isfinite(cosines) & alive
    eligible[list(ends)] = False
    places = eligible.nonzero()[:, 0]
    if len(places) < settings.random_features:
        raise AnalysisError(
            f"{settings.random_features} random features are asked for, but only {len(places)} are "
            f"{'active in the corpus and ' if alive is not None else ''}not among those shown; ask for fewer of either"
        )
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(settings.seed))
    return sorted(places[order[: settings.random_features]].tolist())
