"""What the headline of a screening says: what was measured, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from persona_lens.reports.screening import headline
from tests.reports.test_report import estimate


def dataset(name: str, mean: float, *, reference: bool = False, n: int = 40) -> dict[str, Any]:
    means = {"kind@1": {"raw": estimate(mean, 0.3, n), "difference": None, "prompt_difference": None}}
    own: dict[str, Any] = {"rows": n, "rejected": 0, "flagged": None, "groups": {}, "forecasts": {}}
    return {"name": name, "reference": reference, "means": means, **own}


def summary(*datasets: dict[str, Any], labels: Any = None) -> dict[str, Any]:
    thresholds = [{"gauge": "kind@1", "rows": each["rows"]} for each in datasets if each["reference"]]
    about = {"gauges": ["kind@1"], "score": "raw", "labels": labels, "judges": {}, "thresholds": thresholds}
    return {**about, "datasets": list(datasets)}


def labelled(auc: float, half: float, random: list[float], n: int = 15) -> dict[str, Any]:
    entry = {"auc": auc, "low": auc - half, "high": auc + half, "labelled": n, "clean": n, "random": random}
    return {"clean": "calm", "labels": {"rude": {"raw": {"kind@1": entry}}}}


@pytest.mark.parametrize(
    ("labels", "verdict", "title"),
    [
        (labelled(0.9, 0.05, [0.5, 0.6]), "clear", "kind@1 tells rude rows from calm ones with an AUC of 0.90"),
        (labelled(0.9, 0.05, [0.5, 0.88]), "unclear", "rude rows are not clearly told from calm ones: an AUC of 0.90"),
        (labelled(0.6, 0.2, [0.5]), "unclear", "rude rows are not clearly told from calm ones: an AUC of 0.60"),
        (labelled(0.9, 0.05, []), "no null", "kind@1 tells rude rows from calm ones with an AUC of 0.90"),
    ],
)
def test_labels_are_told_apart_by_so_much(labels: dict[str, Any], verdict: str, title: str) -> None:
    found = headline(summary(dataset("rows.jsonl", 1.0), labels=labels))
    assert (found.verdict, found.title[: len(title)]) == (verdict, title)
    assert "over 15 labelled rows and 15 clean rows" in found.sentences[0]
    assert found.basis == "40 rows of 1 dataset, no judge"


def test_few_rows_are_called_few() -> None:
    found = headline(summary(dataset("rows.jsonl", 1.0, n=4), labels=labelled(0.9, 0.05, [0.5], n=2)))
    assert "over only 2 labelled rows and only 2 clean rows" in found.sentences[0]
    assert found.basis == "only 4 rows of 1 dataset, no judge"


def test_without_labels_it_is_what_projects_higher_than_the_reference() -> None:
    clean = dataset("clean.jsonl", 0.5, reference=True)
    found = headline(summary(dataset("rows.jsonl", 1.5), clean))
    assert (found.verdict, found.title) == (
        "no null",
        "rows.jsonl projects higher than the reference on kind@1, by +1.00",
    )
    # The interval has the width of both: 0.3 and 0.3 make 0.42.
    assert "is +1.000 (+0.576 to +1.424)." in found.sentences[0]
    assert "no random directions stand beside this" in found.sentences[1]
    assert found.basis == "40 rows of 1 dataset, 40 reference rows, no judge"
    near = headline(summary(dataset("rows.jsonl", 0.8), clean))
    assert (near.verdict, near.title) == ("unclear", "No dataset clearly projects higher than the reference")
    two = headline(summary(dataset("rows.jsonl", 1.5), dataset("others.jsonl", 0.6), clean))
    assert two.title.endswith("by +1.00 (clearly so are 1 of 2 means)")


def test_with_neither_nothing_is_claimed() -> None:
    found = headline(summary(dataset("rows.jsonl", 1.5)))
    assert (found.verdict, found.title) == ("no null", "Rows were projected, with nothing to hold them against")
