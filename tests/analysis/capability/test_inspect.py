"""inspect_ai runs its evaluations on any backend, in batches of what waits."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.backend import Backend, Sampling
from persona_lens.core.errors import PersonaLensError
from persona_lens.models import ChatFormat
from persona_lens.steering import Steering
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import Delegating, backend_of
from tests.tiny import D_MODEL, N_LAYERS, tiny_model

pytest.importorskip("inspect_ai", reason="needs the extra inspect")

import inspect_ai
from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageSystem as System
from inspect_ai.model import ChatMessageUser as User
from inspect_ai.model import ContentImage, ContentText, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message
from inspect_ai.tool import ToolInfo

import persona_lens.analysis.inspect_provider  # noqa: F401 - as the entry point does
from persona_lens.analysis.capability.inspect_model import PersonaLensAPI

QUESTIONS = ("Hello?", "What is it?", "Why?", "a", "How are you today?")


class Counting(Delegating):
    """Notes the batches that it generates."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.batches: list[tuple[int, Sampling]] = []

    def generate(self, prompts: Any, sampling: Sampling, *others: Any) -> Any:
        self.batches.append((len(prompts), sampling))
        return super().generate(prompts, sampling, *others)


@cache
def tiny() -> Backend:
    return backend_of("transformers", tiny_model(seed=2))


def expected(question: str, new: int, system: str | None = None) -> str:
    chat = ChatFormat.from_tokenizer(tiny().tokenizer)
    (ids,) = tiny().generate([chat.encode(system, question)], Sampling(new)).responses
    return chat.answer(ids)


def run(task: Task, folder: Path, backend: Backend, **options: Any) -> Any:
    model = get_model("persona-lens/tiny", backend=backend, memoize=False)
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(folder), display="none", **options)
    assert log.status == "success", log.error
    assert list(folder.glob("*.eval"))
    return log


def task(*solvers: Any) -> Task:
    samples = [Sample(input=question, target=expected(question, 8)[:3]) for question in QUESTIONS]
    return Task(dataset=samples, solver=[*solvers, generate()], scorer=includes(ignore_case=False))


def test_an_evaluation_gives_what_the_backend_generates_in_few_batches(tmp_path: Path) -> None:
    backend = Counting(tiny())
    log = run(task(), tmp_path, backend, max_tokens=8)
    assert [sample.output.completion for sample in log.samples] == [expected(q, 8) for q in QUESTIONS]
    assert log.results.scores[0].metrics["accuracy"].value == 1
    assert sum(rows for rows, _ in backend.batches) == 5
    assert len(backend.batches) < 5
    chat = ChatFormat.from_tokenizer(tiny().tokenizer)
    for sample in log.samples:
        assert sample.output.usage.input_tokens == len(chat.encode(None, sample.input))
        assert 1 <= sample.output.usage.output_tokens <= 9
        assert sample.output.stop_reason in ("stop", "max_tokens")


def test_system_messages_reach_the_model(tmp_path: Path) -> None:
    log = run(task(system_message("Be brief.")), tmp_path, tiny(), max_tokens=8)
    assert [s.output.completion for s in log.samples] == [expected(q, 8, "Be brief.") for q in QUESTIONS]


def test_a_seed_makes_sampling_repeatable_and_settings_are_honoured(tmp_path: Path) -> None:
    settings = {"max_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    backend = Counting(tiny())
    texts = [
        [s.output.completion for s in run(task(), tmp_path / str(n), backend, **settings, **seed).samples]
        for n, seed in enumerate(({"seed": 3}, {"seed": 3, "max_connections": 1}, {"seed": 4}, {}))
    ]
    assert texts[0] == texts[1]
    assert len({tuple(each) for each in texts}) == 3
    assert {(s.max_new_tokens, s.temperature, s.top_p) for _, s in backend.batches} == {(6, 1.0, 0.9)}


def answer(messages: list[Any], config: GenerateConfig, tools: Sequence[ToolInfo] = (), **options: Any) -> Any:
    import anyio

    model = PersonaLensAPI("tiny", backend=options.pop("backend", tiny()), **options)
    try:
        return anyio.run(model.generate, messages, list(tools), "auto", config)
    finally:
        model.close()


def test_a_stop_sequence_cuts_the_answer() -> None:
    whole = expected("Why?", 12)
    stop = whole[4:6]
    output = answer([User(content="Why?")], GenerateConfig(max_tokens=12, stop_seqs=[stop, "never in there"]))
    assert output.completion == whole[: whole.index(stop)]
    assert output.stop_reason == "stop"


def test_a_full_context_is_said_to_be_one() -> None:
    room = 512 - len(ChatFormat.from_tokenizer(tiny().tokenizer).encode(None, "x" * 470))
    output = answer([User(content="x" * 470)], GenerateConfig(max_tokens=100))
    assert 0 < room < 100
    assert output.stop_reason == "stop" or (output.stop_reason, output.usage.output_tokens) == ("model_length", room)
    output = answer([User(content="x" * 600)], GenerateConfig())
    assert (output.completion, output.stop_reason) == ("", "model_length")


TOOL = ToolInfo(name="search", description="Searches.")
IMAGE = User(content=[ContentText(text="What is this?"), ContentImage(image="data:image/png;base64,AA==")])


@pytest.mark.parametrize(
    ("messages", "config", "tools", "words"),
    [
        ([User(content="Hi")], GenerateConfig(), [TOOL], "call no tools; the task has search"),
        ([IMAGE], GenerateConfig(), [], "read text only"),
        ([User(content="Hi")], GenerateConfig(top_k=4), [], "top_k=4"),
        ([User(content="Hi")], GenerateConfig(logprobs=True), [], "logprobs=True"),
        ([User(content="Hi")], GenerateConfig(num_choices=2), [], "num_choices=2"),
        ([User(content="Hi")], GenerateConfig(max_tokens=0), [], "max_tokens must be at least 1"),
        ([User(content="Hi")], GenerateConfig(top_p=0.5), [], "top_p do nothing at temperature 0"),
        ([User(content="Hi")], GenerateConfig(temperature=-1.0), [], "temperature must be 0"),
    ],
)
def test_what_a_backend_does_not_have_is_refused(
    messages: list[Any], config: GenerateConfig, tools: list[ToolInfo], words: str
) -> None:
    with pytest.raises(PersonaLensError, match=words):
        answer(messages, config, tools)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtyp": "float32", "backend": "transformers"}, "no model argument 'dtyp'; it takes backend, .*dtype, device"),
        ({"temperature": 1}, "no model argument 'temperature'"),
        ({"backend": "transformer"}, "did you mean transformers"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"base_url": "http://127.0.0.1"}, "takes no base URL"),
        ({"edits": "optimistic@1:+1.5"}, "no vectors for 'optimistic'"),
        ({"vectors": "runs/optimistic"}, "give edits too"),
        ({"vectors": 3, "edits": "optimistic@1:+1.5"}, "vectors are the paths of files or run folders"),
    ],
)
def test_model_arguments_are_checked(options: dict[str, Any], words: str) -> None:
    given = {"backend": tiny()} | options
    with pytest.raises(PersonaLensError, match=words):
        PersonaLensAPI("smollm2-135m", **given)


def test_edits_and_vectors_steer_it(tmp_path: Path) -> None:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(0))
    vectors = PersonaVectors("kind", tiny().info, {"response_mean": rows})
    text = "kind@1:+3 on response"
    vectors.save(tmp_path / "kind.safetensors")
    steering = Steering.parse(text, vectors)
    shared = steering.save(tmp_path / "steering.safetensors")
    prompt = [User(content="Why?")]
    answers = [
        asyncio.run(
            PersonaLensAPI("tiny", backend=backend, **arguments).generate(
                prompt, [], "none", GenerateConfig(max_tokens=8)
            )
        ).completion
        for backend, arguments in (
            (tiny(), {"vectors": str(tmp_path / "kind.safetensors"), "edits": text}),
            (tiny(), {"edits": str(shared)}),
            (steering.on(tiny()), {}),
            (tiny(), {}),
        )
    ]
    assert answers[0] == answers[1] == answers[2] != answers[3]


def test_several_system_messages_become_one() -> None:
    messages = [System(content="One."), System(content="Two."), User(content="Why?")]
    assert answer(messages, GenerateConfig(max_tokens=7)).completion == expected("Why?", 7, "One.\n\nTwo.")


@pytest.mark.real
def test_the_embedded_model_is_opened_by_its_name(tmp_path: Path) -> None:
    model = get_model("persona-lens/smollm2-135m", backend="transformers", dtype="float32", memoize=False)
    samples = [Sample(input="What is the capital of France? Answer with one word.", target="Paris")]
    begun = time.monotonic()
    (log,) = inspect_ai.eval(
        Task(dataset=samples, solver=generate(), scorer=includes()),
        model=model,
        log_dir=str(tmp_path),
        display="none",
        max_tokens=12,
    )
    assert log.status == "success"
    assert log.results.scores[0].metrics["accuracy"].value == 1
    assert 0 < log.samples[0].output.time < time.monotonic() - begun


def test_the_entry_point_names_the_provider() -> None:
    """Whether or not this checkout is what is installed."""
    import importlib
    import tomllib

    root = Path(__file__).resolve().parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = project["entry-points"]["inspect_ai"]["persona_lens"]
    assert callable(importlib.import_module(name).persona_lens)
    # Every run of inspect_ai imports it, whichever models it asks.
    code = f"import inspect_ai.model, sys\nbefore = set(sys.modules)\nimport {name}\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not {"torch", "numpy", "transformers"} & set(done.stdout.split())
