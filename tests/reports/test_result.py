"""Every kind of result says the same of itself, as it comes and as it is read from its folder."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import persona_lens as pl
from persona_lens.analysis.logit_lens import lens
from persona_lens.monitoring import BaselineSettings, measure_baseline
from persona_lens.monitoring.scoring import monitor
from persona_lens.reports import steering, svg
from persona_lens.reports.kinds import KINDS
from persona_lens.reports.page import judge_name
from persona_lens.reports.result import Result, ResultError, StoredResult
from persona_lens.runs.settings import RolloutSettings
from tests.campaign import targets
from tests.reproduction.made import reproduced
from tests.screening import made

MADE: dict[str, Callable[[Path], Result]] = {
    "extraction": targets._extract,
    "sweep": targets._sweep,
    "comparison": targets._compare,
    "tune": targets._tune,
    "effects": targets._effects,
    "persistence": targets._persist,
    "methods": targets._methods,
    "study": targets._study,
    "drift": targets._drift,
    "axis": targets._axis,
    "cap": targets._cap,
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
    "reproduction": reproduced,
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


def _changed(summary: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A summary with something else in one place; without it, for an ellipsis."""
    rest = {key: each for key, each in summary.items() if key != name}
    return rest if value is ... else {**rest, name: value}


def _copied(result: Result, folder: Path) -> Path:
    assert result.folder is not None
    return Path(shutil.copytree(result.folder, folder / "run", ignore=shutil.ignore_patterns("checkpoints")))


def test_a_damaged_summary_is_said_to_be(result: Result, tmp_path: Path) -> None:
    for name in result.summary:
        values: tuple[Any, ...] = (..., None, "x", [], {}, -1)
        for value in values:
            stored = StoredResult(result.kind, _changed(result.summary, name, value), tmp_path)
            for look in ("verdict", "figures", "__repr__"):
                with suppress(pl.PersonaLensError):
                    shown: Any = getattr(stored, look)
                    assert shown() if callable(shown) else shown is not None
    empty = StoredResult(result.kind, {}, tmp_path)
    looks: tuple[Callable[[], Any], ...] = (lambda: empty.verdict, empty.report, empty.plot, empty._repr_html_)
    for look_at in looks:
        with pytest.raises(pl.PersonaLensError, match=r"summary\.json is not what such a run .* remove it,"):
            look_at()


def test_damaged_rows_are_said_to_be(result: Result, tmp_path: Path) -> None:
    folder = _copied(result, tmp_path)
    stored, whole = Result.load(folder), result.rows
    for file in (file for pattern in ("*.jsonl", "*.parquet") for file in folder.glob(pattern)):
        content = file.read_bytes()
        for other in (None, b"null\n", b"{}\n[1]\n", b"\xff\xfe", content[: len(content) // 2]):
            file.unlink(missing_ok=True)
            if other is not None:
                file.write_bytes(other)
            found: Any = None
            with suppress(pl.PersonaLensError):
                found = stored.rows
            assert found in (None, whole)  # it may be of another file
        file.write_bytes(content)


@pytest.mark.parametrize("text", ["[]", '"x"', "null", '{"kind": [1]}', '{"kind": {}}', "{"])
def test_a_damaged_configuration_is_said_to_be(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(pl.PersonaLensError, match=str(tmp_path)):
        pl.load(tmp_path)
    (tmp_path / "run.json").write_text('{"kind": "sweep"}')
    (tmp_path / "summary.json").write_text(text if text[1:] else "[1]")
    with pytest.raises(pl.PersonaLensError, match=r"summary\.json"):
        assert pl.load(tmp_path).verdict  # type: ignore[union-attr]


def test_no_path_breaks_load() -> None:
    for path in ("", "\0", "x" * 5000, "/dev/null"):
        for load in (pl.load, Result.load):
            with pytest.raises(pl.PersonaLensError):
                load(path)


HOSTILE = (
    "$$",
    r"a$\frac$b",
    "=cmd|' /C calc'!A0\x1b[31m\u202e",
    "l" * 5000,
    "two\nlines",
    "<script>alert(1)</script>",
)


@pytest.mark.usefixtures("drawing")
def test_texts_of_others_do_no_harm(tmp_path: Path) -> None:
    from matplotlib import rc_context, rcParams, style

    result = targets._compare(tmp_path / "run")
    (effect,) = result.summary["arms"].values()
    hostile = StoredResult("comparison", {**result.summary, "arms": dict.fromkeys(HOSTILE, effect)}, tmp_path / "run")
    with warnings.catch_warnings(), rc_context():
        warnings.simplefilter("ignore")  # of signs that the font lacks, and of the little room that is left
        style.use("dark_background")
        before = dict(rcParams)
        hostile.save(tmp_path / "new" / "plot.png")
        hostile.save(tmp_path / "new" / "plot.png")
        drawn = hostile.plot()
        drawn.canvas.draw()
        assert drawn.axes[0].get_xticklabels()[0].get_color() == "#59616d"  # made when it is drawn
        assert dict(rcParams) == before
        whole = Figure()
        assert hostile.plot(whole.subfigures(1, 2)[0].subplots()) is whole  # type: ignore[index]
        whole.canvas.draw()
    assert "<script" not in hostile._repr_html_()
    named = StoredResult("comparison", {**result.summary, "arms": {HOSTILE[2]: effect}}, tmp_path / "run")
    for text in (named.verdict, repr(named)):
        assert "\x1b" not in text
        assert "\u202e" not in text
    (tmp_path / "run" / "arms-scores.jsonl").write_text(json.dumps({"text": HOSTILE[2], "=score": -1.5}))
    assert result.save(tmp_path / "rows.csv").stat().st_size
    table = named.save(tmp_path / "rows.csv").read_text()
    assert table == "text,'=score\n'=cmd|' /C calc'!A0\\u001b[31m\\u202e,-1.5\n"
    with pytest.raises(ResultError, match="figure= names"):
        result.plot("changes")  # type: ignore[arg-type]


def test_threads_draw_without_each_others_settings(unkept: Result) -> None:
    from matplotlib import rcParams

    before = dict(rcParams)
    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(lambda _: unkept.plot(), range(8)))) == 8
    assert dict(rcParams) == before


def test_a_result_can_be_sent_elsewhere(result: Result) -> None:
    assert result.folder is not None
    stored = pickle.loads(pickle.dumps(Result.load(result.folder)))
    assert stored.verdict == copy.deepcopy(stored).verdict == result.verdict


def test_rows_of_a_screening_without_pyarrow_are_found(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"a": 1}\n')
    assert StoredResult("screening", {}, tmp_path).rows == [{"a": 1}]


@pytest.mark.usefixtures("drawing")
def test_a_sweep_whose_judge_tells_of_nothing_but_scores_is_drawn(tmp_path: Path) -> None:
    settings = pl.SweepSettings((1,), (-1.0,), questions=1, random_directions=0, rollouts=targets.SMALL)
    _look(pl.sweep(targets.planted(), targets.vectors(), settings, judge=made.LengthJudge()), tmp_path)


def test_an_svg_is_the_same_every_time() -> None:
    rows = [("up", {"mean": 1.0, "low": 0.0, "high": 2.0, "n": 2}, None)]
    with svg.drawing_style():
        first, second = (svg.to_svg(steering.changes_figure(rows, svg.WIDE), "a") for _ in range(2))
    assert first == second
