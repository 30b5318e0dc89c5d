"""What comes before a study's questions, and how far where a prompt ends goes with what its replies show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from persona_lens.core.documents import Record
from persona_lens.core.statistics import CORRELATION, Ends, Verdict, jackknifed, pearson
from persona_lens.core.text import counted
from persona_lens.data.tables import read_rows, row_key
from persona_lens.monitoring.curves import MonitoringError
from persona_lens.traits import Arm, Trait, TraitError, load_trait
from persona_lens.vectors import PersonaVectors

ROLLOUTS, SCORES = "rollouts.jsonl", "scores.jsonl"
_ORDER = ("question_number", "pair", "sample", "arm")


class Kind(StrEnum):
    """What a condition is made of."""

    PROMPTS = "prompts"  # a graded system prompt
    SHOTS = "shots"  # a number of answered questions before the one that is asked


@dataclass(frozen=True)
class Condition:
    """What comes before a question.

    Attributes:
        kind: Of what it is made.
        level: Number of the graded prompt, from 1; or number of examples.
        system: System prompt, or None for none.
        examples: Questions and answers that come before, as turns of the conversation.
    """

    kind: Kind
    level: int
    system: str | None = None
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Such as ``prompt 3`` or ``5 shots``."""
        return f"prompt {self.level}" if self.kind is Kind.PROMPTS else counted(self.level, "shot")

    def to_json(self) -> dict[str, Any]:
        """The condition as JSON values."""
        return {"name": self.name, **asdict(self)}


def graded_conditions(trait: Trait) -> list[Condition]:
    """One condition for each of the trait's graded prompts.

    Raises:
        MonitoringError: If it has none.
    """
    if not trait.graded_prompts:
        raise MonitoringError(
            f"the trait {trait.name!r} has no graded prompts: write eight of them into its file, from holding the "
            "trait back to calling it forth (graded_prompts:), and name the file (--trait FILE)"
        )
    return [Condition(Kind.PROMPTS, level, prompt) for level, prompt in enumerate(trait.graded_prompts, 1)]


def shot_conditions(shots: Sequence[int], examples: Sequence[tuple[str, str]]) -> list[Condition]:
    """One condition for each number of examples; of a larger number, the first are those of the smaller ones.

    Raises:
        MonitoringError: If there are too few examples.
    """
    if max(shots) > len(examples):
        raise MonitoringError(
            f"{max(shots)} examples are asked for, but there are {len(examples)}: ask for fewer (--shots), or give the "
            "folder of a larger extraction (--examples)"
        )
    return [Condition(Kind.SHOTS, n, None, tuple(examples[:n])) for n in shots]


def graded_trait(vectors: PersonaVectors, trait: Trait) -> Trait:
    """The trait with graded prompts, where vectors from before there were any carry it without.

    They are taken from the trait of the same name and content that is found now; failing that, the trait is returned as
    it is.
    """
    if trait.graded_prompts:
        return trait
    try:
        found = load_trait(vectors.trait)
    except TraitError:
        return trait
    return found if found.content_hash() == trait.content_hash() else trait


def examples_of(folder: Path | str) -> list[tuple[str, str]]:
    """Answered questions that show the trait, from an extraction's run folder.

    Of each extraction question the response of the positive arm with the highest score is taken; the highest of all
    comes first.

    Args:
        folder: With the run's ``rollouts.jsonl`` and ``scores.jsonl``.

    Raises:
        MonitoringError: If it holds no such run.
        DataError: If a row cannot be read, naming the file and the line.
    """
    rollouts, scores = Path(folder) / ROLLOUTS, Path(folder) / SCORES
    for file in (rollouts, scores):
        if not file.exists():
            raise MonitoringError(
                f"there is no {file}, which examples are taken from: give the run folder of the extraction "
                "(--examples FOLDER), or study graded prompts only (--conditions prompts)"
            )
    places = {row_key(rollouts, line, row, _ORDER, MonitoringError): row for line, row in read_rows(rollouts)}
    judged = {
        row_key(scores, line, row, ("row",), MonitoringError)[0]: _score(scores, line, row)
        for line, row in read_rows(scores)
    }
    if set(judged) != set(range(len(places))):
        raise MonitoringError(f"{scores} has not one score for each of the {len(places)} responses in {rollouts.name}")
    try:
        # The order of the plan, which the numbers of the scores follow: positive before negative, as in `Arm`.
        ordered = sorted(places, key=lambda key: (*key[:3], key[3] != Arm.POSITIVE))
    except TypeError:
        raise MonitoringError(f"{rollouts} does not number questions, pairs and samples") from None
    best: dict[object, tuple[float, str, str]] = {}
    for number, key in enumerate(ordered):
        row, score = places[key], judged[number]
        asked, answer = row.get("question"), row.get("response")
        if key[3] != Arm.POSITIVE or score is None or not isinstance(asked, str) or not isinstance(answer, str):
            continue
        if answer.strip() and (key[0] not in best or score > best[key[0]][0]):
            best[key[0]] = (score, asked, answer.strip())
    ranked = sorted(best.values(), key=lambda found: -found[0])
    return [(asked, answer) for _, asked, answer in ranked]


def _score(file: Path, line: int, row: dict[str, Any]) -> float | None:
    score = row.get("score")
    if score is None or (isinstance(score, int | float) and 0 <= score <= 100):
        return score
    raise MonitoringError(f"{file}:{line}: a score is a number from 0 to 100, got {json.dumps(score)[:40]}")


LEAST = 3  # prompts; with fewer, every correlation is a coincidence
LEAST_SD = 1.0  # points: conditions whose scores vary less are left out within conditions (method, section 5)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A number with its 95% interval over questions (`core.statistics.jackknifed`); None where undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Null:
    """The same number for random directions: its mean, and the range of the middle 95% of them; None where undefined.

    Attributes:
        mean: Over the directions.
        low: 2.5th percentile.
        high: 97.5th percentile.
        n: Directions.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class LayerCorrelation(Record):
    """Correlations at one layer.

    Attributes:
        layer: Block index, 0-based.
        pearson: Over all prompts.
        spearman: Over all prompts, of ranks.
        within_pearson: Mean over conditions of the correlation within each.
        within_spearman: The same of ranks.
        null: ``pearson`` of random directions; None if there were none.
        within_null: ``within_pearson`` of random directions.
    """

    layer: int
    pearson: Measured
    spearman: Measured
    within_pearson: Measured
    within_spearman: Measured
    null: Null | None
    within_null: Null | None

    def verdict(self, null: Null | None) -> Verdict:
        """What may be said of where prompts end, and how their replies will be.

        ``reversed`` if the interval of ``pearson`` lies below 0, ``no null`` or ``clear`` if it lies above; ``clear``
        only if the value also exceeds what 97.5% of random directions have; ``unclear`` otherwise.

        Args:
            null: Random directions that had the vector's freedom: those of this layer, or the best of all layers.
        """
        r = self.pearson
        if r.value is None or r.low is None or r.high is None:
            return "unclear"
        if r.high < 0 or r.low <= 0:
            return "reversed" if r.high < 0 else "unclear"
        if null is None or null.high is None:
            return "no null"
        return "clear" if r.value > null.high else "unclear"


@dataclass(frozen=True)
class Correlations(Record):
    """How projections at several layers go with scores.

    Attributes:
        layers: One entry a layer.
        prompts: How many prompts they rest on.
        within: Conditions that count in the means within conditions.
        left_out: Conditions whose scores vary by less than a standard deviation of `LEAST_SD`, or have too few prompts.
        best_null: The largest ``pearson`` of each random direction over all layers: what choosing the best of the
            layers alone gives. None without random directions.
    """

    layers: tuple[LayerCorrelation, ...]
    prompts: int
    within: tuple[str, ...]
    left_out: tuple[str, ...]
    best_null: Null | None

    def at(self, layer: int) -> LayerCorrelation:
        """The entry of a layer."""
        return next(each for each in self.layers if each.layer == layer)


def correlate(
    projections: Values,
    scores: Values,
    conditions: Sequence[str],
    questions: Sequence[int],
    layers: Sequence[int],
    null: Values | None = None,
    *,
    seed: int = 0,
) -> Correlations:
    """Correlate projections with scores, one pair a prompt.

    Args:
        projections: [prompts, layers].
        scores: [prompts], the mean score of each prompt's responses.
        conditions: Name of each prompt's condition.
        questions: Number of each prompt's question; intervals are over questions.
        layers: Block indices.
        null: [prompts, layers, random directions].
        seed: Of the resampling.
    """
    groups = {name: np.flatnonzero(np.array([c == name for c in conditions])) for name in dict.fromkeys(conditions)}
    used = [name for name, rows in groups.items() if len(rows) >= LEAST and scores[rows].std(ddof=1) >= LEAST_SD]
    code = np.array([used.index(name) if name in used else -1 for name in conditions])
    measured = _statistics(projections, scores, code, len(used))
    ends = jackknifed(
        lambda rows: _statistics(projections[rows], scores[rows], code[rows], len(used)).ravel(),
        questions,
        CORRELATION,
        seed,
    )
    intervals = [ends[kind * len(layers) : (kind + 1) * len(layers)] for kind in range(4)]
    nulls = [None, None] if null is None else [_nulls(null, scores, code, len(used), kind) for kind in (0, 1)]
    found = []
    for at, layer in enumerate(layers):
        four = (_measured(measured[kind, at], intervals[kind][at]) for kind in range(4))
        beside = (None if each is None else _null(each[at]) for each in nulls)
        found.append(LayerCorrelation(layer, *four, *beside))  # type: ignore[arg-type]  # a star hides which is which
    return Correlations(
        tuple(found),
        len(scores),
        tuple(used),
        tuple(name for name in groups if name not in used),
        None if nulls[0] is None else _null(_largest(nulls[0])),
    )


def _statistics(x: Values, y: Values, code: NDArray[np.int64], n_used: int) -> Values:
    """[pearson, spearman, within pearson, within spearman] by layer; NaN where one is not defined."""
    groups = [np.flatnonzero(code == number) for number in range(n_used)]
    found = []
    for ranked in (False, True):
        within = [_r(x[rows], y[rows], ranked) for rows in groups if len(rows) >= LEAST]
        overall = _r(x, y, ranked) if len(y) >= LEAST else np.full(x.shape[1], np.nan)
        found.append((overall, _mean(np.array(within).reshape(len(within), x.shape[1]))))
    return np.array([found[0][0], found[1][0], found[0][1], found[1][1]])


def _r(x: Values, y: Values, ranked: bool) -> Values:
    return pearson(rankdata(x, axis=0), rankdata(y)) if ranked else pearson(x, y)


def _mean(rows: Values) -> Values:
    """The mean of each column's numbers; NaN in a column without any."""
    defined = np.isfinite(rows)
    count = defined.sum(axis=0)
    mean: Values = np.where(count > 0, np.where(defined, rows, 0).sum(axis=0) / np.maximum(count, 1), np.nan)
    return mean


def _nulls(null: Values, y: Values, code: NDArray[np.int64], n_used: int, kind: int) -> Values:
    """[layers, directions], ``pearson`` of each (kind 0) or ``within_pearson`` (kind 1)."""
    prompts, layers, directions = null.shape
    found = _statistics(null.reshape(prompts, layers * directions), y, code, n_used)
    by_layer: Values = found[2 * kind].reshape(layers, directions)
    return by_layer


def _measured(value: float, interval: Ends | None) -> Measured:
    if not np.isfinite(value):
        return Measured(None, None, None)
    return Measured(float(value), *(interval or (None, None)))


def _null(values: Values) -> Null:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return Null(None, None, None, 0)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Null(float(defined.mean()), float(low), float(high), len(defined))


def _largest(values: Values) -> Values:
    """Over layers; NaN for a direction without any."""
    lowest = np.where(np.isfinite(values), values, -np.inf).max(axis=0)
    return np.where(np.isfinite(lowest), lowest, np.nan)
