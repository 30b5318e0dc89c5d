"""`Findings`: what a screening comes to, found in what was scored; and the files about its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from persona_lens.core.progress import Progress
from persona_lens.core.statistics import auc
from persona_lens.judging import Exchange, Judge, Judgement
from persona_lens.judging.recording import judge_exchanges
from persona_lens.monitoring import Panel
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.screening.rows import (
    BASE,
    DECISIONS,
    QUANTITIES,
    REJECTS,
    Decision,
    Excerpt,
    Key,
    base_of,
    excerpts_of,
    reject_of,
    result_of,
    scored_windows,
    split,
    write_subsets,
    writing_lines,
    writing_results,
)
from persona_lens.screening.samples import ScreeningError
from persona_lens.screening.survey import (
    Flagging,
    RowThreshold,
    Survey,
    clean_label,
    decide,
    largest,
    separation_of,
    threshold_of,
)
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.provenance import FORECASTS, Quantity, ShiftForecast

CONFIRMED = 50  # from this score of a judge on
BINS = 40
_LEAST = 3  # datasets that a forecast is fitted on

Opinions = Mapping[str, Mapping[Key, Judgement]]
"""By trait and row, what a judge said."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What a screening comes to.

    Attributes:
        survey: What was scored.
        panel: The traits.
        score: By which value rows are ranked and flagged.
        thresholds: One for each trait's gauge; none without a reference.
    """

    survey: Survey
    panel: Panel
    score: Quantity
    thresholds: tuple[RowThreshold, ...]

    @staticmethod
    def of(survey: Survey, panel: Panel, flagging: Flagging) -> Findings:
        """The thresholds of a survey, taken from its clean references."""
        score = flagging.score or Quantity.RAW
        reference = survey.rows_of(survey.first_reference, len(survey.datasets))
        thresholds = [
            threshold_of(
                str(gauge), survey.column(score, at)[reference], flagging.false_positive_rate, flagging.undecided
            )
            for at, gauge in enumerate(panel.gauges)
            if survey.references
        ]
        return Findings(survey, panel, score, tuple(thresholds))

    @property
    def gauges(self) -> list[str]:
        """Names of the traits' gauges."""
        return list(map(str, self.panel.gauges))

    def scores(self, gauge: int) -> NDArray[np.float64]:
        """Float64 [rows]."""
        return self.survey.column(self.score, gauge)

    @property
    def screened(self) -> slice:
        """The rows that are not of a reference."""
        return self.survey.rows_of(0, self.survey.first_reference)

    def decisions(self) -> list[Decision | None]:
        """What becomes of each row; None where nothing is flagged, or the row has no values."""
        rejected = self.survey.table["rejected"]
        if not self.thresholds:
            return [None] * len(rejected)
        scores = np.stack([self.scores(gauge) for gauge in range(len(self.thresholds))], axis=1)
        places = np.where(rejected, len(DECISIONS), decide(self.thresholds, scores))
        return [(*DECISIONS, None)[place] for place in places]

    def extremes(self, gauge: int, most: int, sign: int = 1) -> list[tuple[Key, float]]:
        """The screened rows with the largest values, or the smallest, with these."""
        return self._found(gauge, largest(sign * self.scores(gauge)[self.screened], most))

    def flagged(self, gauge: int, most: int) -> list[tuple[Key, float]]:
        """The screened rows that a trait flags, the largest first, with their values."""
        if not self.thresholds:
            return []
        scores = self.scores(gauge)[self.screened]
        return self._found(gauge, largest(np.where(scores > self.thresholds[gauge].high, scores, np.nan), most))

    def subsets(self, most: int) -> dict[str, set[Key]]:
        """Screened rows by the values of the first trait: so many of the largest, of the smallest, and at random."""
        known = np.flatnonzero(np.isfinite(self.scores(0)[self.screened]))
        drawn = np.random.default_rng(self.survey.seed).permutation(known)[:most]
        random = {(int(row["dataset"]), int(row["number"])) for row in self.survey.table[drawn]}
        high, low = ({key for key, _ in self.extremes(0, most, sign)} for sign in (1, -1))
        return {"high": high, "random": random, "low": low}

    def _found(self, gauge: int, places: NDArray[np.intp]) -> list[tuple[Key, float]]:
        table, scores = self.survey.table[places], self.scores(gauge)[places]
        keys = zip(table["dataset"].tolist(), table["number"].tolist(), strict=True)
        return list(zip(keys, scores.tolist(), strict=True))

    def dataset(self, number: int, decisions: Sequence[Decision | None]) -> dict[str, Any]:
        """The figures of a dataset, as JSON values."""
        survey, own = self.survey, self.survey.datasets[number]
        rows = survey.rows_of(number, number + 1)
        tally = survey.tally(rows, self.gauges, number)
        groups = {
            group: survey.tally(np.flatnonzero(survey.table["group"] == code), self.gauges, number, code + 1)
            for code, (dataset, group) in enumerate(survey.groups)
            if dataset == number
        }
        flagged = [int((self.scores(at)[rows] > each.high).sum()) for at, each in enumerate(self.thresholds)]
        decided = {each.value: decisions[rows].count(each) for each in DECISIONS}
        return {
            "name": own.name,
            "form": own.form.value,
            "reference": number >= survey.first_reference,
            **tally,
            "decisions": decided if self.thresholds else None,
            "flagged": dict(zip(self.gauges, flagged, strict=True)) if self.thresholds else None,
            "groups": groups,
            "forecasts": _forecasts(self.panel, tally["means"]),
        }

    def histogram(self, gauge: int) -> dict[str, Any]:
        """How many rows of each dataset have a trait's values, in bins over all there are."""
        scores = self.scores(gauge)
        known = scores[np.isfinite(scores)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        numbers = range(len(self.survey.datasets))
        own = [scores[self.survey.rows_of(number, number + 1)] for number in numbers]
        counts = [np.histogram(each[np.isfinite(each)], edges)[0].tolist() for each in own]
        return {"edges": edges.tolist(), "counts": counts}


def sum_up(
    findings: Findings, whole: Panel, flagging: Flagging, judges: Mapping[str, Judge], progress: Progress
) -> tuple[dict[str, Any], list[Decision | None], Opinions]:
    """Sum up what was scored.

    Args:
        findings: What there is.
        whole: The traits, and random directions behind them.
        flagging: How rows are ranked and flagged.
        judges: By trait: asked about flagged rows.
        progress: Told how far the judging is.

    Returns:
        Every figure as JSON values, what becomes of each row, and what the judges said.
    """
    gauges, survey = findings.gauges, findings.survey
    decisions = findings.decisions()
    ends = {
        end: [findings.extremes(at, flagging.top_k, sign) for at in range(len(gauges))]
        for end, sign in (("top", 1), ("bottom", -1))
    }
    asked = [findings.flagged(at, flagging.judged if judges else 0) for at in range(len(gauges))]
    shown = {key for each in (*ends["top"], *ends["bottom"], *asked) for key, _ in each}
    excerpts = excerpts_of(survey.datasets, shown)
    opinions: dict[str, dict[Key, Judgement]] = {}
    for number, (trait, judge) in enumerate(judges.items()):
        # Of a trait at several layers, on what any of them flagged.
        own = zip(findings.panel.gauges, asked, strict=True)
        keys = sorted({key for gauge, found in own if gauge.trait == trait for key, _ in found})
        opinions[trait] = _opinions(survey.run, judge, number, trait, {key: excerpts[key] for key in keys}, progress)

    def entry(gauge: int, key: Key, value: float) -> dict[str, Any]:
        said = opinions.get(findings.panel.gauges[gauge].trait, {}).get(key)
        about = {"dataset": survey.datasets[key[0]].name, "row": key[1], "id": excerpts[key].id, "value": value}
        texts = {"prompt": excerpts[key].prompt, "response": excerpts[key].response}
        return {**about, **texts, "judge": said.trait.value if said else None}

    figures = {
        "gauges": gauges,
        "score": findings.score.value,
        "datasets": [findings.dataset(number, decisions) for number in range(len(survey.datasets))],
        "thresholds": [threshold.to_json() for threshold in findings.thresholds],
        "histograms": {gauge: findings.histogram(at) for at, gauge in enumerate(gauges)},
        "labels": _labels(survey, len(gauges), whole, flagging),
        "extremes": {
            gauge: {end: [entry(at, *item) for item in found[at]] for end, found in ends.items()}
            for at, gauge in enumerate(gauges)
        },
        "opinions": {trait: _opinion(found) for trait, found in opinions.items()},
    }
    return figures, decisions, opinions


def write_rows(
    findings: Findings,
    decisions: Sequence[Decision | None],
    opinions: Opinions,
    whole: Panel,
    *,
    generated: bool,
    subsets: int = 0,
) -> None:
    """Write results of every row, rejects, base responses that were generated, datasets split, and subsets."""
    survey, gauges = findings.survey, findings.gauges
    run, stems = survey.run, _stems([dataset.source.stem for dataset in survey.datasets])
    given = iter(decisions)
    windows = groupby(scored_windows(run, len(whole.gauges)), key=lambda rows: rows[0].dataset)
    with writing_results(run, gauges, list(opinions)) as results, writing_lines(run, REJECTS) as rejects:
        for number, own in windows:
            name, reference = survey.datasets[number].name, number >= survey.first_reference
            with writing_lines(run, f"{BASE}/{stems[number]}.jsonl") if generated else nullcontext() as base:
                for rows in own:
                    results(
                        [
                            result_of(row, name, reference, decision, gauges)
                            | {f"judge.{trait}": _said(said, (number, row.number)) for trait, said in opinions.items()}
                            for row, decision in zip(rows, islice(given, len(rows)), strict=True)
                            if row.problem is None
                        ]
                    )
                    rejects([reject_of(row, name) for row in rows if row.problem is not None])
                    if base is not None:
                        base(list(map(base_of, rows)))
    if subsets:
        write_subsets(survey.datasets[: survey.first_reference], findings.subsets(subsets), run)
    for number in range(survey.first_reference) if findings.thresholds else ():
        split(survey.datasets[number], decisions[survey.rows_of(number, number + 1)], run, stems[number])


def _stems(names: Sequence[str]) -> list[str]:
    """What files of each dataset begin with: its name where all are different, on any file system."""
    if len({name.casefold() for name in names}) == len(names):
        return list(names)
    return [f"{name}-{number}" if len(set(names)) == 1 else f"{number}-{name}" for number, name in enumerate(names)]


def _opinions(
    run: RunFolder, judge: Judge, number: int, trait: str, texts: Mapping[Key, Excerpt], progress: Progress
) -> dict[Key, Judgement]:
    """Second opinions on rows."""
    if not texts:
        return {}
    exchanges = [Exchange(each.prompt, each.response) for each in texts.values()]
    prefix, label = file_prefix(number, trait), f"second opinions on {trait}"
    said = judge_exchanges(judge, exchanges, run, prefix=prefix, label=label, progress=progress)
    return dict(zip(texts, said, strict=True))


def _opinion(found: Mapping[Key, Judgement]) -> dict[str, Any]:
    scores = [said.trait.value for said in found.values() if said.trait.value is not None]
    return {
        "judged": len(found),
        "without_score": len(found) - len(scores),
        "confirmed": sum(score >= CONFIRMED for score in scores),
        "mean": sum(scores) / len(scores) if scores else None,
    }


def _said(found: Mapping[Key, Judgement], key: Key) -> float | None:
    return found[key].trait.value if key in found else None


def _labels(survey: Survey, traits: int, whole: Panel, flagging: Flagging) -> dict[str, Any] | None:
    """By label, quantity and gauge: AUC against the clean rows, and that of random directions at the same layer."""
    if not survey.labels:
        return None
    clean = clean_label(survey.labels, flagging.clean)
    rows = {label: np.flatnonzero(survey.table["label"] == code) for code, label in enumerate(survey.labels)}
    found: dict[str, Any] = {}
    for label in (each for each in survey.labels if each != clean):
        for quantity in QUANTITIES:
            for number, gauge in enumerate(whole.gauges[:traits]):
                values = survey.column(quantity, number)
                separation = separation_of(values[rows[label]], values[rows[clean]])
                if separation is None:
                    continue
                nulls = [n for n in range(traits, len(whole.gauges)) if whole.gauges[n].layer == gauge.layer]
                columns = (survey.column(quantity, n) for n in nulls)
                beside = [_auc(column[rows[label]], column[rows[clean]]) for column in columns]
                entry = {**separation.to_json(), "random": beside}
                found.setdefault(label, {}).setdefault(quantity.value, {})[str(gauge)] = entry
    return {"clean": clean, "labels": found}


def _auc(labelled: NDArray[np.float64], clean: NDArray[np.float64]) -> float:
    return auc(labelled[np.isfinite(labelled)], clean[np.isfinite(clean)])


def _forecasts(panel: Panel, means: Mapping[str, Any]) -> dict[str, Any]:
    """The shift to expect of finetuning on a dataset, by gauge, where vectors carry a forecast of what was measured."""
    found = {}
    for gauge in panel.gauges:
        for forecast in gauge.vectors.forecasts:
            mean = means.get(str(gauge), {}).get(forecast.quantity)
            if forecast.layer == gauge.layer and mean is not None:
                about = {"quantity": forecast.quantity, "n": forecast.n, "source": forecast.source}
                found[str(gauge)] = {**about, **forecast.predict(mean["mean"]).to_json()}
    return found


def fit_forecast(
    trait: str,
    layer: int,
    values: Sequence[float],
    shifts: Sequence[float],
    *,
    quantity: Quantity = Quantity.DIFFERENCE,
    source: str = "",
) -> ShiftForecast:
    """Fit a line by least squares.

    Args:
        trait: The trait.
        layer: Layer of the values.
        values: Mean value of each dataset.
        shifts: Trait score after finetuning on it, minus that before.
        quantity: Which value.
        source: What was finetuned, in words.

    Raises:
        ScreeningError: If there are fewer than three datasets, or their values are all the same.
    """
    x, y = np.asarray(values, dtype=np.float64), np.asarray(shifts, dtype=np.float64)
    if len(x) != len(y) or len(x) < _LEAST or not np.ptp(x):
        raise ScreeningError(
            f"a forecast is fitted on at least {_LEAST} datasets of different values, each with a shift; got "
            f"{len(x)} values and {len(y)} shifts"
        )
    line = stats.linregress(x, y)
    residuals = y - line.intercept - line.slope * x
    return ShiftForecast(
        trait,
        layer,
        quantity,
        float(line.slope),
        float(line.intercept),
        float(np.sqrt((residuals**2).sum() / (len(x) - 2))),
        len(x),
        float(x.mean()),
        float(((x - x.mean()) ** 2).sum()),
        float(x.min()),
        float(x.max()),
        source,
    )


def with_forecasts(vectors: PersonaVectors, forecasts: Sequence[ShiftForecast]) -> PersonaVectors:
    """The same vectors with forecasts in their provenance, where `screen` finds them.

    Raises:
        ScreeningError: If a forecast is of another trait.
    """
    if other := [each.trait for each in forecasts if each.trait != vectors.trait]:
        raise ScreeningError(f"the forecast is of {other[0]!r}, but the vectors are of {vectors.trait!r}")
    return vectors.with_provenance(**{FORECASTS: [each.to_json() for each in forecasts]})
