"""The demonstrations on the embedded model: does the vector tell impolite replies from normal ones?"""

from __future__ import annotations

from pathlib import Path

import pytest

import persona_lens as pl
from persona_lens.data.datasets import open_dataset
from persona_lens.extraction import ExtractionSettings
from persona_lens.monitoring import Panel
from persona_lens.runs.settings import RolloutSettings
from persona_lens.screening import Flagging, screen

LAYER = 20


@pytest.mark.real
@pytest.mark.slow
def test_impolite_replies_lie_above_normal_ones_and_random_directions_do_not_see_them(tmp_path: Path) -> None:
    backend = pl.open_backend("transformers", "smollm2-135m")
    settings = ExtractionSettings(questions=4, rollouts=RolloutSettings(max_new_tokens=12, temperature=0.6))
    vectors = pl.extract(backend, "impolite", settings=settings).vectors
    data = open_dataset("demonstration:impolite", label="level", limit=45)
    found = screen(backend, [data], Panel.of(vectors, LAYER), folder=tmp_path, flagging=Flagging(random_directions=40))
    strong = found.summary["labels"]["labels"]["strong"]
    mild = found.summary["labels"]["labels"]["mild"]
    gauge = f"impolite@{LAYER}"
    assert strong["raw"][gauge]["auc"] > 0.9
    assert strong["prompt_difference"][gauge]["auc"] > 0.85
    assert 0.5 < mild["raw"][gauge]["auc"] < strong["raw"][gauge]["auc"]
    random = strong["raw"][gauge]["random"]
    assert 0.3 < sum(random) / len(random) < 0.7
