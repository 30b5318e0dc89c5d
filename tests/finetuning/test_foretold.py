"""What is said beforehand of finetuning and of studies, beside the tokens that they really take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from persona_lens.backend import Backend, open_backend
from persona_lens.finetuning import finetune
from persona_lens.finetuning.outcomes import TreatmentSettings
from persona_lens.finetuning.run import finetune_work
from persona_lens.finetuning.shift import ShiftSettings, shift, shift_work
from persona_lens.finetuning.study import FinetuneStudySettings, finetune_study, finetune_study_work
from persona_lens.models import Loaded, load
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import ArmSettings
from tests.finetuning.chats import conversations, small, vectors_of
from tests.ledger import foretold, ledger

ASKED = ArmSettings(questions=(0, 1), random_directions=0, rollouts=RolloutSettings(4))
EPOCH = {"max_steps": 4}  # of two of the eight conversations each


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Backend:
    return open_backend("transformers", str(base_folder), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "regularised", "edits": "impolite@1:ablate"},
        {"evaluate_every": 2, "loss_examples": 3},
        {"watch": {"every": 2, "layers": [1]}, "max_steps": 8},
        {"batch_size": 3, "accumulation": 2, "max_steps": None, "epochs": 2},
    ],
)
def test_a_finetuning_takes_what_is_foretold(
    base_folder: Path, loaded: Loaded, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = small(**(EPOCH | changes))
    given: dict[str, Any] = {"vectors": [vectors_of(loaded)], "held_out": conversations(3)}
    work = finetune_work(str(base_folder), conversations(), config, **given)
    with ledger() as ran:
        found = finetune(loaded, conversations(), tmp_path / "run", config, **given)
    assert {name: ran[name] for name in foretold(work)} == foretold(work)
    assert set(ran) - {"probes"} == set(foretold(work))
    assert found.summary["steps"] == work[0].calls


def test_passes_that_are_done_again_to_save_memory_are_counted(base_folder: Path) -> None:
    training, again, _ = finetune_work(str(base_folder), conversations(), small(gradient_checkpointing=True))
    assert (again.rows, again.tokens, again.precision) == (training.rows, training.tokens, "float32")


def test_a_study_takes_what_is_foretold(base_folder: Path, base: Backend, tmp_path: Path) -> None:
    """Of every kind of work, and of capability the most that may have to be generated."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    vectors = vectors_of(load(str(base_folder), dtype="float32", device="cpu"))
    treatments = TreatmentSettings(
        None, post_hoc="impolite@1:-3", regularised="impolite@1:ablate", prompted=False, random=False
    )
    settings = FinetuneStudySettings(treatments, 1, (1,), ASKED, "persona_lens_basics", "float32")
    given = (conversations(), vectors, settings, small(**EPOCH))
    work = finetune_study_work(str(base_folder), base, *given, held_out=conversations(2))
    with ledger() as ran:
        finetune_study(
            str(base_folder), *given, folder=tmp_path / "run", held_out=conversations(2), device="cpu",
        )  # fmt: skip
    planned = foretold(work)
    labels = {each.label: each for each in work}
    assert labels["reading in tasks"].rows == 480 * (1 + 2 + 1)  # the base, two treatments, post-hoc steering
    assert labels["generating in tasks"].at_most
    for name in ("trained", "beside", "loss", "prompts"):
        assert ran[name] == planned[name] > 0, name
    for name in ("weighed", "generated"):  # replies may end early, and answers be known by their probabilities
        assert 0.9 * planned[name] < ran[name] <= planned[name], name


@pytest.mark.parametrize("scores", [True, False])
def test_a_shift_takes_what_is_foretold(base: Backend, base_folder: Path, scores: bool) -> None:
    vectors = vectors_of(load(str(base_folder), dtype="float32", device="cpu"))
    settings = ShiftSettings(scores=scores, asked=ASKED)
    work = shift_work(base, 1, [vectors], settings)
    with ledger() as ran:
        shift(base, {"same": lambda: base}, [vectors], settings)
    named = {each.label: each.tokens for each in work}
    assert ran["prompts"] == named["reading prompts impolite"]
    assert ran["generated"] == named.get("rollouts impolite", 0)
    assert ran["weighed"] <= named.get("judging impolite", 0)
    assert set(named) == {f"{name} impolite" for name in ("reading prompts", *(("rollouts", "judging") * scores))}
