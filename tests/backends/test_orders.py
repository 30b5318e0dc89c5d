"""Orders to a server of vLLM as they are sent, and clients of servers that take none; no vLLM is needed for either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from persona_lens.backend import Condition, Edit, Positions, Read, ReadKind, Schedule, Span
from persona_lens.backend.protocol import RemoteError
from persona_lens_vllm.client import VllmServer
from persona_lens_vllm.tags import Here, check_tag, tag_of, written
from persona_lens_vllm.wire import OrderError, RowOrder, tensor_data, tensor_from
from tests.tiny import D_MODEL, N_LAYERS, saved_model

V = torch.linspace(-1, 2, D_MODEL)
EDITS = (
    Edit.add(0, V, torch.tensor([0.25])),
    Edit.ablate(1, V, Span(Positions.PROMPT, -3)),
    Edit.cap(1, V, 0.5, torch.tensor([[True, False, True]])),
    Edit.affine(2, V, -0.5, Positions.RESPONSE),
    Edit(2, V, schedule=Schedule(((0, 1.0), (5, 0.0))), condition=Condition(1, V, 0.1, above=False)),
    Edit.add(2, V, 0.5, relative=True),
    Edit(2, V, sinks=True),
)
READS = (*Read.means((1, 2)), Read.projections(torch.stack([V, V + 1]), (0,)), Read(ReadKind.RESPONSE_NORM, sinks=True))


def test_an_order_is_read_as_it_was_written() -> None:
    noise = {"seed": 2**63 - 1, "temperature": 0.7, "top_p": 1.0}
    told = ((("<think>", "</think>"),), ("<|sep|>",), ("\n\n",))
    order = RowOrder(EDITS, READS, noise, 2, True, (1.0, 2.0, 3.0), told)
    found = RowOrder.read(order.text(), N_LAYERS, D_MODEL)
    varying = Edit.add(0, V, 0.25)
    assert found.edits == (varying, *EDITS[1:])
    assert [read.plain(N_LAYERS)["layers"] for read in found.reads] == [
        read.plain(N_LAYERS)["layers"] for read in READS
    ]
    directions = found.reads[3].directions
    assert directions is not None
    assert torch.equal(directions, torch.stack([V, V + 1]))
    assert (found.noise, found.prompt, found.logprobs, found.sink_limits) == (noise, 2, True, (1.0, 2.0, 3.0))
    assert found.text() == order.text()
    assert found.parts == told
    assert RowOrder.read(RowOrder(parts=((), (), ())).text(), N_LAYERS, D_MODEL).parts == ((), (), ()), (
        "it never thinks"
    )
    for budget in (0, 5):
        assert RowOrder.read(RowOrder(thinking_budget=budget).text(), N_LAYERS, D_MODEL).thinking_budget == budget
    assert RowOrder.read("{}", N_LAYERS, D_MODEL) == RowOrder()


NUMBERS = tensor_data(V)["data"]


def edit(**more: object) -> dict[str, Any]:
    return {"edits": [{"layer": 0, "direction": NUMBERS, **more}]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[" * 10_000, "JSON"),
        (None, "JSON text"),
        ({"version": 2}, "version"),
        ({"file": "/etc/passwd"}, "file"),
        (edit(moves="import os"), "moves"),
        (edit(layer=99), "layers 0 to 2"),
        (edit(layer=-1), "layer"),
        (edit(layer=True), "integer"),
        (edit(direction="gASVKg=="), "float32"),
        (edit(direction="***"), "base64"),
        (edit(direction=tensor_data(V * torch.nan)["data"]), "NaN"),
        (edit(operation="cap"), "threshold"),
        (edit(operation="os.system"), "operation"),
        (edit(coefficient=1e999), "finite"),
        (edit(span=[5, 2]), "no token"),
        ({"edits": [edit()["edits"][0]] * 300}, "256"),
        ({"reads": [{"kind": "activations"}]}, "activations"),
        ({"reads": [{"kind": "everything"}]}, "everything"),
        ({"reads": [{"kind": "norms"}, {"kind": "norms"}]}, "twice"),
        ({"reads": [{"kind": "projections", "directions": {"shape": [2**40, D_MODEL], "data": ""}}]}, "float32"),
        ({"reads": [{"kind": "prompt_mean"}]}, "sink_limits"),
        ({"sink_limits": [1.0]}, "3 layers"),
        ({"noise": {"seed": 1, "temperature": 0}}, "temperature"),
    ],
)
def test_what_is_no_order_is_refused(given: object, said: str) -> None:
    text = json.dumps(given) if isinstance(given, dict) else given
    with pytest.raises(OrderError, match=said):
        RowOrder.read(text, N_LAYERS, D_MODEL)


def test_an_order_for_another_text_is_refused() -> None:
    with pytest.raises(OrderError, match="3 are sent"):
        RowOrder(prompt=4).check_tokens(3, N_LAYERS, D_MODEL)
    with pytest.raises(OrderError, match="mask"):
        RowOrder(EDITS).check_tokens(4, N_LAYERS, D_MODEL)
    many = RowOrder(reads=(Read.projections(torch.ones(1000, D_MODEL)),))
    with pytest.raises(OrderError, match="most"):
        many.check_tokens(10**6, N_LAYERS, D_MODEL)


def test_tensors_travel_as_they_are() -> None:
    value = torch.tensor([[1.5, torch.nan], [-0.0, 1e-40]])
    assert torch.equal(tensor_from(json.loads(json.dumps(tensor_data(value)))).nan_to_num(7), value.nan_to_num(7))


class Params:
    def __init__(self, **extra: object) -> None:
        self.extra_args = extra


def test_a_tag_is_what_our_programs_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Here, "engine", False)
    noise = {"seed": 1, "temperature": 0.5, "top_p": 1.0}
    params = Params(persona_lens=written("name", noise))
    check_tag(params)
    assert tag_of(params) == {"call": "name", "noise": noise}
    for wrong in ("x", "[]", 5, {"call": "persona-lens-0", "row": 9}, written("name", {**noise, "before": 10**9})):
        with pytest.raises(ValueError, match="not for clients"):
            check_tag(Params(persona_lens=wrong))
    with pytest.raises(ValueError, match="--middleware"):
        check_tag(Params(persona_lens_order="{}"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("model")
    return str(saved_model(place))


FACTS: dict[str, Any] = {
    "version": 1,
    "refusal": None,
    "context_length": 64,
    "vocabulary": 300,
    "architecture": "LlamaForCausalLM",
    "n_layers": N_LAYERS,
    "d_model": D_MODEL,
    "weights": None,
    "dtype": "float32",
    "backend": "vllm 0.32.0",
}


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """The address of a server, and what it says of its models."""
    says: dict[str, Any] = {"object": "list", "data": [{"id": "served"}]}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(says).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", says
    listening.shutdown()
    listening.server_close()


def test_a_server_that_takes_no_orders_is_told_apart(server: tuple[str, dict[str, Any]], model: str) -> None:
    address, says = server
    with pytest.raises(RemoteError, match="--middleware persona_lens_vllm"):
        VllmServer(address, model)
    refusal = "make it with worker_extension_cls"
    for facts, said in (
        ({**FACTS, "refusal": refusal}, refusal),
        ({**FACTS, "version": 2}, "version 2"),
        ({**FACTS, "n_layers": 4}, "name the model"),
        ({**FACTS, "n_layers": "many"}, "otherwise than expected"),
        ({"version": 1}, "otherwise than expected"),
    ):
        says["persona_lens"] = facts
        with pytest.raises(RemoteError, match=said):
            VllmServer(address, model)
    says["persona_lens"] = FACTS
    assert VllmServer(address, Path(model).as_posix()).info.remote


def test_a_server_that_is_not_there_is_said_to_be(model: str) -> None:
    with pytest.raises(RemoteError, match="cannot be reached"):
        VllmServer("http://127.0.0.1:9", model)
