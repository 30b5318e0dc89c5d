"""From a trait and a model to persona vectors: rollouts, scores, filter, difference of means."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ParamSpec

from persona_lens.backend import Backend, ModelInfo, Read
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.experiment import HOLD_REASONING, run_folder, subject_config
from persona_lens.extraction.external import ExternalRollouts, ExternalScores, Paths, ReadRollouts, external_rollouts
from persona_lens.extraction.means import (
    ExtractionSettings,
    Filtered,
    arm_means,
    filter_responses,
    held_out_separation,
    plan_requests,
)
from persona_lens.judging import Judge, Judgement, LikelihoodJudge, fit_calibration
from persona_lens.judging.recording import (
    as_used,
    exchange_of,
    judge_rollouts,
    judging_work,
    longest_exchanges,
    prepare_judge,
    weigh_rollouts,
)
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format, note_reasoning
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work, generating_work, reading_work
from persona_lens.runs.rollouts import Request, Rollout, Rollouts
from persona_lens.traits import Arm, Trait, load_trait
from persona_lens.vectors import PersonaVectors

VECTORS = "vectors.safetensors"
SUMMARY = "summary.json"
SCORES = "scores.jsonl"
LIKELIHOOD = "likelihood"
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Extraction:
    """What an extraction yields.

    Attributes:
        vectors: The persona vectors.
        judge: The judge; the likelihood judge is calibrated on this extraction. Or the scores that came with responses.
        rollouts: Every response.
        summary: The figures, as they stand in ``summary.json``.
    """

    vectors: PersonaVectors
    judge: Judge | ExternalScores
    rollouts: list[Rollout]
    summary: dict[str, Any]


def run_extraction(
    backend: Backend,
    trait: str | Trait,
    folder: Path | str | None = None,
    *,
    settings: ExtractionSettings | None = None,
    judge: Judge | None = None,
    chat: ChatFormat | None = None,
    responses: ExternalRollouts | Paths | None = None,
    allow_missing: bool = False,
    progress: Progress = shown_progress,
) -> Extraction:
    """Extract a trait's vectors, and keep the judge and the responses too.

    Args:
        backend: The model.
        trait: A trait, its name, or a path to its YAML file.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        settings: See `ExtractionSettings`.
        judge: Who scores the responses; the likelihood judge by default.
        chat: Chat format; the model's own by default.
        responses: A file of responses that another program generated, or several, to be read instead of generating
            any; see `persona_lens.extraction.external.read_responses`. The settings of sampling mean nothing then.
        allow_missing: Go on if ``responses`` lacks some that an extraction asks for.
        progress: Told how far the work is.

    Raises:
        ExtractionError: If the filter leaves nothing of an arm;
            or if ``responses`` does not fit the trait or the model.
        RunError: If the folder belongs to another run.
        TraitError: If the trait cannot be found or read.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    settings = settings or ExtractionSettings()
    chat = chat or chat_format(backend)
    given = responses
    if given is not None and not isinstance(given, ExternalRollouts):
        given = external_rollouts(
            backend, chat, trait, given, questions=settings.questions, allow_missing=allow_missing
        )
        for note in given.notes:
            warnings.warn(note, stacklevel=2)
    extracting = _Extracting(backend, trait, settings, chat, judge, given)
    extracting.requests()  # before the folder: what cannot be run must not claim it
    config = extracting.config()
    with run_folder(folder, config) as run:
        return extracting.run(run, run.config if run is not None else config, progress)


def _alone(run: Callable[Arguments, Extraction]) -> Callable[Arguments, PersonaVectors]:
    """The same verb, which gives the vectors alone."""

    @wraps(run)
    def extract(*args: Arguments.args, **options: Arguments.kwargs) -> PersonaVectors:
        return run(*args, **options).vectors

    extract.__name__ = extract.__qualname__ = "extract"
    vars(extract)["__signature__"] = signature(run).replace(return_annotation="PersonaVectors")
    extract.__doc__ = (run.__doc__ or "").replace(", and keep the judge and the responses too", "")
    return extract


extract = _alone(run_extraction)


def extraction_work(
    backend: Backend,
    trait: Trait,
    settings: ExtractionSettings,
    chat: ChatFormat,
    judge: Judge | None = None,
    given: ExternalRollouts | None = None,
) -> tuple[Work, ...]:
    """What `run_extraction` with these arguments would ask of the model, and of the judge's; nothing runs."""
    return _Extracting(backend, trait, settings, chat, judge, given).work()


@dataclass(frozen=True)
class _Extracting:
    """What is asked of whom, and how it is scored."""

    backend: Backend
    trait: Trait
    settings: ExtractionSettings
    chat: ChatFormat
    judge: Judge | None
    given: ExternalRollouts | None

    def requests(self) -> Sequence[Request]:
        """What is asked, or was."""
        return plan_requests(self.trait, self.settings) if self.given is None else self.given.requests

    def config(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON values."""
        scoring = self.judge or (self.given.scores if self.given else None)
        described = scoring.describe() if scoring else {"judge": LIKELIHOOD}
        config: dict[str, Any] = {"kind": "extraction", "settings": self.settings.to_json()}
        if self.given is not None:
            config |= {"settings": self.settings.reading_json(), "responses": self.given.to_json()}
        return {**config, "judge": described, **subject_config(self.backend, self.trait, self.chat)}

    def work(self) -> tuple[Work, ...]:
        """What a run would ask of the model, and of the judge's; nothing runs."""
        scoring = self.judge or LikelihoodJudge(self.backend, self.chat, self.trait)
        collected = self.collected(None)
        if isinstance(collected, Rollouts):
            return generating_work(collected), *judging_work(scoring, longest_exchanges(collected))
        reading = reading_work("reading", self.backend, collected.calls(), collected.reads)
        if collected.given.scores is not None and self.judge is None:
            return (reading,)
        return reading, *judging_work(scoring, [exchange_of(each, self.chat) for each in collected.given.rollouts])

    def collected(self, run: RunFolder | None) -> Rollouts | ReadRollouts:
        """The responses, to be made or to be read."""
        reads, rollouts = Read.means(sinks=self.settings.sinks), self.settings.rollouts
        if self.given is None:
            return Rollouts(self.backend, self.chat, self.requests(), rollouts, folder=run, reads=reads)
        note_reasoning(self.chat)
        return ReadRollouts(self.backend, self.given, rollouts, folder=run, reads=reads)

    def run(self, run: RunFolder | None, config: dict[str, Any], progress: Progress) -> Extraction:
        """Collect, judge, filter and take means, from a configuration as the run began with it."""
        requests, settings, collected = self.requests(), self.settings, self.collected(run)
        if self.judge is not None:
            prepare_judge(self.judge, run)
        rollouts = collected.run(progress)
        scoring, judged = self._judged(rollouts, run, progress)
        filtered = filter_responses(requests, judged, settings)
        means = arm_means(requests, filtered.kept, collected.reductions)
        separations = held_out_separation(requests, filtered.kept, collected.reductions, means, settings.seed)
        described = as_used(scoring.describe(), judged)
        provenance = {**config, "judge": described, "counts": filtered.to_json(), "separation": separations}
        if not settings.sinks:
            provenance["prompt_mean_sinks"] = False
        if self.trait.graded_prompts:  # so that a study needs nothing but the vectors
            provenance["trait"] = {**config["trait"], "graded_prompts": list(self.trait.graded_prompts)}
        # As the run began with it: a device of another number makes no other vectors.
        vectors = PersonaVectors(self.trait.name, ModelInfo(**config["model"]), means.difference(), provenance)
        summary = _summary(vectors, judged, filtered, rollouts)
        if run is not None:
            run.write_rows(SCORES, map(_score_row, judged, filtered.kept))
            run.write_bytes(VECTORS, vectors.to_bytes())
            run.write_json(SUMMARY, summary)
        return Extraction(vectors, scoring, rollouts, summary)

    def _judged(
        self, rollouts: Sequence[Rollout], run: RunFolder | None, progress: Progress
    ) -> tuple[Judge | ExternalScores, list[Judgement]]:
        """Who scored, and the scores; without a judge or scores that came, by likelihood, calibrated on these."""
        if self.judge is not None:
            return self.judge, judge_rollouts(self.judge, rollouts, self.chat, run, progress=progress)
        if self.given is not None and self.given.scores is not None:
            return self.given.scores, list(self.given.scores.judgements)
        uncalibrated = LikelihoodJudge(self.backend, self.chat, self.trait)
        weighed = weigh_rollouts(uncalibrated, rollouts, run, progress=progress)
        known = [
            (e.preference, r.request.labels["arm"] == Arm.POSITIVE) for e, r in zip(weighed, rollouts, strict=True) if e
        ]
        calibration = fit_calibration([x for x, _ in known], [y for _, y in known])
        judge = LikelihoodJudge(self.backend, self.chat, self.trait, calibration)
        return judge, [judge.judgement_of(e) for e in weighed]


def _summary(
    vectors: PersonaVectors, judged: Sequence[Judgement], filtered: Filtered, rollouts: Sequence[Rollout]
) -> dict[str, Any]:
    by_arm: dict[str, list[float]] = {arm.value: [] for arm in Arm}
    for rollout, judgement in zip(rollouts, judged, strict=True):
        if judgement.trait.value is not None:
            by_arm[rollout.request.labels["arm"]].append(judgement.trait.value)
    return {
        "trait": vectors.trait,
        "model": asdict(vectors.model),
        "judge": dict(vectors.judge),
        "responses": len(rollouts),
        "tokens": sum(len(rollout.response_ids) for rollout in rollouts),
        "mean_score": {arm: sum(values) / len(values) for arm, values in by_arm.items() if values},
        "counts": filtered.to_json(),
        "norms": {name: vectors.norms(name).tolist() for name in vectors.directions},
        "separation": vectors.provenance["separation"],
        **({HOLD_REASONING: True} if vectors.stored("chat").get(HOLD_REASONING) else {}),
    }


def _score_row(judgement: Judgement, kept: bool) -> dict[str, Any]:
    trait, coherence = judgement.trait, judgement.coherence
    scored = {"score": trait.value, "reason": trait.reason, "kept": kept}
    return {**scored, "coherence": coherence.value} if coherence else scored
