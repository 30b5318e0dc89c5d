"""What an extraction asks, which responses count, and the means of their activations (method, section 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from persona_lens.backend import Read, ReadKind
from persona_lens.core.errors import PersonaLensError
from persona_lens.judging import Judgement, Score
from persona_lens.judging.reading import PAIRS
from persona_lens.runs.rollouts import Request, Rollout, row_seed
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import Arm, Trait
from persona_lens.vectors.provenance import ANSWER_MEAN, DEFAULT_REDUCTION, THINKING_MEAN
from persona_lens.vectors.separation import FOLDS, null_units, separation_row, unit

if TYPE_CHECKING:
    from persona_lens.models import ChatFormat


def own_mean(thinks: bool) -> str:
    """Which mean of a response counts where no other is named: that of its answer, if the model thinks before it."""
    return ANSWER_MEAN if thinks else DEFAULT_REDUCTION


def part_means(chat: ChatFormat) -> tuple[Read, ...]:
    """What is read of responses beside their means, where the model may think before it answers."""
    return (Read(ReadKind.ANSWER_MEAN), Read(ReadKind.THINKING_MEAN)) if chat.may_reason else ()


def thinking_told(rollouts: Sequence[Rollout], thought: int) -> dict[str, Any]:
    """What is said of the vectors of a model that thought before it answered.

    Args:
        rollouts: Every response.
        thought: How many of those that count hold any thinking.
    """
    return {
        "default_reduction": own_mean(thought > 0),
        "kept_responses_with_thinking": thought,
        "responses_without_answer": sum(not each.response.strip() for each in rollouts),
    }


def mean_read(chat: ChatFormat, reduction: str) -> ReadKind:
    """Which mean of a response vectors are held against: theirs, if they are of a part, or else the model's own.

    Args:
        chat: The chat format of the model that responds.
        reduction: Which of the vectors.
    """
    return ReadKind(reduction if reduction in (ANSWER_MEAN, THINKING_MEAN) else own_mean(chat.may_reason))


def described_mean(kind: ReadKind) -> dict[str, str]:
    """What a run's configuration says of the mean that is read; nothing of that of whole responses."""
    return {} if kind == DEFAULT_REDUCTION else {"mean": kind.value}


class ExtractionError(PersonaLensError):
    """An extraction that cannot yield vectors."""


@dataclass(frozen=True)
class ExtractionSettings:
    """Everything about an extraction besides the model and the trait (method, section 2).

    Attributes:
        samples: Responses for each question and instruction; the paper takes 10.
        questions: How many of the trait's extraction questions are used; the paper uses all 20.
        seed: Base of every row's seed.
        threshold: A positive response is kept with a score of at least this, a negative one below it.
        coherence: A response is kept only if its coherence is at least this, where the judge or a file gives one.
        paired: Keep a response only if its twin of the other arm is kept too, as the paper's authors do.
        sinks: Take attention sinks into the prompt mean, as the paper's authors do; they dominate it.
        judge_pairs: Instruction pairs that the likelihood judge compares, 1 to 5; other judges have no use for it.
        rollouts: How responses are made.
    """

    samples: int = 1
    questions: int = 20
    seed: int = 0
    threshold: float = 50.0
    coherence: float = 50.0
    paired: bool = True
    sinks: bool = False
    judge_pairs: int = PAIRS
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ExtractionError(f"samples must be at least 1, got {self.samples}")
        if self.samples > 1 and self.rollouts.temperature == 0:
            raise ExtractionError("at temperature 0 all samples are the same; set samples to 1, or a temperature")
        if self.questions < 2:
            raise ExtractionError(f"questions must be at least 2, got {self.questions}: the separation holds some out")
        if not 0 < self.threshold < 100:
            raise ExtractionError(f"threshold must be between 0 and 100, got {self.threshold}")
        if not 0 <= self.coherence <= 100:
            raise ExtractionError(f"coherence must be from 0 to 100, got {self.coherence}")

    def of_reading(self) -> dict[str, Any]:
        """Those that mean something where responses are given and nothing is sampled, as JSON values."""
        kept = asdict(self)
        del kept["samples"]
        kept["rollouts"] = {name: kept["rollouts"][name] for name in ("batch_size", "batch_tokens")}
        return kept


def plan_requests(trait: Trait, settings: ExtractionSettings) -> list[Request]:
    """One request for each question, pair, sample and arm; twins of the two arms stand side by side.

    Raises:
        ExtractionError: If more questions are asked for than the trait has.
    """
    available = len(trait.extraction_questions)
    if settings.questions > available:
        raise ExtractionError(f"{settings.questions} questions asked for, trait {trait.name} has {available}")
    return [
        Request(
            system=trait.system_prompt(arm, pair),
            question=trait.extraction_questions[question],
            seed=row_seed(settings.seed, "extraction", question, pair, sample, arm),
            labels={"arm": arm.value, "question_number": question, "pair": pair, "sample": sample},
        )
        for question in range(settings.questions)
        for pair in range(len(trait.instructions))
        for sample in range(settings.samples)
        for arm in Arm
    ]


@dataclass(frozen=True)
class Filtered:
    """The outcome of the filter.

    Attributes:
        kept: For each request, whether its response counts.
        counts: By arm: how many were kept, failed the threshold, were incoherent, lost their twin, had no score, or, of
            a model that thinks, never came to an answer.
    """

    kept: tuple[bool, ...]
    counts: dict[str, dict[str, int]]


KEPT, LOST_TWIN = "kept", "lost_twin"
NO_SCORE, FAILED, INCOHERENT = "no_score", "failed_threshold", "incoherent"
NO_ANSWER = "no_answer"


def filter_responses(
    requests: Sequence[Request],
    judged: Sequence[Judgement],
    settings: ExtractionSettings,
    answered: Sequence[bool] | None = None,
) -> Filtered:
    """Keep positive responses that score at least the threshold and negative ones below it, if they are coherent.

    Args:
        requests: What was asked, labelled with its arm; twins share all other labels.
        judged: One for each request.
        settings: The thresholds, and whether a response is kept only if its twin is there and passes too.
        answered: Of a model that thinks, whether each response came to an answer; one that did not is not kept.

    Raises:
        ExtractionError: If nothing is left of an arm, with the scores seen.
    """
    faults = [_fault(request, judgement, settings) for request, judgement in zip(requests, judged, strict=True)]
    if answered is not None:
        faults = [fault if there else NO_ANSWER for fault, there in zip(faults, answered, strict=True)]
    names = (KEPT, FAILED, INCOHERENT, LOST_TWIN, NO_SCORE, *([] if answered is None else [NO_ANSWER]))
    passing = Counter(_pair(request) for request, fault in zip(requests, faults, strict=True) if fault is None)
    outcomes = [
        fault or (KEPT if not settings.paired or passing[_pair(request)] == len(Arm) else LOST_TWIN)
        for request, fault in zip(requests, faults, strict=True)
    ]
    counts = {}
    for arm in Arm:
        own = [number for number, request in enumerate(requests) if request.labels["arm"] == arm]
        found = [outcomes[number] for number in own]
        counts[arm.value] = {name: found.count(name) for name in names}
        if KEPT not in found:
            scores = [judged[number].trait for number in own]
            raise _nothing_left(arm, scores, found.count(INCOHERENT), settings, found.count(NO_ANSWER))
    return Filtered(tuple(outcome == KEPT for outcome in outcomes), counts)


def _fault(request: Request, judgement: Judgement, settings: ExtractionSettings) -> str | None:
    """Why a response does not count by itself; None if it does."""
    value, coherence = judgement.trait.value, judgement.coherence
    if value is None:
        return NO_SCORE
    if (value >= settings.threshold) != (Arm(request.labels["arm"]) is Arm.POSITIVE):
        return FAILED
    if coherence is not None and (coherence.value is None or coherence.value < settings.coherence):
        return INCOHERENT
    return None


def _pair(request: Request) -> tuple[object, ...]:
    return tuple(value for name, value in sorted(request.labels.items()) if name != "arm")


def _nothing_left(
    arm: Arm, scores: Sequence[Score], incoherent: int, settings: ExtractionSettings, unanswered: int
) -> ExtractionError:
    seen = sorted(score.value for score in scores if score.value is not None)
    what = f"from {seen[0]:.0f} to {seen[-1]:.0f}, median {median(seen):.0f}" if seen else "none at all"
    hint = "let each arm be filtered on its own (--unpaired), " if settings.paired else ""
    also = f" {incoherent} of them were not coherent (below {settings.coherence:g})." if incoherent else ""
    if unanswered:
        also += f" {unanswered} of them were still thinking when their tokens ran out (--max-new-tokens)."
    reason = next((score.reason for score in scores if score.reason), None)
    why = f" Why there is no score: {reason}." if reason and not seen else ""
    return ExtractionError(
        f"no response of the {arm} arm is left: its scores were {what}, the threshold is {settings.threshold:g}."
        f"{also}{why} Choose another threshold, {hint}or take more samples, each with a new folder (--out); "
        "rollouts.jsonl shows whether the model follows the trait's instructions."
    )


Reductions = Callable[[], Iterator[tuple[list[int], dict[str, Tensor]]]]


@dataclass
class ArmMeans:
    """Sums over the kept responses, by arm and by fold of the questions, in float64.

    Attributes:
        sums: [arm, fold] -> reduction -> float64 [layers, d_model].
        counts: [arm, fold] -> number of responses.
        thought: [arm, fold] -> number of responses with any thinking, over which its mean is.
        lengths: float64 [layers]: of mean lengths of the residual over a response's tokens, where they were read.
        measured: int64 [layers]: of how many responses.
    """

    sums: dict[tuple[Arm, int], dict[str, Tensor]]
    counts: dict[tuple[Arm, int], int]
    thought: dict[tuple[Arm, int], int] = field(default_factory=dict)
    lengths: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    measured: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))

    @property
    def residual_norms(self) -> list[float] | None:
        """Mean length of the residual at each layer; None where it was not read."""
        return (self.lengths / self.measured).tolist() if bool((self.measured > 0).all()) else None

    @property
    def reduction(self) -> str:
        """What vectors are of where nothing is said: of the answers, if any response thought."""
        return own_mean(bool(self.thought))

    def difference(self, folds: Sequence[int] = tuple(range(FOLDS))) -> dict[str, Float[Tensor, "layers d_model"]]:
        """mean(positive) - mean(negative) over the questions of the folds, by reduction, float32."""
        positive, negative = self._mean(Arm.POSITIVE, folds), self._mean(Arm.NEGATIVE, folds)
        names = [name for name in positive if name in negative and (name != ANSWER_MEAN or self.thought)]
        return {name: (positive[name] - negative[name]).float() for name in names}

    def _mean(self, arm: Arm, folds: Sequence[int]) -> dict[str, Tensor]:
        present = [fold for fold in folds if (arm, fold) in self.sums]
        if not present:
            return {}
        means = {}
        for name in self.sums[arm, present[0]] | self.sums[arm, present[-1]]:
            counts = self.thought if name == THINKING_MEAN else self.counts
            there = [fold for fold in present if name in self.sums[arm, fold]]
            total = torch.stack([self.sums[arm, fold][name] for fold in there]).sum(dim=0)
            means[name] = total / sum(counts[arm, fold] for fold in there)
        return means


def arm_means(requests: Sequence[Request], kept: Sequence[bool], reductions: Reductions) -> ArmMeans:
    """Sum the kept responses' reductions, one shard in memory at a time."""
    found = ArmMeans({}, {})
    for indices, tensors in reductions():
        for position, index in enumerate(indices):
            if not kept[index]:
                continue
            key = (Arm(requests[index].labels["arm"]), fold_of(requests[index]))
            found.counts[key] = found.counts.get(key, 0) + 1
            sums = found.sums.setdefault(key, {})
            for name, values in tensors.items():
                value = values[position].double()
                if name == ReadKind.RESPONSE_NORM:  # NaN at a layer where every token is a sink
                    found.lengths = found.lengths + value.nan_to_num()
                    found.measured = found.measured + value.isfinite()
                elif name != THINKING_MEAN or bool(value.isfinite().all()):  # not every response thinks
                    if name == THINKING_MEAN:
                        found.thought[key] = found.thought.get(key, 0) + 1
                    sums[name] = sums[name] + value if name in sums else value
    return found


def fold_of(request: Request) -> int:
    """The fold of a request's question: even and odd ones."""
    return int(request.labels["question_number"]) % FOLDS


def held_out_separation(
    requests: Sequence[Request], kept: Sequence[bool], reductions: Reductions, means: ArmMeans, seed: int
) -> list[dict[str, Any]]:
    """How well projections tell the arms apart, by layer, on questions that the direction was not made from.

    The direction comes from the even questions and is tested on the odd ones, and the other way round; the two results
    are averaged. Beside it stand random directions: some of them separate the arms quite well by luck, and a vector
    must do better than those.

    Returns:
        `separation_row` of each layer. Empty if a fold has fewer than two responses of one arm.
    """
    directions = [means.difference([1 - fold]).get(means.reduction) for fold in range(FOLDS)]
    if any(means.counts.get((arm, fold), 0) < 2 for arm in Arm for fold in range(FOLDS)):
        return []
    units = torch.stack([unit(d) for d in directions if d is not None])  # [fold, layers, d_model]
    randoms = null_units(units.shape[1], units.shape[2], seed)
    values: dict[tuple[Arm, int], list[Tensor]] = {(arm, fold): [] for arm in Arm for fold in range(FOLDS)}
    for indices, tensors in reductions():
        for position, index in enumerate(indices):
            if kept[index]:
                fold, h = fold_of(requests[index]), tensors[means.reduction][position]
                tried = torch.cat([units[fold].unsqueeze(0), randoms])
                found = einsum(h, tried, "layers d_model, directions layers d_model -> layers directions")
                values[Arm(requests[index].labels["arm"]), fold].append(found)
    columns = {
        key: rearrange(rows, "rows layers directions -> layers directions rows").double().numpy()
        for key, rows in values.items()
    }
    return [
        separation_row(
            layer,
            [(columns[Arm.POSITIVE, fold][layer], columns[Arm.NEGATIVE, fold][layer]) for fold in range(FOLDS)],
        )
        for layer in range(units.shape[1])
    ]
