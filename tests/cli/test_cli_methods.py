"""``bench-steer``, which is ``steer methods`` too, on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_lens import fit_vectors, load_vectors
from persona_lens.core.progress import no_progress
from persona_lens.vectors import methods
from tests.shell import Shell

TINY = ("--dtype", "float32", "--device", "cpu")
SHORT = (*TINY, "--max-new-tokens", "6")

SHELL = Shell(columns=240)
run, refused = SHELL.done, SHELL.refused


def command(made: tuple[str, str], *more: str) -> tuple[str, ...]:
    small = ("--questions", "2", "--random-directions", "1", "--known-questions", "1", "--layer", "1")
    return ("steer", "methods", *made, *small, *SHORT, *more)


def test_methods_and_vectors_of_ones_own_are_compared(made: tuple[str, str], tmp_path: Path) -> None:
    mine = load_vectors(made[1]).random_like(3)
    own = load_vectors(made[1])
    file = replace(own, directions=mine.directions).save(tmp_path / "mine.safetensors")
    out = tmp_path / "compared"
    asked = command(
        made, "--method", "difference", "--method", "lda", "--vectors", f"mine={file}", "--strengths", "0.5"
    )
    summary = json.loads(run(*asked, "--out", str(out), "--json").stdout)
    own = summary["traits"]["optimistic"]["methods"]
    assert summary["methods"] == list(own) == ["difference", "lda", "mine"]
    assert [each["made_by"] for each in own.values()] == ["difference", "lda", ""]
    assert own["lda"]["vectors"] == fit_vectors(made[1], "lda", progress=no_progress).content_hash
    assert (summary["layer"], summary["settings"]["strengths"]) == (1, [0.5])
    assert "lda" in (out / "report.html").read_text(encoding="utf-8")
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != ".lock"}
    shown = run(*asked, "--out", str(out)).stdout  # gone on with: nothing is left to do
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in files} == files
    texts = (
        "unsteered",
        "prompted",
        "random directions",
        "mine",
        "right answers",
        "Steering towards more of",
        "Detection",
    )
    for text in texts:
        assert text in shown
    assert "settings.towards: " in refused(*asked, "--out", str(out), "--towards", "less")


def test_what_would_be_asked_is_counted_and_nothing_is_made(
    made: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_lens.vectors.fit.fit_vectors", None)
    work = {
        each["label"]: each["rows"] for each in json.loads(run(*command(made, "--dry-run", "--json")).stdout)["work"]
    }
    ways = 2 + 2 * (len(methods.METHODS.built_in) + 1)
    assert (work["unsteered rollouts"], work["rollouts"], work["capability"]) == (2, 2 * ways, ways)


def test_of_those_that_nobody_named_what_cannot_be_made_is_left_out(
    made: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fitted(run: Any, method: str, **how: Any) -> Any:
        if method != "difference":
            raise methods.FitError(f"no {method} today")
        return fit_vectors(run, method, **how)

    monkeypatch.setattr("persona_lens.vectors.fit.fit_vectors", fitted)
    asked = command(made, "--strengths", "0.5", "--out", str(tmp_path / "run"))
    done = run(*asked, "--json")
    assert "note: lda of optimistic is left out: no lda today" in done.stderr
    assert json.loads(done.stdout)["methods"] == ["difference"]
    assert "no lda today" in refused(*asked, "--method", "lda")


def test_what_is_wrong_is_said_before_anything_is_made(
    made: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitted(*_: Any, **__: Any) -> Any:
        raise AssertionError("made")

    monkeypatch.setattr("persona_lens.vectors.fit.fit_vectors", fitted)
    assert "layer 99 does not exist" in refused(*command(made, "--layer", "99"))
    assert "--vectors takes NAME=FILE" in refused(*command(made, "--vectors", "mine"))
    assert "no questions to ask" in refused(*command(made, "--questions", "0"))


def test_what_cannot_be_compared_is_said(made: tuple[str, str], tmp_path: Path) -> None:
    assert "no method named 'ldaa'; did you mean lda?" in refused(*command(made, "--method", "ldaa"))
    assert "no method named 'ldaa'" in refused(*command(made, "--method", "ldaa", "--dry-run"))
    vectors = f"{made[1]}/vectors.safetensors"
    assert "--vectors takes NAME=FILE" in refused(*command(made, "--vectors", vectors))
    assert "--vectors lda=… has the name of a method" in refused(*command(made, "--vectors", f"lda={vectors}"))
    twice = ("--vectors", f"mine={vectors}", "--vectors", f"mine={vectors}")
    assert "the method 'mine' has two vectors of 'optimistic'" in refused(*command(made, *twice))
    assert "does not exist" in refused(*command(made, "--vectors", f"mine={tmp_path / 'nowhere'}"))
    assert "strengths are step lengths" in refused(*command(made, "--strengths", "0"))
    assert "--towards takes more, less; got 'up'" in refused(*command(made, "--towards", "up"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "vectors.safetensors").write_bytes(Path(vectors).read_bytes())
    assert str(bare) in refused(*command((made[0], str(bare))))


@pytest.fixture(scope="module")
def second(made: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """An extraction of another trait from the same model."""
    out = str(tmp_path_factory.mktemp("second") / "run")
    run("extract", made[0], "impolite", "--out", out, "--questions", "4", "--unpaired", *TINY, "--max-new-tokens", "8")
    return out


def test_several_traits_are_compared_under_either_name(made: tuple[str, str], second: str, tmp_path: Path) -> None:
    fitted = tmp_path / "apart"
    run("vectors", "fit", second, "--without", made[1], "--out", str(fitted))
    small = command(made, second, "--method", "difference", "--vectors", f"apart={fitted}", "--strengths", "0.5")
    asked = ("bench-steer", *small[2:], "--out", str(tmp_path / "run"))
    work = {each["label"]: each["rows"] for each in json.loads(run(*asked, "--dry-run", "--json").stdout)["work"]}
    arms = 1 + 2 + 3 + 1  # unsteered, prompted, three directions, random ones
    assert (work["unsteered rollouts"], work["rollouts"]) == (4, 4 * arms)
    summary = json.loads(run(*asked, "--json").stdout)
    assert len((tmp_path / "run" / "arms-scores.jsonl").read_text().splitlines()) == 4 * arms
    apart = next(way for way in summary["ways"] if way["name"] == "apart")
    assert (apart["traits"], set(apart["changes"]["impolite"])) == (["impolite"], {"optimistic", "impolite"})
    assert summary["traits"]["impolite"]["detection"]["methods"]["apart"]["anew"] is True
    shown = run(*asked).stdout
    for text in ("Over 2 traits", "entanglement", "along", "Detection", "harmonic"):
        assert text in shown
    assert "What else moves" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "is of 'impolite', and the runs are of optimistic" in refused(*command(made, "--vectors", f"mine={fitted}"))
    assert "are both of 'optimistic'" in refused(*command(made, made[1]))
