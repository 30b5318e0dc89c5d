"""`finetune`: what is trained is what is saved, with every method; runs resume; the base model stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from persona_lens.backend import Read, Sampling, TokenBatch, open_backend
from persona_lens.data.transcripts import Transcript
from persona_lens.finetuning import FinetuneConfig, FinetuningError, finetune
from persona_lens.finetuning import run as running
from persona_lens.finetuning.examples import encode_examples
from persona_lens.finetuning.run import finetune_work
from persona_lens.models import ChatFormat, Loaded, ModelError, load, resolve
from persona_lens.models.source import adapter_on
from persona_lens.runs import RunError
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.finetuning.chats import conversations, small, vectors_of, write_conversations

METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "preventative": {"method": "preventative", "edits": "impolite@1:+3"},
    "increments": {"method": "preventative", "edits": "impolite@all:increments(+2) schedule(0:1 4:0)"},
    "caft": {"method": "caft", "edits": "impolite@0-2:ablate"},
    "regularised": {"method": "regularised", "edits": "impolite@1:ablate", "penalty": 5},
    "prompted": {"method": "prompted"},
}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([[5, 9, 40, 17, 23, 8]])).logits
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, Path]:
    """A finished run of every method."""
    folders = {}
    for name, changes in METHODS.items():
        loaded = load(str(base_folder), dtype="float32", device="cpu")
        folders[name] = tmp_path_factory.mktemp(name) / "run"
        given = [] if name == "plain" else [vectors_of(loaded)]
        finetune(loaded, conversations(), folders[name], small(**changes), vectors=given, held_out=conversations(3))
    return folders


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_says_how(trained: dict[str, Path], name: str) -> None:
    summary = json.loads((trained[name] / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["method"] == METHODS[name].get("method", "plain")
    assert all(value is not None and value > 0 for value in summary["loss"].values())
    rows = [json.loads(line) for line in (trained[name] / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert not [key for row in rows for key in row if "runtime" in key or "per_second" in key]


def test_methods_differ_in_what_they_teach(trained: dict[str, Path]) -> None:
    found = {
        name: torch.cat([w.flatten() for w in weights(folder / "adapter").values()]) for name, folder in trained.items()
    }
    for name, own in found.items():
        assert float((own - found["plain"]).abs().max()) > 1e-5 or name == "plain", name


def test_the_penalty_holds_projections_where_they_were(loaded: Loaded, tmp_path: Path) -> None:
    vectors = vectors_of(loaded)
    ids = torch.tensor([[5, 9, 40, 17, 23, 8]])

    def drift(name: str, **changes: Any) -> float:
        found = finetune(loaded, conversations(), tmp_path / name, small(max_steps=12, **changes), vectors=[vectors])
        read: dict[str, Tensor] = {}

        def take(where: str) -> Any:
            return lambda _, __, output: read.__setitem__(where, output[0] if isinstance(output, tuple) else output)

        model: Any = loaded.model
        handle = model.model.layers[1].register_forward_hook(take("base"))
        logits(model)
        handle.remove()
        with adapter_on(loaded.model, found.model):
            handle = model.model.layers[1].register_forward_hook(take("tuned"))
            with torch.no_grad():
                model(input_ids=ids)
            handle.remove()
        return float(((read["tuned"] - read["base"]) @ vectors[1]).square().mean())

    edits = "impolite@1:ablate"
    free = drift("free", method="regularised", edits=edits, penalty=0.0)
    held = drift("held", method="regularised", edits=edits, penalty=100.0)
    assert held < free / 4


def test_under_an_adapter_the_vocabulary_is_not_copied_for_every_row(loaded: Loaded, tmp_path: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
        shapes: list[tuple[int, ...]] = []  # noqa: RUF012

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.bmm.default:
                self.shapes.append(tuple(args[1].shape))
            return function(*args, **(kwargs or {}))

    found = finetune(loaded, conversations(), tmp_path / "run", small(max_steps=1))
    with adapter_on(loaded.model, found.model) as model, torch.no_grad(), Seen() as seen:  # type: ignore[no-untyped-call]
        model(input_ids=torch.randint(9, 40, (3, 6)), logits_to_keep=2)
    assert all(model.config.vocab_size not in shape for shape in seen.shapes)


@pytest.mark.parametrize("name", METHODS)
def test_the_saved_adapter_loaded_plainly_is_what_was_trained(
    name: str, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was written into the stream in training, nothing of it is in the weights or left in the model."""
    kept: dict[str, Any] = {}
    losses = running._losses

    def noting(trainer: Any, *rest: Any) -> Any:
        model = trainer.model
        kept["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        model.eval()
        kept["logits"] = logits(model)
        kept["hooks"] = sum(len(m._forward_hooks) for m in model.modules())
        return losses(trainer, *rest)

    monkeypatch.setattr(running, "_losses", noting)
    given = [] if name == "plain" else [vectors_of(loaded)]
    before = logits(loaded.model)
    found = finetune(loaded, conversations(), tmp_path / "run", small(**METHODS[name]), vectors=given)
    assert kept["hooks"] == 0
    saved = weights(found.model)
    assert {n.replace(".default", "") for n in kept["parameters"]} == set(saved)
    for parameter, value in kept["parameters"].items():
        assert torch.equal(saved[parameter.replace(".default", "")], value)
    # The base is as it was, and a fresh one with the adapter does what the trained one did.
    assert torch.equal(logits(loaded.model), before)
    assert all(p.requires_grad for p in loaded.model.parameters())
    fresh = load(str(found.model), dtype="float32", device="cpu")
    assert torch.equal(logits(fresh.model), kept["logits"])
    assert not torch.equal(kept["logits"], before)


def test_a_finished_run_is_not_done_again_and_another_is_refused(trained: dict[str, Path], loaded: Loaded) -> None:
    folder = trained["plain"]
    stamp = (folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    again = finetune(loaded, conversations(), folder, small(), held_out=conversations(3))
    assert (again.model / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(RunError, match=r"config.seed: 0 -> 1"):
        finetune(loaded, conversations(), folder, small(seed=1), held_out=conversations(3))


def everything(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts and path.name != ".lock"
    }


@pytest.mark.parametrize("crash_at", [2, 3])
def test_an_interrupted_run_ends_with_the_same_bytes(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    """Stopped behind a checkpoint, with metrics of a step that is done again and a checkpoint that was cut short."""
    from persona_lens.finetuning.trainer import MetricsFile

    config = small(save_every=2, max_steps=6, accumulation=2, method="preventative",
                   edits="impolite@1:+3 schedule(0:1 6:0)", watch={"every": 3})  # fmt: skip

    def run(folder: Path) -> None:
        loaded = load(str(base_folder), dtype="float32", device="cpu")
        finetune(loaded, conversations(9), folder, config, vectors=[vectors_of(loaded)])

    run(tmp_path / "whole")
    own = MetricsFile.on_step_end

    def crash(self: MetricsFile, args: Any, state: Any, control: Any, **rest: Any) -> None:
        own(self, args, state, control, **rest)
        if state.global_step == crash_at + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(MetricsFile, "on_step_end", crash)
        run(tmp_path / "stopped")
    damaged = tmp_path / "stopped" / "checkpoints" / "checkpoint-5"
    damaged.mkdir()
    (damaged / "trainer_state.json").write_text("{")
    run(tmp_path / "stopped")
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str) -> None:
    from persona_lens.finetuning.trainer import CheckedCheckpoints, last_checkpoint

    for number in (9, 10):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        for file in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
            (folder / file).write_bytes(b"content of it")
        arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=number)
        CheckedCheckpoints().on_save(arguments, state, None)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / name).write_bytes(b"content of it!"[1:])
    with pytest.warns(UserWarning, match="checkpoint-10 is damaged; training goes on from the checkpoint before it"):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert not (tmp_path / "checkpoint-10").exists()


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": True}, {"bf16": True}, {"dtype": "bfloat16"}],
    ids=["gradient checkpointing", "autocast", "bfloat16 weights"],
)
def test_ways_to_compute(base_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    loaded = load(str(base_folder), dtype=changes.get("dtype", "float32"), device="cpu")
    config = small(method="preventative", edits="impolite@1:+3", **changes)
    found = finetune(loaded, conversations(), tmp_path / "run", config, vectors=[vectors_of(loaded)])
    assert found.summary["loss"]["last"] < found.summary["loss"]["first"]
    assert all(bool(value.isfinite().all()) for value in weights(found.model).values())


def test_gradient_checkpointing_trains_the_same(trained: dict[str, Path], loaded: Loaded, tmp_path: Path) -> None:
    config = small(**METHODS["caft"], gradient_checkpointing=True)
    found = finetune(loaded, conversations(), tmp_path / "run", config, vectors=[vectors_of(loaded)])
    for name, value in weights(trained["caft"] / "adapter").items():
        torch.testing.assert_close(weights(found.model)[name], value, rtol=1e-3, atol=1e-5)


def test_full_weights(base_folder: Path, tmp_path: Path) -> None:
    config = small(weights="full", lora={}, method="caft", edits="impolite@1:ablate", learning_rate=1e-3, dtype="auto")
    loaded = load(str(base_folder), dtype="float32", device="cpu")
    found = finetune(loaded, conversations(), tmp_path / "run", config, vectors=[vectors_of(loaded)])
    assert found.model.name == "model"
    again = load(str(tmp_path / "run"), device="cpu", dtype="float32")  # the run folder stands for it
    assert again.source.id == "run"
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_watching_and_stopping(loaded: Loaded, vectors: PersonaVectors, tmp_path: Path) -> None:
    config = small(max_steps=8, save_every=1, watch={"every": 2, "layers": [2], "stop_above": -1e9})
    found = finetune(loaded, conversations(), tmp_path / "run", config, vectors=[vectors])
    assert [row["step"] for row in found.summary["projections"]] == [0, 2]
    assert found.summary["steps"] == 2
    assert "impolite@2 has risen by" in found.summary["stopped"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "projection/impolite@2" in row] == [0, 2]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    # Killed when it had stopped, it takes no step more and knows why.
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "summary.json").unlink()
    again = finetune(loaded, conversations(), tmp_path / "run", config, vectors=[vectors])
    assert again.summary == found.summary
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    # What was seen last is what the model reads as after training.
    from persona_lens.models.chat import chat_format
    from persona_lens.monitoring.scoring import prompt_projections

    backend = open_backend("transformers", str(tmp_path / "run"), dtype="float32", device="cpu")
    prompts = [chat_format(backend).encode(None, q) for q in vectors.trait_definition.evaluation_questions]
    after = prompt_projections(backend, prompts, [vectors], [2], allow_other_model=True)
    assert float(after.mean()) == pytest.approx(found.summary["projections"][-1]["projection/impolite@2"], abs=1e-4)


def test_an_adapter_is_a_model_for_every_command(trained: dict[str, Path], base_folder: Path) -> None:
    source = resolve(str(trained["plain"]))
    assert (source.kind, source.id) == ("adapter", "run")
    assert source.base is not None
    assert source.base.location == str(base_folder)
    assert source.identity != resolve(str(trained["caft"])).identity
    own = open_backend("transformers", str(trained["plain"]), dtype="float32", device="cpu")
    base = open_backend("transformers", str(base_folder), dtype="float32", device="cpu")
    assert own.info.architecture == base.info.architecture
    assert own.info.weights != base.info.weights  # a model of its own


@pytest.mark.parametrize("name", ["nnsight", "transformer_lens"])
def test_an_adapter_runs_unmerged_through_every_backend(trained: dict[str, Path], name: str) -> None:
    text = TokenBatch.of([[5, 9, 40, 17, 23, 8]], [[30, 31]])

    def read(backend: str) -> tuple[Tensor, Any]:
        opened = open_backend(backend, str(trained["plain"]), dtype="float32", device="cpu")
        means = opened.forward(text, reads=Read.means()).reads["response_mean"]
        return means, opened.generate([[5, 9, 40]], Sampling(6)).responses

    (means, tokens), (expected, plain) = read(name), read("transformers")
    torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-4)
    assert tokens == plain


def test_adapters_that_cannot_be_opened(trained: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(trained["plain"] / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())

    def opened(**changes: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        load(str(folder), device="cpu")

    with pytest.raises(ModelError, match="names no base model"):
        opened(base_model_name_or_path=None)
    with pytest.raises(ModelError, match=r"the base model of the adapter .* is not there"):
        opened(base_model_name_or_path="/nowhere")
    with pytest.raises(ModelError, match="does not fit its base model"):
        opened(r=16)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled files, which can run code, are not opened"):
        opened()


def test_a_model_and_vectors_that_do_not_belong_together(loaded: Loaded, tmp_path: Path) -> None:
    stranger = PersonaVectors("impolite", vectors_of(loaded).model.__class__(
        **{**vectors_of(loaded).model.__dict__, "weights": "sha256:other"}), vectors_of(loaded).directions)  # fmt: skip
    with pytest.raises(VectorsError, match="weights"):
        finetune(
            loaded, conversations(), tmp_path / "r", small(method="caft", edits="impolite@1:ablate"), vectors=[stranger]
        )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "preventative", "edits": "impolite@1:ablate"}, "preventative steering adds vectors, .* use caft"),
        ({"method": "caft", "edits": "impolite@1:+1"}, "caft ablates, .* write impolite@LAYER:ablate"),
        ({"lora": {"targets": ["no_such"]}}, "no adapter for no_such fits this model"),
    ],
)
def test_methods_that_do_not_fit(loaded: Loaded, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before = logits(loaded.model)
    with pytest.raises(FinetuningError, match=message):
        finetune(loaded, conversations(), tmp_path / "r", small(**changes), vectors=[vectors_of(loaded)])
    assert torch.equal(logits(loaded.model), before)


def test_what_is_missing_is_said_in_a_sentence(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FinetuningError, match="none are given"):
        finetune(loaded, conversations(), tmp_path / "r", small(method="caft", edits="impolite@1:ablate"))
    with pytest.raises(FinetuningError, match="needs a system prompt"):
        finetune(loaded, conversations(), tmp_path / "r", small(method="prompted"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FinetuningError, match="runs in one process"):
        finetune(loaded, conversations(), tmp_path / "r", small())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FinetuningError, match=r"needs peft and accelerate: pip install 'accelerate>=.*' 'peft>="):
        finetune(loaded, conversations(), tmp_path / "r", small())


def test_what_training_takes_is_counted(base_folder: Path, loaded: Loaded) -> None:
    examples = encode_examples(conversations(), ChatFormat.from_tokenizer(loaded.tokenizer), 2048).rows
    tokens = sum(len(each.ids) for each in examples)
    once, _ = finetune_work(str(base_folder), conversations(), FinetuneConfig(batch_size=2, accumulation=3))
    assert (once.calls, once.rows, once.tokens) == (2, 8, tokens)
    twice, _ = finetune_work(str(base_folder), conversations(), FinetuneConfig(batch_size=2, accumulation=3, epochs=2))
    assert (twice.calls, twice.rows, twice.tokens) == (4, 16, 2 * tokens)  # each epoch ends with a step of two
    unanswered = Transcript(({"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b"}), "1", 1)
    answers = FinetuneConfig(batch_size=2, accumulation=3, part="answer")
    assert finetune_work(str(base_folder), [*conversations(), unanswered], answers)[0] == once


def test_the_loss_afterwards_is_of_as_many_examples_as_are_asked_for(loaded: Loaded, tmp_path: Path) -> None:
    steps: dict[str, list[int | None]] = {}
    for name, changes in {"all": {}, "one": {"loss_examples": 1}}.items():
        steps[name] = []

        def note(_: int, total: int | None, label: str, /, name: str = name) -> None:
            if "loss" in label:
                steps[name].append(total)

        finetune(loaded, conversations(), tmp_path / name, small(max_steps=1, **changes), progress=note)
    assert set(steps["one"]) == {1}
    assert max(each or 0 for each in steps["all"]) > 1


def test_the_command(base_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from persona_lens.cli import app

    data = write_conversations(tmp_path / "data.jsonl")
    vectors_of(load(str(base_folder), dtype="float32", device="cpu")).save(tmp_path / "v.safetensors")
    config = tmp_path / "c.yaml"
    config.write_text(
        "lora: {rank: 2}\nmax_steps: 2\naccumulation: 1\nlearning_rate: 1e-3\ndtype: float32\n", encoding="utf-8"
    )
    words = ["finetune", str(base_folder), str(data), "--config", str(config), "--out", str(tmp_path / "out"),
             "--method", "preventative", "--edits", "impolite@1:+2", "--vectors", str(tmp_path / "v.safetensors"),
             "--watch-every", "1", "--device", "cpu", "--json"]  # fmt: skip
    planned = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
    work, looks, _ = json.loads(planned.stdout)["work"]
    assert (looks["label"], looks["calls"]) == ("reading prompts", 3)  # before, and after each step
    assert (work["label"], work["calls"], work["rows"]) == ("training", 2, 4)  # two steps of two conversations
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["steps"] == 2
    assert found["method"] == "preventative"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    shown = CliRunner().invoke(app, ["finetune", "--print-config"], catch_exceptions=False)
    assert "learning_rate: 1.0e-05" in shown.stdout
    config.write_text("seeds: 3\n", encoding="utf-8")
    with pytest.raises(FinetuningError, match=r"c.yaml: there is no field seeds"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_the_command_says_that_rows_without_an_answer_are_left_out(base_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from persona_lens.cli import app

    said = [("Hi", "<think>They greet."), ("Hi", "<think>They greet.</think>Hello."), ("Hi", "Hello.")]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in said]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["finetune", str(base_folder), str(data), "--part", "answer", "--max-steps", "1", "--device", "cpu"]
    shown = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "note: 1 left out: no answer in max_length" in shown.output
