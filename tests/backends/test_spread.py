"""Models in the workers of Ray: the same bytes as in one process, and what becomes of workers and calls that fail."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from persona_lens import PersonaLensError, RayWorkers, Sampling, TokenBatch, open_backend, screen
from persona_lens.backend import (
    Backend,
    BackendError,
    Edit,
    Positions,
    Read,
    ReadKind,
    TokenError,
    Watch,
    WatchedTokens,
)
from persona_lens.backend.batches import generate_rows
from persona_lens.backend.blocks import ModuleError
from persona_lens.backend.sinks import sink_limits
from persona_lens.backend.spread import RayBackend, WorkersError, await_answers, gpu_share, keeping_sigterm
from persona_lens.cli import app
from persona_lens.core.progress import PersonaLensNote
from persona_lens.core.threads import in_threads
from persona_lens.data.datasets import open_dataset
from persona_lens.extraction import extract
from persona_lens.models import ChatFormat
from persona_lens.monitoring import Gauge, Panel
from persona_lens.screening import ScreeningSettings
from persona_lens.traits import load_trait
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import assert_close
from tests.backends.mortal import waiting
from tests.extraction.test_extraction import TINY
from tests.families import FAMILIES, encoded
from tests.pages import blocks_of
from tests.screening import made
from tests.screening.made import jsonl, pairs
from tests.tiny import CHATML, D_MODEL, saved_model, tiny_model

ROOT = Path(__file__).resolve().parents[2]
TRAIT = load_trait("optimistic")
PROMPTS = [(5, 6, 7), (8, 9), (10, 11, 12, 13), (14,)]
PLAIN = {"dtype": "float32", "device": "cpu"}


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkersError, match=r"pip install 'ray>="):
        RayWorkers()


def test_a_cluster_that_is_not_there_is_one_sentence() -> None:
    pytest.importorskip("ray", reason="Ray is not installed, which the extra `ray` asks for")
    with pytest.raises(WorkersError, match=r"no Ray cluster answers at 'ray://127\.0\.0\.1:9'"):
        RayWorkers("ray://127.0.0.1:9")


@pytest.mark.parametrize(("gpus", "workers", "share"), [(0, 2, 0), (2, 2, 1), (4, 2, 1), (2, 3, 0.5), (1, 3, 1 / 3)])
def test_more_workers_than_gpus_share_them(gpus: int, workers: int, share: float) -> None:
    assert gpu_share(gpus, workers) == share


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workers", "2"), "--workers is for --ray"),
        (("--worker-gpus", "2"), "--worker-gpus is for --ray"),
        (("--ray", "local", "--remote"), "with --remote it runs on a server already"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(PersonaLensError, match=said):
        raise CliRunner().invoke(app, ["extract", "smollm2-135m", "optimistic", *arguments]).exception or SystemExit


def test_a_program_keeps_its_own_way_to_stop() -> None:
    def stop(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with keeping_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_workers_without_a_place_are_spoken_of() -> None:
    """Without Ray itself: a stand-in whose first worker answers late."""
    late = [["first"], ["ping"], []]
    ray = SimpleNamespace(wait=lambda *_, **__: ([], late.pop(0)))
    actor = SimpleNamespace(is_there=SimpleNamespace(remote=lambda: "ping"))
    with pytest.warns(PersonaLensNote, match="1 of 2 Ray workers have no place in the cluster now"):
        await_answers(ray, [actor, actor], ["first", "second"])
    assert not late


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model in a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(saved_model(folder, positions=2048))


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayWorkers]:
    """Two of them, which know the backend `mortal`."""
    ray = pytest.importorskip("ray", reason="Ray is not installed, which the extra `ray` asks for")
    known = tmp_path_factory.mktemp("installed")
    package = known / "mortal-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mortal\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[persona_lens.backends]\nmortal = tests.backends.mortal:SPEC\n")
    path = [str(known), str(ROOT), str(ROOT / "backends"), *filter(None, [os.environ.get("PYTHONPATH")])]
    set_to = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in set_to.items():
            patch.setenv(name, value)
        with RayWorkers("local", 2, threads=1) as started:
            yield started
        assert not ray.is_initialized()
        with pytest.raises(WorkersError, match="the Ray workers are closed"):
            started.open()


@pytest.fixture(scope="module")
def one(model: str) -> Backend:
    """The model in this process."""
    return open_backend("transformers", model, **PLAIN)


@pytest.fixture(scope="module")
def spread(workers: RayWorkers, model: str) -> RayBackend:
    """The same model in the workers."""
    return workers.open("transformers", model, **PLAIN)


def test_workers_tell_thinking_by_the_template_that_a_model_is_opened_with(workers: RayWorkers, tmp_path: Path) -> None:
    family, made = FAMILIES["nemotron"], tiny_model()  # whose template alone tells of thinking
    tokenizer = family.made()
    tokenizer.chat_template = CHATML
    made.resize_token_embeddings(len(tokenizer))
    for each in (made, tokenizer):
        each.save_pretrained(tmp_path)
    asked: dict[str, Any] = {**PLAIN, "chat_template": family.template}
    here, there = (opens("transformers", str(tmp_path), **asked) for opens in (open_backend, workers.open))
    assert there.tokenizer.chat_template == here.tokenizer.chat_template == family.template
    assert there.end_ids == here.end_ids
    ids, kinds = encoded(family, here.tokenizer, (*family.begun("They greet.\n"), family.mark(1), ("answer", "Hi.")))
    assert {"thinking", "answer"} < set(kinds)
    text = TokenBatch.of([ChatFormat.from_tokenizer(there.tokenizer).encode(None, "Hi!")], [ids])
    edits = [Edit.add(1, torch.ones(D_MODEL), 1.0, Positions.THINKING)]
    reads = [Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN)]
    assert_close(there.forward(text, edits, reads).reads, here.forward(text, edits, reads).reads)
    limited = Sampling(6, thinking_budget=2)
    assert there.generate(text.prompts, limited).responses == here.generate(text.prompts, limited).responses
    untold = workers.open("transformers", str(tmp_path), **PLAIN)
    for asking in (lambda: untold.forward(text, edits, reads[1:]), lambda: untold.generate(text.prompts, limited)):
        with pytest.raises(PersonaLensError, match="there is no thinking to"):
            asking()


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a run."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "report.html")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_an_extraction_as_the_guide_has_it_is_the_same(
    workers: RayWorkers, model: str, one: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(one, TRAIT, tmp_path / "one", settings=TINY)
    (block,) = blocks_of(ROOT / "docs" / "workers.md", "python")
    monkeypatch.setattr("persona_lens.RayWorkers", lambda *_, **__: nullcontext(workers), raising=False)
    text = block.text.replace('"smollm2-135m"', f'"{model}", dtype="float32"')
    exec(text.replace('"runs/optimistic"', f'"{tmp_path / "two"}", settings=TINY'), {"TINY": TINY})
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_a_command_goes_on_with_ray_where_it_was_without(
    workers: RayWorkers, model: str, one: Backend, tmp_path: Path
) -> None:
    stored = {"trait": {"content_hash": TRAIT.content_hash(), **TRAIT.model_dump(mode="json")}}
    vectors = PersonaVectors("optimistic", one.info, made.vectors("optimistic").directions, stored)
    command = ["monitor", "baseline", model, str(vectors.save(tmp_path / "vectors.safetensors")), "--dtype", "float32",
        "--max-new-tokens", "8", "--batch-size", "4", "--questions", "6"]  # fmt: skip
    assert CliRunner().invoke(app, [*command, "--out", str(tmp_path / "one")]).exit_code == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("summary.json", "vectors.safetensors"):
        (tmp_path / "two" / name).unlink()
    (rows,) = (tmp_path / "two").glob("*rollouts.jsonl")
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]))
    over = ["--ray", "local", "--workers", "1", "--worker-threads", "1"]
    assert CliRunner().invoke(app, [*command, *over, "--out", str(tmp_path / "two")]).exit_code == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_what_is_told_of_the_model_and_of_its_tokens(spread: RayBackend, one: Backend) -> None:
    assert (spread.info, spread.end_ids, spread.context_length) == (one.info, one.end_ids, 2048)
    assert (spread.calls_at_once, one.calls_at_once) == (2, 1)
    assert sink_limits(spread) == sink_limits(one)
    assert repr(spread) == f"<RayBackend {one.info.in_short}, 2 workers>"
    edit = Edit(1, made.vectors("kind").directions["response_mean"][1], coefficient=2.0)
    seen: dict[str, list[WatchedTokens]] = {"here": [], "there": []}
    for name, each in (("here", one), ("there", spread)):
        watch = Watch(edit.direction[None], seen[name].append, (1,))
        each.generate_watched(PROMPTS, Sampling(4), watch, edit)  # type: ignore[attr-defined]
    assert [each.step for each in seen["there"]] == [each.step for each in seen["here"]]
    assert all(a.ids.equal(b.ids) for a, b in zip(seen["here"], seen["there"], strict=True))


def test_what_a_worker_raises_comes_out_as_itself(workers: RayWorkers, model: str, spread: RayBackend) -> None:
    with pytest.raises(TokenError, match="99999") as raised:
        spread.forward(TokenBatch.of([(99999,)]), (), [Read(ReadKind.PROMPT_LAST)])
    assert "ray::" not in str(raised.value)
    with pytest.raises(BackendError, match="backend transformers has no option 'colour'"):
        workers.open("transformers", model, colour="red")
    with pytest.raises(ModuleError, match=r"open in Ray workers, and editing\(\) is for a module in this process"):
        spread.editing(())


def test_a_batch_that_is_too_large_for_a_worker_is_halved(workers: RayWorkers, model: str, one: Backend) -> None:
    backend = workers.open("mortal", model, room=4)
    many = PROMPTS * 3
    assert generate_rows(backend, many, Sampling(4)) == generate_rows(one, many, Sampling(4))


def test_a_worker_that_finds_another_model_says_so(workers: RayWorkers, model: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"another model under the name .*weights: "):
        workers.open("mortal", model, first=str(tmp_path / "first"))


def test_a_worker_runs_as_many_calls_at_once_as_its_backend_takes(workers: RayWorkers, model: str) -> None:
    backend = workers.open("mortal", model, at_once=3)
    assert backend.calls_at_once == 6
    wait = backend.over(waiting)
    assert max(most for _, most in in_threads(lambda _: wait(), range(12), 12)) == 3


def test_a_screening_is_the_same_though_a_worker_is_killed(
    workers: RayWorkers, model: str, one: Backend, tmp_path: Path
) -> None:
    panel = Panel((Gauge(PersonaVectors("kind", one.info, made.vectors("kind").directions), 1),))
    data = [open_dataset(jsonl(tmp_path / "rows.jsonl", [*pairs(40), {"x": 1}, *pairs(9, 1)]))]
    settings = ScreeningSettings(look_ahead=8, batch_tokens=300)
    screen(one, data, panel, settings, folder=tmp_path / "one")
    backend = workers.open("mortal", model, dies=str(tmp_path / "died"))
    done = screen(backend, data, panel, settings, folder=tmp_path / "two")
    assert (tmp_path / "died").exists()
    assert done.scored == 50
    assert content(tmp_path / "two") == content(tmp_path / "one")
