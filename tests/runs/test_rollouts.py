"""Rollouts: planned once, saved as they come, and the same however they were cut or interrupted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_lens.backend import Backend, Edit, Read, TokenError
from persona_lens.core.progress import PersonaLensNote
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunError, RunFolder
from persona_lens.runs.rollouts import Request, Rollout, Rollouts, row_seed
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import Arm, load_trait
from tests.backends.fixtures import backend_of, tiny_backend
from tests.families import FAMILIES
from tests.planted import PlantedBackend
from tests.thinking import ASKED, thinking_model

CONFIG = {"kind": "rollouts"}
SETTINGS = RolloutSettings(max_new_tokens=12, batch_size=3)
# Unlike lengths in no order, so that batches differ from the order of the requests.
QUESTIONS = ("Why is the sky blue at noon?", "Hi", "What now, then?", "Name a colour.", "Who?", "Tell me a long story.")
REQUESTS = [
    Request(
        system, question, row_seed(0, "test", number, system), {"number": number, "with_system": system is not None}
    )
    for number, question in enumerate(QUESTIONS)
    for system in (None, "Be brief.")
]


def rollouts_of(
    backend: Backend,
    folder: RunFolder | None = None,
    settings: RolloutSettings = SETTINGS,
    requests: Sequence[Request] = REQUESTS,
    reads: Sequence[Read] = Read.means(),
    **more: Any,
) -> Rollouts:
    return Rollouts(backend, chat_format(backend), requests, settings, folder=folder, reads=reads, **more)


def reductions(rollouts: Rollouts) -> dict[str, Tensor]:
    """What was read, in the order of the requests."""
    rows: dict[str, dict[int, Tensor]] = {}
    for indices, tensors in rollouts.reductions():
        for name, values in tensors.items():
            rows.setdefault(name, {}).update(zip(indices, values, strict=True))
    return {name: torch.stack([found[i] for i in sorted(found)]) for name, found in rows.items()}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def tiny() -> Backend:
    return tiny_backend("transformers")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with RunFolder(folder, CONFIG) as run:
        rollouts_of(tiny_backend("transformers"), run).run()
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_row_seeds_never_change() -> None:
    """Half the first eight bytes, as ``printf '0' | sha256sum`` has them: runs of other versions stay comparable."""
    assert row_seed(0, "extraction", 0, 0, 0, Arm.POSITIVE) == 4702157162127364471
    assert row_seed(0, "extraction", 0, 0, 0, "negative") == 633194317395872383
    assert row_seed(1, "sweep", "evaluation", 3, 2) == 6799071283549591890
    assert row_seed(0) == 3456079177858693020


def test_row_seeds_are_unlike_and_in_range() -> None:
    seeds = [row_seed(base, *parts) for base in range(9) for parts in ((), (1,), (1, 1), (11,), ("1", "a"), ("1a",))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_batches_are_planned_once_by_length(tiny: Backend) -> None:
    rollouts = rollouts_of(tiny)
    chat = chat_format(tiny)
    lengths = [len(chat.encode(r.system, r.question)) for r in REQUESTS]
    flat = [index for batch in rollouts.batches for index in batch]
    assert sorted(flat) == list(range(len(REQUESTS)))
    assert flat == sorted(flat, key=lambda i: (lengths[i], i))
    assert [len(batch) for batch in rollouts.batches] == [3, 3, 3, 3]
    assert rollouts_of(tiny).batches == rollouts.batches


def test_batches_respect_the_limit_of_tokens(tiny: Backend) -> None:
    limit = 150
    rollouts = rollouts_of(tiny, settings=RolloutSettings(max_new_tokens=12, batch_size=64, batch_tokens=limit))
    chat = chat_format(tiny)
    lengths = [len(chat.encode(r.system, r.question)) + 12 for r in REQUESTS]
    sizes = [len(batch) * max(lengths[i] for i in batch) for batch in rollouts.batches]
    assert all(size <= limit or len(batch) == 1 for size, batch in zip(sizes, rollouts.batches, strict=True))
    assert any(len(batch) > 1 for batch in rollouts.batches)


@pytest.mark.parametrize("size", [1, 4, 64])
def test_a_response_does_not_depend_on_its_batch(tiny: Backend, finished: Path, size: int) -> None:
    other = rollouts_of(tiny, settings=RolloutSettings(max_new_tokens=12, batch_size=size))
    rollouts = other.run()
    with RunFolder(finished, CONFIG) as run:
        whole = rollouts_of(tiny, run)
        assert whole.run() == rollouts
        expected = reductions(whole)
    for name, values in reductions(other).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_response_depends_on_its_seed_alone(tiny: Backend) -> None:
    same = [Request(None, "Hi", 1), Request(None, "Hi", 2), Request(None, "Hi", 1)]
    first, second, third = (r.response_ids for r in rollouts_of(tiny, requests=same).run())
    assert first == third != second


def test_results_stand_in_the_order_of_the_requests(tiny: Backend) -> None:
    rollouts = rollouts_of(tiny)
    assert [index for batch in rollouts.batches for index in batch] != list(range(len(REQUESTS)))
    found = rollouts.run()
    assert [r.request for r in found] == REQUESTS
    chat = chat_format(tiny)
    for rollout in found:  # each by itself
        alone = rollouts_of(tiny, requests=[rollout.request]).run()
        assert alone == [rollout]
        assert rollout.prompt_tokens == len(chat.encode(rollout.request.system, rollout.request.question))
        assert rollout.response == chat.decode(rollout.response_ids)
        assert len(rollout.response_ids) == 12 or rollout.ended


def test_memory_and_disk_give_the_same(tiny: Backend, finished: Path) -> None:
    kept = rollouts_of(tiny)
    rollouts = kept.run()
    with RunFolder(finished, CONFIG) as run:
        saved = rollouts_of(tiny, run)
        assert saved.run() == rollouts
        on_disk = reductions(saved)
    in_memory = reductions(kept)
    assert in_memory.keys() == on_disk.keys() == {"response_mean", "prompt_mean", "prompt_last"}
    for name, values in in_memory.items():
        assert torch.equal(values.nan_to_num(), on_disk[name].nan_to_num())


def test_rows_can_be_read_back() -> None:
    request = Request("Be brief.", "Hi", 3, {"arm": "positive", "pair": 0})
    rollout = Rollout(request, 7, (5, 6), True, "é\u2028")
    row = rollout.to_row()
    assert row == {
        "arm": "positive",
        "pair": 0,
        "seed": 3,
        "system": "Be brief.",
        "question": "Hi",
        "prompt_tokens": 7,
        "response_ids": [5, 6],
        "ended": True,
        "response": "é\u2028",
    }
    assert Rollout.from_row(row, request) == rollout


def unsort(folder: Path) -> None:
    """The rows as they stand while a run is under way: batch by batch."""
    file = folder / "rollouts.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    batches = rollouts_of(tiny_backend("transformers")).batches
    file.write_bytes(b"".join(lines[index] for batch in batches for index in batch))


def resume(folder: Path) -> list[int]:
    """Go on in a folder; the sizes of the batches that were run again."""
    sizes = []

    def edits_for(requests: Sequence[Request]) -> Sequence[Edit]:
        sizes.append(len(requests))
        return ()

    with RunFolder(folder, CONFIG) as run:
        assert rollouts_of(tiny_backend("transformers"), run, edits_for=edits_for).run()
    return sizes


def test_nothing_is_run_again_when_all_is_there(copy: Path, finished: Path) -> None:
    assert resume(copy) == []
    assert contents(copy) == contents(finished)


@pytest.mark.parametrize("lines", [0, 1, 3, 5, 9, 11])
def test_a_run_goes_on_after_its_last_whole_batch(copy: Path, finished: Path, lines: int) -> None:
    file = copy / "rollouts.jsonl"
    unsort(copy)
    kept = b"".join(file.read_bytes().splitlines(keepends=True)[:lines])
    os.truncate(file, len(kept) + 5)  # and a part of the next line
    assert resume(copy) == [3] * (4 - lines // 3)
    assert contents(copy) == contents(finished)


def test_the_rows_are_numbered_in_the_order_of_the_plan(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "rollouts.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(12))
    assert [row["question"] for row in rows] == [request.question for request in REQUESTS]


def swap(lines: list[bytes]) -> list[bytes]:
    return [lines[5], *lines[1:5], lines[0], *lines[6:]]


@pytest.mark.parametrize("spoil", [swap, lambda lines: [*lines[:4], *lines[5:]], lambda lines: lines[::-1]])
def test_lines_that_moved_or_are_gone_are_put_right(copy: Path, finished: Path, spoil: Any) -> None:
    file = copy / "rollouts.jsonl"
    before = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(spoil(before)))
    assert resume(copy) == [3] * (len(spoil(before)) < len(before))
    assert contents(copy) == contents(finished)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [*lines[:3], lines[1], *lines[3:]],  # doubled
        lambda lines: [*lines[:3], lines[3].replace(b'"row": 3', b'"row": 5'), *lines[4:5], *lines[6:]],  # of another
        lambda lines: [*lines[:3], lines[3].replace(b'"response": "', b'"response": "Not '), *lines[4:]],  # changed
        lambda lines: [*lines[:3], b"[]\n", *lines[4:]],
    ],
)
def test_lines_that_are_not_the_runs_are_said(copy: Path, spoil: Any) -> None:
    file = copy / "rollouts.jsonl"
    spoilt = b"".join(spoil(file.read_bytes().splitlines(keepends=True)))
    file.write_bytes(spoilt)
    with pytest.raises(RunError, match=r"line 4 of .*rollouts\.jsonl is damaged, or not what this run wrote"):
        resume(copy)
    assert file.read_bytes() == spoilt


def test_a_shard_without_rows_is_made_again(copy: Path, finished: Path) -> None:
    """Killed after the activations were written and before the rows were."""
    unsort(copy)
    file = copy / "rollouts.jsonl"
    os.truncate(file, sum(map(len, file.read_bytes().splitlines(keepends=True)[:9])))
    (copy / "activations" / "batch-00003.safetensors").write_bytes(b"half of it")
    (copy / "activations" / "batch-00003.safetensors.part").write_bytes(b"less")
    assert resume(copy) == [3]
    assert contents(copy) == contents(finished)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(b"\x80\x04 pickled"), "is missing or damaged"),
        (flip, "is damaged; remove it, and the same command makes it again"),
        (lambda file: shutil.copy(file.with_name("batch-00002.safetensors"), file), "is of another batch; remove it"),
    ],
)
def test_a_shard_that_is_not_the_batchs_is_said_and_made_again(
    copy: Path, finished: Path, spoil: Any, message: str
) -> None:
    shard = copy / "activations" / "batch-00001.safetensors"
    spoil(shard)
    with RunFolder(copy, CONFIG) as run:
        rollouts = rollouts_of(tiny_backend("transformers"), run)
        rollouts.run()
        with pytest.raises(RunError, match=rf"batch-00001\.safetensors {message}"):
            list(rollouts.reductions())
    shard.unlink()  # as the message says
    assert resume(copy) == [3]
    assert contents(copy) == contents(finished)


def test_sets_of_rollouts_in_one_folder_do_not_meet(tiny: Backend, tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as run:
        first = rollouts_of(tiny, run, requests=REQUESTS[:2], prefix="a-").run()
        second = rollouts_of(tiny, run, requests=REQUESTS[2:4], prefix="b-").run()
    assert [r.request for r in first + second] == REQUESTS[:4]
    assert (tmp_path / "a-rollouts.jsonl").exists()
    assert (tmp_path / "activations" / "b-batch-00000.safetensors").exists()


def test_progress_counts_what_was_there_before(tiny: Backend, copy: Path) -> None:
    file = copy / "rollouts.jsonl"
    unsort(copy)
    os.truncate(file, sum(map(len, file.read_bytes().splitlines(keepends=True)[:6])))
    seen: list[tuple[int, int | None, str]] = []
    with RunFolder(copy, CONFIG) as run:
        rollouts_of(tiny, run).run(lambda done, total, label: seen.append((done, total, label)))
    assert seen == [(6, 12, "extraction rollouts"), (9, 12, "extraction rollouts"), (12, 12, "extraction rollouts")]


def planted(**rules: Any) -> PlantedBackend:
    return PlantedBackend(load_trait("optimistic"), **rules)


def test_reasoning_is_no_part_of_the_response() -> None:
    backend = planted(respond=lambda leaning: "<think>They want cheer.</think>\n\nAll will be well.")
    settings = RolloutSettings(max_new_tokens=200)
    (rollout,) = rollouts_of(backend, settings=settings, requests=REQUESTS[:1], reads=()).run()
    assert rollout.response == "All will be well."
    assert "want cheer" in backend.tokenizer.decode(list(rollout.response_ids))  # what was said in full is kept


def test_a_response_that_is_all_reasoning_is_empty() -> None:
    backend = planted(respond=lambda leaning: "<think>They want cheer, and then")
    (rollout,) = rollouts_of(backend, settings=RolloutSettings(20), requests=REQUESTS[:1], reads=()).run()
    assert rollout.response == ""
    assert len(rollout.response_ids) == 20


def test_responses_that_come_to_no_answer_are_said_to(tmp_path: Path) -> None:
    backend = backend_of("transformers", thinking_model(), FAMILIES["qwq"].tokenizer())
    asked = [Request(None, ASKED, 0), Request(None, "Why?", 1)]
    for _ in ("when they are made", "when they are there"):
        with RunFolder(tmp_path / "run", CONFIG) as run:
            made = rollouts_of(backend, run, RolloutSettings(1, temperature=0.0), asked)
            with pytest.warns(PersonaLensNote, match="no response came to an answer: the model was still thinking"):
                made.run()


def test_empty_responses_are_kept_as_such(tmp_path: Path) -> None:
    silent = {REQUESTS[0].seed, REQUESTS[5].seed}
    with RunFolder(tmp_path, CONFIG) as run:
        rollouts = rollouts_of(planted(silent=silent.__contains__), run)
        found = rollouts.run()
        means = reductions(rollouts)
    empty = [r.request.seed in silent for r in found]
    assert [r.response == "" and r.response_ids == () and r.ended for r in found] == empty
    assert means["response_mean"].isnan().all(dim=(1, 2)).tolist() == empty
    assert not means["prompt_last"].isnan().any()


def test_a_batch_that_does_not_fit_is_halved_with_its_seeds_and_edits() -> None:
    vector = planted().planted["response_mean"][1]

    def edits_for(requests: Sequence[Request]) -> list[Edit]:
        return [Edit.add(1, vector, torch.tensor([float(r.labels["number"]) for r in requests]))]

    def run(max_rows: int) -> tuple[list[Rollout], dict[str, Tensor], list[int]]:
        backend = planted(max_rows=max_rows, noise=1.0)
        rollouts = rollouts_of(backend, settings=RolloutSettings(batch_size=5), edits_for=edits_for)
        return rollouts.run(), reductions(rollouts), backend.generated

    whole, means, sizes = run(5)
    halved, halved_means, halved_sizes = run(2)
    assert halved == whole
    assert [r.response for r in whole] == [f"leaning {r.request.labels['number']:+.3f}" for r in whole]
    assert all(torch.equal(means[name], halved_means[name]) for name in means)
    assert sizes == [5, 5, 2]
    assert halved_sizes == [2, 1, 2, 2, 1, 2, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": 0.0, "top_p": 0.9}, "top_p do nothing at temperature 0"),
        ({"batch_size": 0}, "at least 1 row"),
        ({"batch_tokens": 0}, "at least 1 row and 1 token"),
    ],
)
def test_settings_that_mean_nothing_are_refused_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenError, match=message):
        RolloutSettings(**wrong)


def test_greedy_rollouts_take_no_seeds(tiny: Backend) -> None:
    settings = RolloutSettings(max_new_tokens=4, temperature=0.0)
    same = [Request(None, "Hi", 1), Request(None, "Hi", 2)]
    first, second = rollouts_of(tiny, settings=settings, requests=same).run()
    assert first.response_ids == second.response_ids
