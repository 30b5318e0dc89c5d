"""Every kind of result says the same of itself, as it comes and as it is read from its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import persona_lens as pl
from persona_lens.analysis.logit_lens import lens
from persona_lens.monitoring import BaselineSettings, measure_baseline
from persona_lens.monitoring.scoring import monitor
from persona_lens.reports.kinds import KINDS
from persona_lens.reports.page import judge_name
from persona_lens.reports.result import Result, ResultError
from persona_lens.runs.rollouts import RolloutSettings
from tests.campaign import targets
from tests.screening import made

MADE: dict[str, Callable[[Path], Result]] = {
    "extraction": targets._extract,
    "sweep": targets._sweep,
    "comparison": targets._compare,
    "tune": targets._tune,
    "effects": targets._effects,
    "study": targets._study,
    "baseline": lambda folder: measure_baseline(
        made.backend(),
        targets.tiny_vectors(),
        BaselineSettings(questions=2, neutral=2, rollouts=RolloutSettings(4)),
        folder=folder,
        chat=made.chat(),
    ),
    "screening": targets._screen,
    "finetune": targets._finetune,
    "finetune study": targets._finetune_study,
    "shift": targets._shift,
    "dissection": targets._dissect,
}
TALK = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Oh, well."}]


@pytest.fixture(scope="module", params=MADE)
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return MADE[request.param](tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module", params=["monitor", "lens"])
def unkept(request: pytest.FixtureRequest) -> Result:
    """What is kept in memory only."""
    if request.param == "lens":
        return lens(made.backend(), targets.tiny_vectors(), [1, 2], [[5, 6, 7]], top=3)
    return monitor(made.backend(), [TALK, [*TALK, *TALK], [{"role": "odd"}]], targets.tiny_vectors(), 1)


def test_every_kind_is_tried(tmp_path: Path) -> None:
    """The demonstration is tried where it is made."""
    assert set(KINDS) == {*MADE, "monitor", "lens", "demo"}


def test_a_folder_gives_back_what_was_found(result: Result) -> None:
    assert result.folder is not None
    again = Result.load(result.folder)
    assert (again.kind, again.folder) == (result.kind, result.folder)
    assert json.dumps(again.summary) == json.dumps(result.summary)
    assert json.dumps(again.rows) == json.dumps(result.rows)
    assert again.verdict == result.verdict
    assert again.report() == result.report()
    assert repr(again) == repr(result)
    assert pl.load(result.folder).__dict__.keys() == again.__dict__.keys()


@pytest.mark.usefixtures("drawing")
def test_a_result_can_be_looked_at(result: Result, tmp_path: Path) -> None:
    _look(result, tmp_path)


@pytest.mark.usefixtures("drawing")
def test_what_was_not_kept_can_be_looked_at(unkept: Result, tmp_path: Path) -> None:
    assert unkept.folder is None
    assert "one line" not in repr(unkept)
    _look(unkept, tmp_path)


def _look(result: Result, folder: Path) -> None:
    assert "\n" not in repr(result)
    assert result.verdict.endswith(".")
    assert result.verdict.startswith(result.headline.title)
    judged = result.summary.get("judge") or next(iter((result.summary.get("judges") or {}).values()), None)
    assert judged is None or judge_name(judged) in result.verdict
    rows = result.rows
    assert rows
    assert json.loads(json.dumps(rows)) == rows
    assert len(result.to_pandas()) == len(rows)
    for name in result.figures:
        assert isinstance(result.plot(figure=name), Figure)
    if result.figures:
        left, right = Figure(figsize=(10, 4)).subplots(1, 2)
        right.plot([1, 2], [3, 4])
        before = len(right.get_children())
        assert result.plot(left) is left.figure
        assert left.has_data()
        assert len(right.get_children()) == before
    shown = result._repr_html_()
    assert shown.count("<img") == bool(result.figures)
    assert "[…]" not in shown, "an image that is cut short is none"
    for ending in (".html", ".csv", ".jsonl", *((".png", ".svg") if result.figures else ())):
        assert result.save(folder / f"result{ending}").stat().st_size > 0
    with pytest.raises(ResultError, match=r"as \.html, \.png"):
        result.save(folder / "result.docx")
    with pytest.raises(ResultError, match="no figure 'odd'"):
        result.plot(figure="odd")


def test_what_is_no_result_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="holds no run"):
        Result.load(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": "odd"}')
    with pytest.raises(ResultError, match="of the kind 'odd'"):
        Result.load(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": "sweep"}')
    with pytest.raises(ResultError, match="not finished"):
        Result.load(tmp_path)
    with pytest.raises(pl.PersonaLensError, match="there is nothing"):
        pl.load(tmp_path / "nothing")


def test_load_takes_every_artifact(tmp_path: Path) -> None:
    vectors = targets.tiny_vectors()
    steering = pl.Steering.parse(f"{vectors.trait}@1:+1", vectors)
    vectors.save(tmp_path / "v.safetensors")
    steering.save(tmp_path / "s.safetensors")
    written = f"format_version: 1\nedits: ['{steering}']\nvectors: {{{vectors.trait}: v.safetensors}}\n"
    (tmp_path / "s.yaml").write_text(written)
    found: Any = pl.load(tmp_path / "v.safetensors")
    assert found.content_hash == vectors.content_hash
    assert pl.load(tmp_path / "s.safetensors") == pl.load(tmp_path / "s.yaml") == steering
    trait = Path(__file__).parents[2] / "traits" / "optimistic.yaml"
    assert pl.load(trait) == pl.load_trait("optimistic")
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    with pytest.raises(pl.PersonaLensError, match=r"odd\.safetensors"):
        pl.load(tmp_path / "odd.safetensors")


def test_what_one_holds_fits_on_a_line() -> None:
    backend, vectors = made.backend(), targets.tiny_vectors()
    steering = pl.Steering.parse(f"{vectors.trait}@1:+1", vectors)
    for each in (backend, vectors, steering, *steering.edits(), steering.on(backend)):
        assert "\n" not in repr(each)
        assert len(repr(each)) < 250
    assert "<table>" in vectors._repr_html_()
