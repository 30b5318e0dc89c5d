"""Methods over two traits on a model whose behaviour is planted: what else moves is known beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from persona_lens import fit_vectors
from persona_lens.analysis import AnalysisError
from persona_lens.analysis.method_effects import MethodEffects, MethodSettings, compare_methods, compare_methods_work
from persona_lens.analysis.method_effects.detection import detection
from persona_lens.analysis.method_effects.harmonic import Marks, harmonic
from persona_lens.analysis.method_effects.spill import Moves, mean_square
from persona_lens.backend import Edit, Generation, Operation, Read, Sampling
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.progress import no_progress
from persona_lens.core.statistics import auc
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.reports.catalogue import find_runs
from persona_lens.reports.entanglement import overall
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings
from persona_lens.steering.tuning.settings import Towards
from persona_lens.traits import Arm, Trait, load_trait
from persona_lens.vectors import PersonaVectors
from persona_lens.vectors.samples import RunSamples, read_samples
from tests.analysis.test_method_effects import LAYER, NORM, Knowing, score, vectors
from tests.planted import PlantedBackend
from tests.screening.made import LengthJudge

ONE, TWO = "optimistic", "impolite"
SETTINGS = MethodSettings(
    layer=LAYER,
    strengths=(0.8,),
    known_questions=4,
    asked=ArmSettings(tuple(range(6)), random_directions=3, rollouts=RolloutSettings(40, batch_size=50)),
)


class Two(Knowing):
    """A row leans to each of two traits, whose planted directions are at right angles and equally long."""

    def __init__(self, spread: float = 0.0) -> None:
        super().__init__(spread)
        self.both = {name: load_trait(name) for name in (ONE, TWO)}
        first = self.planted["response_mean"]
        across = torch.randn(first.shape, generator=torch.Generator().manual_seed(5))
        across = across - (across * first).sum(1, keepdim=True) / (first * first).sum(1, keepdim=True) * first
        self.axes = {ONE: first, TWO: across / across.norm(dim=1, keepdim=True) * first.norm(dim=1, keepdim=True)}

    def arm_of(self, trait: Trait, prompt: TokenIds) -> int:
        text = self.tokenizer.decode(list(prompt))
        for arm, sign in ((Arm.POSITIVE, 1), (Arm.NEGATIVE, -1)):
            if any(trait.instruction(arm, i) in text for i in range(len(trait.instructions))):
                return sign
        return 0

    def leaning_to(self, name: str, prompts: Sequence[TokenIds], seeds: Sequence[int], edits: Sequence[Edit]) -> Tensor:
        total = torch.tensor([float(self.arm_of(self.both[name], each)) for each in prompts])
        for edit in edits:
            assert edit.operation is Operation.ADD
            axis = self.axes[name][edit.layer]
            total = total + torch.as_tensor(edit.coefficient) * (edit.direction @ axis / (axis @ axis))
        for row, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed + len(name) + int(1000 * float(total[row])) % 997)
            total[row] += self.spread * float(torch.randn(1, generator=generator))
        return total

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        edits: Sequence[Edit] = (),
        reads: Sequence[Read] = (),
    ) -> Generation:
        seeds = sampling.seeds or (0,) * len(prompts)
        heads = [tuple(prompt) for prompt in prompts]
        both = [self.leaning_to(name, heads, seeds, edits) for name in (ONE, TWO)]
        texts = [f"{ONE} {float(a):+.3f} {TWO} {float(b):+.3f}" for a, b in zip(*both, strict=True)]
        found = tuple(tuple(self.tokenizer.encode(text))[: sampling.max_new_tokens] for text in texts)
        values = {read.kind.value: self._values(read.kind.value, heads, seeds, both[0], found) for read in reads}
        return Generation(found, (True,) * len(found), values)

    def _logprobs(self, prompt: TokenIds, response: TokenIds) -> Tensor:
        said = self.tokenizer.decode(list(response)).split()
        leaning = sum(
            self.arm_of(trait, prompt) * float(said[said.index(name) + 1])
            for name, trait in self.both.items()
            if name in said
        )
        return torch.full((len(response),), -2 + leaning / 2)


def ways(backend: Two) -> dict[str, list[PersonaVectors]]:
    """Directions along the planted axes; ones that hold half as much of the other axis; and those without it."""
    one, two = backend.axes[ONE], backend.axes[TWO]
    return {
        "apart": [vectors(backend, one), vectors(backend, two, TWO)],
        "tangled": [vectors(backend, one + two / 2), vectors(backend, two + one / 2, TWO)],
    }


def compared(
    backend: Two, settings: MethodSettings = SETTINGS, folder: Path | None = None, **how: Any
) -> MethodEffects:
    return compare_methods(backend, ways(backend), settings, folder=folder, progress=no_progress, **how)


def way(found: MethodEffects, name: str, strength: float | None = 0.8) -> dict[str, Any]:
    return next(each for each in found.summary["ways"] if (each["name"], each["strength"]) == (name, strength))


@pytest.fixture(scope="module")
def backend() -> Two:
    return Two()


@pytest.fixture(scope="module")
def found(backend: Two, tmp_path_factory: pytest.TempPathFactory) -> MethodEffects:
    return compared(backend, folder=tmp_path_factory.mktemp("bench") / "run")


def test_what_else_moves_is_found_and_what_does_not_is_not(backend: Two, found: MethodEffects) -> None:
    length = float(backend.axes[ONE][LAYER].norm())
    step = 0.8 * NORM / length
    apart, tangled = way(found, "apart"), way(found, "tangled")
    for along in (ONE, TWO):
        other = TWO if along == ONE else ONE
        assert apart["changes"][along][along]["vector"]["mean"] == pytest.approx(score(step) - 50, abs=0.05)
        assert apart["changes"][along][other]["vector"]["mean"] == pytest.approx(0, abs=0.05)
        own, spilt = (share / math.hypot(1, 0.5) * step for share in (1, 0.5))
        assert tangled["changes"][along][along]["vector"]["mean"] == pytest.approx(score(own) - 50, abs=0.05)
        assert tangled["changes"][along][other]["vector"]["mean"] == pytest.approx(score(spilt) - 50, abs=0.05)
        assert tangled["cosines"][along][other] == pytest.approx(1 / 1.25, abs=1e-6)
        assert apart["cosines"][along][other] == pytest.approx(0, abs=1e-6)
    assert apart["entanglement"]["high"] == pytest.approx(0, abs=0.002)
    expected = (score(spilt) - 50) / (score(own) - 50)
    assert tangled["entanglement"]["mean"] == pytest.approx(expected, abs=0.002)
    assert tangled["off"]["vector"]["mean"] == pytest.approx(score(spilt) - 50, abs=0.1)
    assert (apart["off"]["clear"], tangled["off"]["clear"]) == (0, 1)
    told = " ".join(found.headline.sentences)
    assert "Tangled moves the other traits clearly more than random directions of that length do." in told
    assert "Clearly less entangled at 0.8: apart than tangled; prompted than tangled." in told
    assert "For each point of that the other traits move by, root mean square: apart 0.00 " in told
    assert found.headline.verdict == "clear"
    assert found.headline.title == "Apart and tangled do more than prompting"


def test_random_directions_are_one_null_for_every_trait(backend: Two, found: MethodEffects) -> None:
    nulls = [found.steerings[ONE]["apart"][0.8].null(seed)[0] for seed in range(3)]
    for name, axis in ((name, axes[LAYER]) for name, axes in backend.axes.items()):
        pushes = [float(torch.as_tensor(each.coefficient) * (each.direction @ axis) / (axis @ axis)) for each in nulls]
        expected = np.mean([score(pushes[number % 3]) - 50 for number in range(12)])
        for method in ("apart", "tangled"):
            for along in (ONE, TWO):
                cell = way(found, method)["changes"][along][name]
                assert cell["random"]["mean"] == pytest.approx(expected, abs=0.05)
    squares = [
        [
            score(float(torch.as_tensor(each.coefficient) * (each.direction @ axis) / (axis @ axis))) - 50
            for each in nulls
        ]
        for axis in (axes[LAYER] for axes in backend.axes.values())
    ]
    first, null, *_ = overall(found.summary)
    assert (first["name"], null["name"], null["strength"]) == ("prompted", "random directions", 0.8)
    assert null["harmonic"]["mean"] == pytest.approx(
        np.mean([found.summary["traits"][name]["random"][0]["harmonic"]["mean"] for name in (ONE, TWO)])
    )
    told = null["off"]["vector"]["mean"]
    assert told == pytest.approx(math.sqrt(np.mean(np.square(squares))), abs=0.05)


def test_prompting_is_a_way_of_every_trait(found: MethodEffects) -> None:
    asked = way(found, "prompted", None)
    assert asked["changes"][TWO][TWO]["vector"]["mean"] == pytest.approx(score(1) - 50, abs=0.05)
    assert asked["changes"][TWO][ONE]["vector"]["mean"] == pytest.approx(0, abs=0.05)
    assert asked["changes"][TWO][TWO]["random"] is None
    assert (asked["cosines"], asked["random_entanglement"]) == (None, None)
    for name in (ONE, TWO):
        system = load_trait(name).system_prompt("positive", 2)  # type: ignore[arg-type]
        assert found.summary["traits"][name]["prompted"]["system"] == system
    (pair,) = (each for each in found.summary["pairs"] if (each["one"], each["other"]) == ("apart", "prompted"))
    step = 0.8 * NORM / float(Two().axes[ONE][LAYER].norm())
    assert pair["score"]["mean"] == pytest.approx(score(step) - score(1), abs=0.05)
    assert pair["better"] == {"score": "apart", "entanglement": None}
    (pair,) = (each for each in found.summary["pairs"] if (each["one"], each["other"]) == ("apart", "tangled"))
    assert pair["better"] == {"score": "apart", "entanglement": "apart"}
    assert -pair["entanglement"]["mean"] == pytest.approx(way(found, "tangled")["entanglement"]["mean"], abs=0.01)


def test_every_judge_is_asked_for_every_answer_once(backend: Two, found: MethodEffects) -> None:
    assert found.folder is not None
    arms = 1 + 2 + 4 + 1  # unsteered, two prompts, two directions of two traits, random directions
    assert len(found.answers) == 12 * arms
    assert all(set(row.scores) == {ONE, TWO} for row in found.answers)
    assert {row.asked_of for row in found.answers} == {ONE, TWO}
    (run,) = find_runs(found.folder)
    assert (run.trait, run.kind) == (f"{ONE}, {TWO}", "methods")
    assert run.rows == run.planned == 12 * (arms + 1)
    work = {each.label: each.rows for each in compare_methods_work(backend, ways(backend), SETTINGS)}
    assert work["rollouts"] == 12 * arms
    assert {f"judging {name}" for name in (ONE, TWO)} <= set(work)
    assert json.loads(json.dumps(found.summary)) == found.summary
    page = found.report()
    for text in ("What else moves", "tangled", TWO, "cosine of the directions", found.headline.title):
        assert text in page
    assert found.figures == ("entanglement", "effects-1", "effects-2")


def test_what_was_killed_goes_on_and_gives_the_same_bytes(backend: Two, found: MethodEffects, tmp_path: Path) -> None:
    class Dying(Two):
        """Dies when it is to judge the second trait."""

        def _logprobs(self, prompt: TokenIds, response: TokenIds) -> Tensor:
            if self.arm_of(self.both[TWO], prompt):
                raise KeyboardInterrupt
            return super()._logprobs(prompt, response)

    with pytest.raises(KeyboardInterrupt):
        compared(Dying(), folder=tmp_path)
    assert compared(backend, folder=tmp_path).summary == found.summary
    assert (tmp_path / "summary.json").read_bytes() == (found.folder / "summary.json").read_bytes()  # type: ignore[operator]


def test_a_method_need_not_have_every_trait(backend: Two) -> None:
    some: dict[str, Any] = {**ways(backend), "mine": ways(backend)["apart"][1]}
    found = compare_methods(backend, some, SETTINGS, progress=no_progress)
    mine = way(found, "mine")
    assert (mine["traits"], list(mine["changes"][TWO])) == ([TWO], [ONE, TWO])
    assert mine["cosines"][TWO] == {ONE: None, TWO: pytest.approx(1)}
    assert next(each for each in found.summary["pairs"] if each["other"] == "mine")["traits"] == [TWO]
    assert list(found.summary["traits"][ONE]["methods"]) == ["apart", "tangled"]
    assert "mine" in found.report()


def test_less_of_both_is_steered_to_and_counted_towards_it(backend: Two) -> None:
    found = compared(backend, replace(SETTINGS, towards=Towards.LESS))
    tangled = way(found, "tangled")
    assert tangled["on"]["vector"]["mean"] > 0 > tangled["changes"][ONE][ONE]["vector"]["mean"]
    assert tangled["entanglement"]["mean"] == pytest.approx(
        way(compared(backend), "tangled")["entanglement"]["mean"], abs=0.01
    )


def test_questions_that_another_trait_was_extracted_with_are_left_out(backend: Two) -> None:
    first, second = (each[0] for each in (ways(backend)["apart"], ways(backend)["apart"][1:]))
    used = load_trait(TWO).model_copy(update={
        "extraction_questions": (*load_trait(TWO).extraction_questions[:-1], load_trait(ONE).evaluation_questions[0])
    })  # fmt: skip
    found = compare_methods(backend, {"apart": [first, second]}, SETTINGS, traits={TWO: used}, progress=no_progress)
    assert found.summary["questions"] == 11
    assert load_trait(ONE).evaluation_questions[0] not in str(found.summary["traits"][ONE]["samples"])


def test_what_makes_no_sense_is_refused(backend: Two, run: Path) -> None:
    with pytest.raises(AnalysisError, match="no judge for 'impolite'"):
        compared(backend, judges={ONE: LengthJudge()})
    alone = {"apart": ways(backend)["apart"][1]}
    with pytest.raises(
        AnalysisError, match=r"traits that are compared \(impolite\), one of each; got runs of optimistic"
    ):
        compare_methods(backend, alone, SETTINGS, runs=[run], progress=no_progress)


# Without noise


def test_squares_are_told_without_what_noise_adds() -> None:
    rng = np.random.default_rng(0)
    nothing = [mean_square(rng.normal(0, 10, (3, 12)), np.zeros(12, dtype=np.int64)) for _ in range(400)]
    assert abs(np.mean(nothing)) < 3 * np.std(nothing) / 20
    some = [mean_square(rng.normal(0, 10, (3, 12)) + 7, np.arange(12) % 3) for _ in range(400)]
    assert np.mean(some) == pytest.approx(49, abs=3 * float(np.std(some)) / 20)
    assert mean_square(np.array([[3.0, 5.0], [np.nan, 1.0]]), np.zeros(2, dtype=np.int64)) == 15.0
    assert math.isnan(mean_square(np.array([[3.0, 5.0]]), np.array([0, 1])))


@pytest.mark.parametrize(("off", "questions"), [(0.0, 12), (2.0, 20), (6.0, 12), (15.0, 20)])
def test_intervals_of_entanglement_hold_what_is_true(off: float, questions: int) -> None:
    """Cells of either sign that share some of the noise of a question."""
    rng, missed, tries = np.random.default_rng(3), 0, 150
    directions = np.zeros(questions, dtype=np.int64)
    for _ in range(tries):
        noise = rng.normal(0, 12, (6, questions)) + rng.normal(0, 6, questions)
        moved = off * np.array([[1], [-1]] * 3) + noise
        told = Moves(moved, moved[:0], directions, rng.normal(40, 15, questions)).spill().entanglement
        assert told is not None
        missed += not told.low <= off / 40 <= told.high
    assert missed <= 0.09 * tries


def test_what_does_not_move_itself_has_no_entanglement() -> None:
    moved, still = np.full((2, 10), 20.0), np.random.default_rng(1).normal(0, 10, 10)
    found = Moves(moved, moved / 2, np.arange(10) % 2, still).spill()
    assert (found.entanglement, found.random_entanglement) == (None, None)
    assert found.off is not None
    assert found.off.difference is not None
    assert (found.off.vector.mean, found.off.clear) == (20, 1)
    assert found.off.difference.mean == pytest.approx(math.sqrt(300))


# The harmonic mean


def test_the_harmonic_mean_is_that_of_the_three_marks() -> None:
    known, before = {0: 0.2, 1: 0.3}, {0: 0.5, 1: 0.5}
    rows = [(0, 80.0, 2.5, None), (1, 40.0, 1.0, None), (1, None, None, None), (2, 100.0, 9.0, None)]
    found = Marks.of(rows, 1.5, known, before, 1)
    first, second = 3 / (1 / 1.6 + 1 / 1 + 1 / 1.0), 3 / (1 / 0.8 + 1 / 2 + 1 / 1.0)
    assert found.by_question() == {0: pytest.approx(first), 1: pytest.approx(second / 2), 2: 0}
    told = harmonic([found])
    assert told is not None
    assert told.mean == pytest.approx((first + second / 2) / 3)
    assert 0 <= told.low < told.mean < told.high <= 2
    assert dict(Marks.of([(0, 80.0, None, 30.0)], None, {}, {}, -1).responses)[0] == pytest.approx((0.4, 0.6))
    assert harmonic([]) is None


def test_known_questions_count_in_the_interval_of_the_harmonic_mean() -> None:
    rows = [(number, 70.0 + number, 1.0, None) for number in range(12)]
    before = dict.fromkeys(range(8), 0.8)
    even = harmonic([Marks.of(rows, 1.0, dict.fromkeys(range(8), 0.4), before, 1)])
    uneven = harmonic([Marks.of(rows, 1.0, {n: 0.1 + 0.6 * (n % 2) for n in range(8)}, before, 1)])
    assert even is not None
    assert uneven is not None
    assert even.mean == pytest.approx(uneven.mean, abs=1e-9)
    assert uneven.high - uneven.low > 2 * (even.high - even.low)


# Detection


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = ExtractionSettings(questions=6, rollouts=RolloutSettings(max_new_tokens=24, batch_size=7))
    trait = load_trait(ONE)
    extract(
        PlantedBackend(trait, noise=3.0, disobeys=lambda seed: seed % 11 == 0), trait, folder, settings=settings,
        progress=no_progress,
    )  # fmt: skip
    return folder


def test_detection_is_that_of_directions_made_of_other_questions(run: Path) -> None:
    samples = read_samples(run)
    other = replace(samples.vectors, trait=ONE).random_like(3)
    methods = {"difference": samples.vectors, "lda": fit_vectors(samples, "lda", progress=no_progress), "mine": other}
    found = detection(samples, methods, [samples], LAYER, "response_mean", 0)
    every, kept = samples.everything(LAYER)
    assert (len(every), found["responses"], found["questions"]) == (60, 60, 6)
    assert kept.sum() == len(samples.responses) < 60
    by_hand = []
    for fold in (0, 1):
        seen, tried = every.chosen(kept & (every.question % 2 != fold)), every.chosen(every.question % 2 == fold)
        values = tried.activations @ seen.difference
        by_hand.append(auc(values[tried.positive], values[~tried.positive]))
    told = found["methods"]
    assert told["difference"]["auc"] == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert told["difference"]["low"] < told["difference"]["auc"] <= told["difference"]["high"]
    assert told["lda"]["auc"] != told["difference"]["auc"]
    assert [each["anew"] for each in told.values()] == [True, True, False]
    whole = every.activations @ other.vector(LAYER).double().numpy()
    alone = [
        auc(*(whole[(every.question % 2 == fold) & arm] for arm in (every.positive, ~every.positive)))
        for fold in (0, 1)
    ]
    assert told["mine"]["auc"] == pytest.approx(np.mean(alone), abs=1e-9)
    assert found["random"] < told["difference"]["auc"]
    assert found["judge"]["auc"] > found["random"]


def test_what_was_kept_out_of_a_direction_is_kept_out_of_its_detection(run: Path) -> None:
    samples = read_samples(run)
    other = replace(samples.vectors.random_like(4), trait=TWO)
    apart = fit_vectors(samples, "difference", without=[other], progress=no_progress)
    stranger = RunSamples(samples.folder, other, samples.responses, samples.shards)

    def told(others: Sequence[RunSamples]) -> Any:
        ways = {"apart": apart, "plain": samples.vectors}
        return detection(samples, ways, others, LAYER, "response_mean", 0)["methods"]

    assert told([samples])["apart"] is None  # what was kept out is not there
    both = told([samples, stranger])
    assert both["apart"]["auc"] != both["plain"]["auc"]


def test_detection_is_told_with_the_run(backend: Two, run: Path) -> None:
    own = read_samples(run).vectors
    given = {"difference": replace(own, model=backend.info)}
    found = compare_methods(backend, given, SETTINGS, runs=[run], progress=no_progress)
    told = found.summary["traits"][ONE]["detection"]
    assert set(told) == {"responses", "questions", "methods", "judge", "random"}
    assert "What each detects" in found.report()
