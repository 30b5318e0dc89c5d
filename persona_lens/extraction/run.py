"""From a trait and a model to persona vectors: rollouts, scores, filter, difference of means."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona_lens.backend import Backend, ModelInfo, Read, ReadKind
from persona_lens.core.documents import plain
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.extraction.experiment import (
    HOLD_REASONING,
    ONLY,
    Answers,
    Experiment,
    run_folder,
    subject_config,
)
from persona_lens.extraction.external import ExternalRollouts, ExternalScores, Paths, external_rollouts
from persona_lens.extraction.kept import KeptResponses
from persona_lens.extraction.means import (
    ExtractionError,
    ExtractionSettings,
    Filtered,
    arm_means,
    filter_responses,
    held_out_separation,
    part_means,
    plan_requests,
    thinking_told,
)
from persona_lens.judging import Judge, Judgement, LikelihoodJudge, fit_calibration
from persona_lens.judging.recording import (
    as_used,
    rollout_evidence,
)
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.reports.result import Scored
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work
from persona_lens.runs.rollouts import Rollout
from persona_lens.runs.settings import settings_json
from persona_lens.traits import Arm, Trait, load_trait
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.provenance import THINKING

VECTORS = "vectors.safetensors"
SUMMARY = "summary.json"
SCORES = "scores.jsonl"
LIKELIHOOD = "likelihood"


@dataclass(frozen=True, repr=False, eq=False)
class Extraction(Scored):
    """What an extraction yields.

    Attributes:
        vectors: The persona vectors.
        judge: The judge; the likelihood judge is calibrated on this extraction. Or the scores that came with responses.
        rollouts: Every response.
        scores: The score of each, and whether it was kept, as JSON values.
        summary: See `Result`.
        folder: See `Result`.
    """

    kind = "extraction"
    vectors: PersonaVectors
    judge: Judge | ExternalScores
    rollouts: list[Rollout]
    scores: list[dict[str, Any]]
    summary: dict[str, Any]
    folder: Path | None = None


def extract(
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
    """Extract a trait's vectors.

    Args:
        backend: The model.
        trait: A trait, its name, or a path to its YAML file.
        folder: Run folder, kept and resumed; None keeps everything in memory.
        settings: See `ExtractionSettings`.
        judge: Who scores the responses; the likelihood judge by default.
        chat: Chat format; the model's own by default.
        responses: A file of responses that another program generated, or several, to be read instead of generating
            any; see `persona_lens.extraction.responses.read_responses`. The settings of sampling mean nothing then.
        allow_missing: Go on if ``responses`` lacks some that an extraction asks for.
        progress: Told how far the work is.

    Raises:
        ExtractionError: If the filter leaves nothing of an arm, or ``responses`` does not fit the trait or the model.
        RunError: If the folder belongs to another run.
        TraitError: If the trait cannot be found or read.
    """
    trait = load_trait(trait) if isinstance(trait, str) else trait
    settings, chat, read = settings or ExtractionSettings(), chat or chat_format(backend), responses
    if read is not None and not isinstance(read, ExternalRollouts):
        read = external_rollouts(backend, chat, trait, read, questions=settings.questions, allow_missing=allow_missing)
        for note in read.notes:
            warnings.warn(note, stacklevel=2)
    experiment = _experiment(backend, trait, settings, chat, judge, read)  # what cannot be run claims no folder
    likelihood = LikelihoodJudge(backend, chat, trait, pairs=settings.judge_pairs)
    scoring = judge or (read.scores if read else None)
    config: dict[str, Any] = {
        "kind": "extraction",
        "settings": settings.of_reading() if read else settings_json(settings),
        **({"responses": read.to_json()} if read else {}),
        "judge": scoring.describe() if scoring else {"judge": LIKELIHOOD, "pairs": likelihood.pairs},
        **subject_config(backend, trait, chat),
    }
    with run_folder(folder, config) as run:
        answers = experiment.run(run, progress)
        scoring, judged = _judged(scoring, answers, likelihood, run, progress)
        filtered = filter_responses(experiment.requests, judged, settings, _answered(chat, answers))
        # As the run began with it: a device of another number makes no other vectors.
        known = {**(run.config if run else config), "judge": as_used(scoring.describe(), judged)}
        vectors = _vectors(trait, answers, judged, filtered, settings, known)
        summary, scores = _summary(vectors, judged, filtered, answers.rollouts), _scores(judged, filtered)
        if run is not None:
            run.write_rows(SCORES, scores)
            run.write_bytes(VECTORS, vectors.to_bytes())
            run.write_json(SUMMARY, summary)
    return Extraction(vectors, scoring, answers.rollouts, scores, plain(summary), run.path if run else None)


def extraction_work(
    backend: Backend,
    trait: Trait,
    settings: ExtractionSettings,
    chat: ChatFormat,
    judge: Judge | None = None,
    given: ExternalRollouts | None = None,
) -> tuple[Work, ...]:
    """What `extract` with these arguments would ask of the model, and of the judge's; nothing runs."""
    if judge is None and (given is None or given.scores is None):
        judge = LikelihoodJudge(backend, chat, trait, pairs=settings.judge_pairs)
    return _experiment(backend, trait, settings, chat, judge, given).work()


def means_read(chat: ChatFormat, settings: ExtractionSettings) -> tuple[Read, ...]:
    """The means of each response: where the model may think before it answers, of its thinking and its answer too."""
    return (*Read.means(sinks=settings.sinks), *part_means(chat))


def _experiment(
    backend: Backend,
    trait: Trait,
    settings: ExtractionSettings,
    chat: ChatFormat,
    judge: Judge | None,
    given: ExternalRollouts | None,
) -> Experiment:
    requests = plan_requests(trait, settings) if given is None else given.requests
    reads = (*means_read(chat, settings), Read(ReadKind.RESPONSE_NORM))
    judges = {ONLY: judge} if judge else {}
    return Experiment(backend, chat, requests, settings.rollouts, judges, reads=reads, given=given)


def _judged(
    scoring: Judge | ExternalScores | None,
    answers: Answers,
    likelihood: LikelihoodJudge,
    run: RunFolder | None,
    progress: Progress,
) -> tuple[Judge | ExternalScores, list[Judgement]]:
    """Who scored, and the scores; without a judge or scores that came, by likelihood, calibrated on these answers."""
    if isinstance(scoring, ExternalScores):
        return scoring, list(scoring.judgements)
    if scoring is not None:
        return scoring, answers.judgements
    evidence = rollout_evidence(likelihood, answers.rollouts, run, progress=progress)
    known = [(e.log_odds, r.request.labels["arm"]) for e, r in zip(evidence, answers.rollouts, strict=True) if e]
    positive = [arm == Arm.POSITIVE for _, arm in known]
    unanswered = (_answered(likelihood.chat, answers) or []).count(False)
    if unanswered and len(set(positive)) < len(Arm):
        raise ExtractionError(
            f"{unanswered} of {len(answers.rollouts)} responses came to no answer that could be judged: the model was "
            "still thinking when their tokens ran out; allow for more (--max-new-tokens), in a new folder (--out)"
        )
    calibration = fit_calibration([x for x, _ in known], positive, likelihood.pairs)
    judge = LikelihoodJudge(likelihood.backend, likelihood.chat, likelihood.trait, calibration)
    return judge, [judge.judgement_of(each) for each in evidence]


def _vectors(
    trait: Trait,
    answers: Answers,
    judged: Sequence[Judgement],
    filtered: Filtered,
    settings: ExtractionSettings,
    config: Mapping[str, Any],
) -> PersonaVectors:
    """The vectors, with everything that they rest on and all that is known of them in their provenance."""
    collected = answers.collected
    of_kept = (collected.requests, filtered.kept, collected.reductions)
    means = arm_means(*of_kept)
    separation = held_out_separation(*of_kept, means, settings.seed)
    provenance = {**config, "counts": filtered.counts, "separation": separation}
    if means.thought:
        provenance[THINKING] = thinking_told(answers.rollouts, sum(means.thought.values()))
    if not settings.sinks:
        provenance["prompt_mean_sinks"] = False
    if trait.graded_prompts:  # so that a study needs nothing but the vectors
        provenance["trait"] = {**config["trait"], "graded_prompts": list(trait.graded_prompts)}
    vectors = PersonaVectors(trait.name, ModelInfo(**config["model"]), means.difference(), provenance)
    kept = KeptResponses.of(collected, answers.rollouts, judged, filtered.kept)
    return vectors.with_provenance(diagnostics=kept.diagnostics(vectors, means.residual_norms))


def _answered(chat: ChatFormat, answers: Answers) -> list[bool] | None:
    """Of a model that may think, whether each response came to an answer."""
    return [bool(each.response.strip()) for each in answers.rollouts] if chat.may_reason else None


def _summary(
    vectors: PersonaVectors, judged: Sequence[Judgement], filtered: Filtered, rollouts: Sequence[Rollout]
) -> dict[str, Any]:
    scores = [(r.request.labels["arm"], j.trait.value) for r, j in zip(rollouts, judged, strict=True)]
    by_arm = {arm.value: [value for of, value in scores if of == arm and value is not None] for arm in Arm}
    return {
        "trait": vectors.trait,
        "model": asdict(vectors.model),
        "judge": dict(vectors.judge),
        "responses": len(rollouts),
        "tokens": sum(len(rollout.response_ids) for rollout in rollouts),
        "mean_score": {arm: sum(values) / len(values) for arm, values in by_arm.items() if values},
        "counts": filtered.counts,
        "norms": {name: vectors.norms(name).tolist() for name in vectors.directions},
        "separation": vectors.provenance["separation"],
        "diagnostics": vectors.provenance["diagnostics"],
        **({HOLD_REASONING: True} if vectors.stored("chat").get(HOLD_REASONING) else {}),
        **({THINKING: vectors.provenance[THINKING]} if THINKING in vectors.provenance else {}),
    }


def _scores(judged: Sequence[Judgement], filtered: Filtered) -> list[dict[str, Any]]:
    return list(map(_score_row, judged, filtered.kept))


def _score_row(judgement: Judgement, kept: bool) -> dict[str, Any]:
    trait, coherence = judgement.trait, judgement.coherence
    scored = {"score": trait.value, "reason": trait.reason, "kept": kept}
    return {**scored, "coherence": coherence.value} if coherence else scored
