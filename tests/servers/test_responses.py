"""Responses of a real server, read by the model that it serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from persona_lens import open_backend
from persona_lens.backend import Read
from persona_lens.extraction import ExtractionSettings, plan_requests
from persona_lens.extraction.external import external_rollouts
from persona_lens.extraction.responses import generate_responses
from persona_lens.models.chat import chat_format
from persona_lens.models.server import CompletionCache, CompletionServer, ServerSettings
from persona_lens.runs.rollouts import ReadRollouts
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from tests.servers.server import LlmServer

pytestmark = pytest.mark.real

TRAIT = load_trait("optimistic")
SETTINGS = RolloutSettings(max_new_tokens=12, temperature=1.0)


def test_what_the_server_generates_the_model_reads(llm_server: LlmServer, tmp_path: Path) -> None:
    plan = plan_requests(TRAIT, ExtractionSettings(questions=2, rollouts=SETTINGS))
    requests = [request for request in plan if request.labels["pair"] == 0]
    assert len(requests) == 4
    server = CompletionServer(
        ServerSettings(llm_server.model, llm_server.base_url, attempts=2, timeout=300),
        CompletionCache(tmp_path / "cache"),
    )
    out = tmp_path / "responses.jsonl"
    made = generate_responses(server, requests, SETTINGS, out)
    assert (made.rows, made.refused, made.empty) == (4, 0, 0)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len({row["response"] for row in rows}) > 1
    backend = open_backend("transformers", "smollm2-135m", dtype="float32", device="cpu")
    chat = chat_format(backend)
    given = external_rollouts(backend, chat, TRAIT, out, questions=2, allow_missing=True)
    prompts = sum(len(chat.encode(request.system, request.question)) for request in requests)
    assert made.usage.prompt_tokens == prompts, "the server's prompts are those that are read"
    for row, rollout in zip(rows, given.rollouts, strict=True):
        assert rollout.response == row["response"].strip()
        assert rollout.ended is row["ended"] is not None
    reading = ReadRollouts(backend, given, SETTINGS, reads=Read.means())
    assert len(reading.run()) == 4
    means = [tensors["response_mean"] for _, tensors in reading.reductions()]
    assert sum(len(mean) for mean in means) == 4
    assert all(torch.isfinite(mean).all() for mean in means)
