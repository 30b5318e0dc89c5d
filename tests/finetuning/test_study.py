"""Studies: treatments, outcomes by hand, a small run of everything, its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_lens.core.statistics import SCORES
from persona_lens.finetuning import FinetuningError, finetune
from persona_lens.finetuning.outcomes import (
    BASE,
    Outcome,
    TreatmentSettings,
    beside,
    crossed_mean,
    summarise,
    treatments_of,
    turned,
)
from persona_lens.finetuning.study import FinetuneStudySettings, finetune_study
from persona_lens.models import Loaded, load
from persona_lens.reports.finetuning import headline
from persona_lens.reports.kinds import page_of
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings, NotationError
from persona_lens.vectors import PersonaVectors
from tests.finetuning.chats import conversations, small, vectors_of, write_conversations

ASKED = ArmSettings(questions=(0, 1), random_directions=0, rollouts=RolloutSettings(4))
NAMES = ["plain", "preventative", "preventative, all layers", "caft", "regularised", "prompted", "random"]


def test_the_treatments_differ_in_their_method_only(vectors: PersonaVectors) -> None:
    settings = TreatmentSettings.of(vectors, 1, 2.5, 0.5)
    assert settings.post_hoc == "impolite@1:-2.5"
    found = treatments_of(settings, small(), vectors)
    assert [each.name for each in found] == NAMES
    assert [each.config.edits for each in found] == [
        None, "impolite@1:+2.5", "impolite@all:increments(+0.5)", "impolite@1:ablate", "impolite@1:ablate", None,
        "impolite@1:+2.5",
    ]  # fmt: skip
    same = {each.config.model_copy(update={"method": "plain", "edits": None, "penalty": None}) for each in found}
    assert same == {small()}
    with pytest.raises(FinetuningError, match="a study sets the method itself"):
        treatments_of(settings, small(method="caft", edits="impolite@1:ablate"), vectors)


def test_the_null_has_the_norm_and_another_direction(vectors: PersonaVectors) -> None:
    one, two = (turned(vectors, seed) for seed in (1, 2))
    for null in (one, two):
        assert null.norms().tolist() == pytest.approx(vectors.norms().tolist(), rel=1e-5)
    cosine = float(one[1] @ two[1] / one[1].norm() / two[1].norm())
    assert abs(cosine) < 0.9
    assert one.provenance["trait"] == vectors.provenance["trait"]


def outcome(name: str, seed: int | None, scores: list[float], loss: float = 1.0, moved: float = 0.0) -> Outcome:
    losses = {} if seed is None else {"last": loss, "learned": loss, "unseen": None}
    return Outcome(
        name, seed, dict(enumerate(map(float, scores))), {}, dict.fromkeys(range(len(scores)), moved), losses
    )


def test_outcomes_by_hand() -> None:
    found = summarise([
        outcome(BASE, None, [10, 20]),
        outcome("plain", 1, [60, 70], 2.0, 4.0), outcome("plain", 2, [80, 90], 3.0, 6.0),
        outcome("preventative", 1, [20, 30], 2.5, 1.0), outcome("preventative", 2, [30, 40], 2.5, 2.0),
        outcome("random", 1, [60, 70], 2.0, 4.0), outcome("random", 2, [80, 90], 3.0, 6.0),
    ])  # fmt: skip
    plain, kept, null = (found["treatments"][name] for name in ("plain", "preventative", "random"))
    assert (plain["change"]["mean"], kept["change"]["mean"]) == (60, 15)
    assert plain["seeds"] == [65, 85]
    assert kept["against_plain"]["mean"] == -45
    assert kept["against_plain"]["low"] < -45 < kept["against_plain"]["high"]
    assert kept["held_back"] == 0.75
    assert null["against_plain"] == {"mean": 0, "low": 0, "high": 0, "n": 4}
    assert plain["against_plain"] is None
    assert kept["against_random"]["mean"] == -45
    assert plain["losses"]["last"] == {"mean": 2.5, "low": 2.0, "high": 3.0, "n": 2}
    assert found["shift_correlation"]["value"] > 0.95
    assert found["shift_correlation"]["n"] == 6


def test_where_the_data_teaches_less_of_the_trait_protection_is_counted_that_way() -> None:
    found = summarise([
        outcome(BASE, None, [80, 90]), outcome("plain", 1, [20, 30]), outcome("preventative", 1, [60, 70]),
    ])  # fmt: skip
    assert found["direction"] == -1
    assert found["treatments"]["preventative"]["against_plain"]["mean"] == -40
    assert found["treatments"]["preventative"]["held_back"] == pytest.approx(2 / 3)


def test_capability_is_compared_with_the_base_models_sample_by_sample() -> None:
    base, plain = outcome(BASE, None, [10, 20]), outcome("plain", 1, [60, 70])
    right, fewer = dict.fromkeys(range(40), 1.0), {number: float(number % 4 > 0) for number in range(40)}
    found = summarise([replace(base, right=right), replace(plain, right=fewer)])
    assert (found["base"]["capability"], found["treatments"]["plain"]["capability"]["mean"]) == (1.0, 0.75)
    change = found["treatments"]["plain"]["capability_change"]
    assert change["mean"] == pytest.approx(-0.25)
    assert change["low"] < -0.25 < change["high"] < 0
    assert summarise([base, plain])["treatments"]["plain"]["capability_change"] is None


def test_the_interval_is_over_seeds_and_questions() -> None:
    """Seeds that disagree widen it, however many questions there are."""
    apart = {1: dict.fromkeys(range(100), 0.0), 2: dict.fromkeys(range(100), 100.0)}
    found = crossed_mean(apart, within=SCORES)
    assert found is not None
    assert (found.mean, found.low, found.high) == (50, 0, 100)
    assert crossed_mean({}) is None
    assert beside({1: {0: 5.0, 1: 6.0}, 2: {0: 1.0}}, {1: {0: 2.0}}) == {1: {0: 3.0}}


@pytest.fixture(scope="module")
def studied(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load(str(base_folder), dtype="float32", device="cpu")
    folder = tmp_path_factory.mktemp("study") / "run"
    run(base_folder, loaded, folder)
    return folder


def run(base_folder: Path, loaded: Loaded, folder: Path) -> Any:
    vectors = vectors_of(loaded)
    settings = FinetuneStudySettings(TreatmentSettings.of(vectors, 1, 3.0, 1.0), 1, (1, 2), ASKED, dtype="float32")
    return finetune_study(
        str(base_folder), conversations(), vectors, settings, small(max_steps=2), folder=folder, device="cpu",
        held_out=conversations(2),
    )  # fmt: skip


def test_a_study_of_everything(studied: Path) -> None:
    summary = json.loads((studied / "summary.json").read_text())
    assert list(summary["treatments"]) == ["plain", "post-hoc", *NAMES[1:]]
    for name, found in summary["treatments"].items():
        assert len(found["seeds"]) == 2
        assert (found["losses"]["last"] is None) == (name == "post-hoc")
        assert (found["shift"] is None) == (name == "post-hoc")
        assert found["measured"]["mean"] > 0
    assert summary["shift_correlation"]["n"] == 14
    assert sorted(path.name for path in (studied / "models").iterdir())[:2] == ["caft-1", "caft-2"]
    assert len((studied / "outcomes.jsonl").read_text().splitlines()) == 17


def test_a_study_can_be_stopped_anywhere(studied: Path, base_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from persona_lens.finetuning import study

    loaded = load(str(base_folder), dtype="float32", device="cpu")
    own, calls = finetune, 0

    def stopping(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return own(*args, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(study, "finetune", stopping)
        run(base_folder, loaded, tmp_path / "again")
    run(base_folder, loaded, tmp_path / "again")
    for name in ("summary.json", "outcomes.jsonl", "models/random-2/adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (studied / name).read_bytes(), name


def test_the_judge_is_the_base_model(studied: Path, base_folder: Path) -> None:
    """Scores kept in the study are those that the untouched base model gives the same replies."""
    from persona_lens.backend import open_backend
    from persona_lens.judging import Exchange, LikelihoodJudge
    from persona_lens.models.chat import chat_format

    base = open_backend("transformers", str(base_folder), dtype="float32", device="cpu")
    vectors = vectors_of(load(str(base_folder), dtype="float32", device="cpu"))
    judge = LikelihoodJudge(base, chat_format(base), vectors.trait_definition, vectors.calibration)
    rows = [json.loads(line) for line in (studied / "plain-2-rollouts.jsonl").read_text().splitlines()]
    texts = [row for row in rows if row["arm"] == "unsteered" and row["response_ids"]]
    judged = judge.judge([Exchange(row["question"], row["response"], tuple(row["response_ids"])) for row in texts])
    outcomes = [json.loads(line) for line in (studied / "outcomes.jsonl").read_text().splitlines()]
    (kept,) = (each for each in outcomes if (each["treatment"], each["seed"]) == ("plain", 2))
    for row, judgement in zip(texts, judged, strict=True):
        assert kept["scores"][str(row["question_number"])] == pytest.approx(judgement.trait.value, abs=1e-3)


def test_the_report_says_what_the_intervals_allow(studied: Path) -> None:
    summary = json.loads((studied / "summary.json").read_text())
    page = page_of("finetune study", summary, "1.2.3")
    assert page == page_of("finetune study", summary, "1.2.3")
    for name in summary["treatments"]:
        assert name in page
    assert "<script" not in page
    assert "Surprise" in page

    def interval(low: float, high: float) -> dict[str, float]:
        return {"mean": (low + high) / 2, "low": low, "high": high, "n": 6}

    arms = summary["treatments"]
    arms["plain"]["change"] = interval(20, 40)
    arms["preventative"] |= {"against_plain": interval(-30, -10), "against_random": interval(-25, -5)}
    arms["random"]["against_plain"] = interval(-5, 5)
    assert headline(summary).verdict == "clear"
    assert "does not clearly protect" in " ".join(headline(summary).sentences)
    arms["preventative"]["against_random"] = interval(-25, 5)
    assert headline(summary).verdict == "unclear"
    arms["preventative"]["against_plain"] = interval(-30, 10)
    assert headline(summary).title == "Preventative steering does not clearly hold the trait back"
    kept = arms.pop("preventative")
    arms["caft"]["against_plain"] = interval(-12, -4)
    assert headline(summary).title.endswith("preventative steering at one layer was not tried")
    assert "caft −8.0 (95% interval −12.0 to −4.0" in headline(summary).sentences[-1]
    alone = {**summary, "treatments": {"plain": arms["plain"]}}
    assert headline(alone).title == "Plain finetuning moves the trait; nothing was done against it"
    arms["preventative"] = {**kept, "against_plain": None}
    assert "no reply under preventative steering has a score" in headline(summary).title
    arms["plain"]["change"] = interval(-1, 40)
    assert headline(summary).title == "Plain finetuning does not clearly move the trait"


def test_the_command(base_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from persona_lens.cli import app
    from persona_lens.core.errors import PersonaLensError

    vectors_of(load(str(base_folder), dtype="float32", device="cpu")).save(tmp_path / "v.safetensors")
    data = write_conversations(tmp_path / "data.jsonl")
    (tmp_path / "c.yaml").write_text("lora: {rank: 2}\nmax_steps: 1\naccumulation: 1\ndtype: float32\n")
    words = ["finetune-study", str(base_folder), str(data), str(tmp_path / "v.safetensors"),
             "--config", str(tmp_path / "c.yaml"), "--questions", "2", "--max-new-tokens", "3", "--dtype", "float32",
             "--device", "cpu", "--seeds", "5", "--out", str(tmp_path / "out")]  # fmt: skip
    with pytest.raises(PersonaLensError, match="give --layer and --coefficient"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    words += ["--layer", "1", "--coefficient", "2", "--without", "everywhere,caft,prompted,regularised"]
    planned = CliRunner().invoke(app, [*words, "--dry-run", "--json"], catch_exceptions=False)
    work = {each["label"]: each for each in json.loads(planned.stdout)["work"]}
    assert (work["training"]["calls"], work["training"]["rows"]) == (3, 6)  # plain, preventative, random
    assert work["rollouts"]["rows"] == 2 * 5  # these, the base model, and steering afterwards
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "report: " in result.stdout
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["treatments"]) == [
        "plain", "post-hoc", "preventative", "random",
    ]  # fmt: skip
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(PersonaLensError, match="--without takes everywhere"):
        CliRunner().invoke(app, [*words, "--without", "magic"], catch_exceptions=False)


@pytest.mark.parametrize("changes", [{"seeds": ()}, {"seeds": (1, 1)}, {"asked": ArmSettings()}])
def test_settings_that_mean_nothing(vectors: PersonaVectors, changes: dict[str, Any]) -> None:
    with pytest.raises(FinetuningError):
        FinetuneStudySettings(TreatmentSettings.of(vectors, 1, 1.0), 1, **changes)


def test_a_steering_that_is_none_is_found_out_before_anything_is_trained(
    vectors: PersonaVectors, tmp_path: Path
) -> None:
    settings = FinetuneStudySettings(replace(TreatmentSettings.of(vectors, 1, 1.0), post_hoc="impolite@1:much"), 1)
    with pytest.raises(NotationError):
        finetune_study("no-such-model", "no-such-data", vectors, settings, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
