"""`Findings`: what a screening comes to, found in two passes over what was scored; and the files about its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from persona_lens.core.progress import Progress
from persona_lens.data.datasets import Dataset
from persona_lens.judging import Exchange, Judge, Judgement
from persona_lens.judging.recording import judge_exchanges
from persona_lens.monitoring import Panel
from persona_lens.runs import RunFolder, file_prefix
from persona_lens.screening.flagging import Flagging, Flags, split
from persona_lens.screening.rows import (
    BASE,
    QUANTITIES,
    REJECTS,
    Excerpt,
    Key,
    RowThreshold,
    base_of,
    columns_of,
    excerpts_of,
    reject_of,
    result_of,
    scored_windows,
    threshold_of,
    writing_lines,
    writing_results,
)
from persona_lens.screening.survey import Extreme, Survey, clean_label, separation_of
from persona_lens.vectors.provenance import Quantity

CONFIRMED = 50  # from this score of a judge on


@dataclass(frozen=True)
class Findings:
    """What a screening comes to.

    Attributes:
        gauges: The traits' gauges.
        names: The datasets.
        forms: How each writes conversations.
        references: Which of them are clean references.
        survey: Means, labels and extremes.
        flags: What became of the rows.
        excerpts: What the rows that are shown say.
        opinions: By trait and row, what a judge said.
        labels: What the labelled rows come to; None without labels.
        forecasts: By dataset and gauge.
    """

    gauges: tuple[str, ...]
    names: tuple[str, ...]
    forms: tuple[str, ...]
    references: frozenset[int]
    survey: Survey
    flags: Flags
    excerpts: Mapping[Key, Excerpt]
    opinions: Mapping[str, Mapping[Key, Judgement]]
    labels: Mapping[str, Any] | None
    forecasts: Mapping[int, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "gauges": list(self.gauges),
            "score": self.survey.score.value,
            "datasets": [self._dataset(number) for number in range(len(self.names))],
            "thresholds": [threshold.to_json() for threshold in self.flags.thresholds],
            "histograms": {
                gauge: {
                    "edges": self.flags.edges[place].tolist(),
                    "counts": [self._counts(number, place) for number in range(len(self.names))],
                }
                for place, gauge in enumerate(self.gauges)
            },
            "labels": self.labels,
            "extremes": {
                gauge: {
                    "top": [self._shown(gauge, item, 1) for item in sorted(self.survey.top[place], reverse=True)],
                    "bottom": [
                        self._shown(gauge, item, -1) for item in sorted(self.survey.bottom[place], reverse=True)
                    ],
                }
                for place, gauge in enumerate(self.gauges)
            },
            "opinions": {trait: _opinion(found) for trait, found in self.opinions.items()},
        }

    def _dataset(self, number: int) -> dict[str, Any]:
        tally = self.survey.datasets.get(number)
        groups = {
            group: each.to_json(self.gauges) for (own, group), each in self.survey.groups.items() if own == number
        }
        flagged = self.flags.over.get(number) if self.flags.thresholds else None
        decisions = self.flags.decisions.get(number) if self.flags.thresholds else None
        return {
            "name": self.names[number],
            "form": self.forms[number],
            "reference": number in self.references,
            **(
                tally.to_json(self.gauges)
                if tally
                else {"rows": 0, "rejected": 0, "call_tools": 0, "tokens": 0, "means": {}}
            ),
            "decisions": None if decisions is None else {each.value: count for each, count in decisions.items()},
            "flagged": None if flagged is None else dict(zip(self.gauges, flagged.tolist(), strict=True)),
            "groups": groups,
            "forecasts": self.forecasts.get(number, {}),
        }

    def _counts(self, number: int, gauge: int) -> list[int]:
        found = self.flags.counts.get(number)
        return [] if found is None else [int(count) for count in found[gauge]]

    def _shown(self, gauge: str, item: Extreme, sign: int) -> dict[str, Any]:
        value, dataset, row = item[0] * sign, -item[1], -item[2]
        excerpt = self.excerpts[dataset, row]
        said = self.opinions.get(gauge.rpartition("@")[0], {}).get((dataset, row))
        return {
            "dataset": self.names[dataset],
            "row": row,
            "id": excerpt.id,
            "value": value,
            "prompt": excerpt.prompt,
            "response": excerpt.response,
            "judge": said.trait.value if said else None,
        }


def find(
    run: RunFolder,
    datasets: Sequence[Dataset],
    references: int,
    panel: Panel,
    whole: Panel,
    flagging: Flagging,
    judges: Mapping[str, Judge],
    progress: Progress,
) -> Findings:
    """Sum up what was scored.

    Args:
        run: Where that is.
        datasets: In their order, the references last.
        references: How many of them are clean references.
        panel: The traits.
        whole: The traits, and random directions behind them.
        flagging: How rows are ranked and flagged.
        judges: By trait: asked about flagged rows.
        progress: Told how far the judging is.
    """
    clean = frozenset(range(len(datasets) - references, len(datasets)))
    traits, score = len(panel.gauges), flagging.score or Quantity.RAW
    gauges = tuple(map(str, panel.gauges))
    survey = Survey(traits, len(whole.gauges), score, clean, flagging.top_k)
    for rows in scored_windows(run, len(whole.gauges)):
        survey.add(rows)
    thresholds = _thresholds(survey, gauges, flagging) if clean else ()
    flags = Flags.of(survey, thresholds, flagging.judged if judges else 0)
    for rows in scored_windows(run, len(whole.gauges)):
        flags.add(rows, reference=rows[0].dataset in clean)
    shown = {(-d, -r) for heaps in (survey.top, survey.bottom, flags.flagged) for heap in heaps for _, d, r in heap}
    excerpts = excerpts_of(datasets, shown)
    return Findings(
        gauges,
        tuple(dataset.name for dataset in datasets),
        tuple(dataset.form.value for dataset in datasets),
        clean,
        survey,
        flags,
        excerpts,
        _opinions(run, panel, flags, excerpts, judges, progress),
        _labels(survey, gauges, whole, flagging),
        {number: _forecasts(panel, survey, number) for number in range(len(datasets))},
    )


def write_rows(
    run: RunFolder, datasets: Sequence[Dataset], whole: Panel, findings: Findings, *, generated: bool
) -> None:
    """Write the results of every row, the rejects, base responses that were generated, and the datasets split."""
    gauges, flags = findings.gauges, findings.flags
    judged = list(findings.opinions)
    with (
        writing_results(run, columns_of(gauges, judged)) as results,
        writing_lines(run, REJECTS) as rejects,
    ):
        for rows in scored_windows(run, len(whole.gauges)):
            number = rows[0].dataset
            name, reference = findings.names[number], number in findings.references
            scored = [row for row in rows if row.problem is None]
            results(
                [
                    result_of(row, name, reference, flags.decide(row), gauges)
                    | {f"judge.{trait}": _said(findings.opinions[trait], (number, row.number)) for trait in judged}
                    for row in scored
                ]
            )
            rejects(reject_of(row, name) for row in rows if row.problem is not None)
    stems = _stems([dataset.source.stem for dataset in datasets])
    for number, (dataset, stem) in enumerate(zip(datasets, stems, strict=True)):
        own = partial(scored_windows, run, len(whole.gauges), number)
        if generated:
            with writing_lines(run, f"{BASE}/{stem}.jsonl") as base:
                for rows in own():
                    base(map(base_of, rows))
        if flags.thresholds and number not in findings.references:
            split(dataset, (flags.decide(row) for rows in own() for row in rows), run, stem)


def _stems(names: Sequence[str]) -> list[str]:
    """What files of each dataset begin with: its name where all are different, on any file system."""
    if len({name.casefold() for name in names}) == len(names):
        return list(names)
    return [f"{name}-{number}" if len(set(names)) == 1 else f"{number}-{name}" for number, name in enumerate(names)]


def _thresholds(survey: Survey, gauges: Sequence[str], flagging: Flagging) -> tuple[RowThreshold, ...]:
    scores = survey.reference_scores
    return tuple(
        threshold_of(gauge, scores[:, place], flagging.false_positive_rate, flagging.undecided)
        for place, gauge in enumerate(gauges)
    )


def _opinions(
    run: RunFolder,
    panel: Panel,
    flags: Flags,
    excerpts: Mapping[Key, Excerpt],
    judges: Mapping[str, Judge],
    progress: Progress,
) -> dict[str, dict[Key, Judgement]]:
    """Second opinions on the flagged rows, by trait: of a trait at several layers, on what any of them flagged."""
    found: dict[str, dict[Key, Judgement]] = {}
    for number, (trait, judge) in enumerate(judges.items()):
        own = [heap for gauge, heap in zip(panel.gauges, flags.flagged, strict=True) if gauge.trait == trait]
        keys = sorted({(-dataset, -row) for heap in own for _, dataset, row in heap})
        exchanges = [Exchange(excerpts[key].prompt, excerpts[key].response) for key in keys]
        label = f"second opinions on {trait}"
        said = (
            judge_exchanges(judge, exchanges, run, prefix=file_prefix(number, trait), label=label, progress=progress)
            if keys
            else []
        )
        found[trait] = dict(zip(keys, said, strict=True))
    return found


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


def _labels(survey: Survey, gauges: Sequence[str], whole: Panel, flagging: Flagging) -> dict[str, Any] | None:
    """By label, quantity and gauge: AUC against the clean rows, and that of random directions at the same layer."""
    values = survey.labelled.by_label()
    if not values:
        return None
    clean = clean_label(list(values), flagging.clean)
    width = len(whole.gauges)
    found: dict[str, Any] = {}
    for label in (each for each in values if each != clean):
        for place, quantity in enumerate(QUANTITIES):
            for number, gauge in enumerate(whole.gauges[: len(gauges)]):
                column = place * width + number
                separation = separation_of(values[label][:, column], values[clean][:, column])
                if separation is None:
                    continue
                nulls = [n for n in range(len(gauges), width) if whole.gauges[n].layer == gauge.layer]
                columns = [place * width + n for n in nulls]
                beside = [_auc(values[label][:, c], values[clean][:, c]) for c in columns]
                entry = {**separation.to_json(), "random": beside}
                found.setdefault(label, {}).setdefault(quantity.value, {})[str(gauge)] = entry
    return {"clean": clean, "labels": found}


def _auc(labelled: Any, clean: Any) -> float:
    import numpy as np

    from persona_lens.core.statistics import auc

    return auc(labelled[np.isfinite(labelled)], clean[np.isfinite(clean)])


def _forecasts(panel: Panel, survey: Survey, number: int) -> dict[str, Any]:
    """The shift to expect of finetuning on a dataset, by gauge, where vectors carry a forecast of what was measured."""
    tally = survey.datasets.get(number)
    if tally is None:
        return {}
    means = tally.to_json([str(gauge) for gauge in panel.gauges])["means"]
    found = {}
    for gauge in panel.gauges:
        for forecast in gauge.vectors.forecasts:
            mean = means[str(gauge)][forecast.quantity]
            if forecast.layer == gauge.layer and mean is not None:
                found[str(gauge)] = {
                    "quantity": forecast.quantity,
                    "n": forecast.n,
                    "source": forecast.source,
                    **forecast.predict(mean["mean"]).to_json(),
                }
    return found
