"""Judges judge a role against the default Assistant as they judge a trait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.cli.options import ModelOptions
from persona_lens.cli.options.judges import JudgeOptions
from persona_lens.judging import Exchange, LikelihoodJudge, LLMJudge, LocalJudge
from persona_lens.judging.registry import JUDGES
from persona_lens.models.chat import chat_format
from persona_lens.models.server import CompletionCache, CompletionServer, ServerSettings
from persona_lens.traits import PlayedRole, load_default, load_role
from tests.backends.fixtures import backend_of
from tests.judging.test_local_judge import by_hand, likely
from tests.judging.test_third_party_judge import THEIRS
from tests.models.server.loopback import completion, serving
from tests.tiny import tiny_model, tiny_tokenizer

PIRATE = PlayedRole(load_role("pirate"), load_default())
EXCHANGES = [Exchange("What now?", "Arr, matey!"), Exchange("Why so sad?", "I am an AI.")]


def test_the_likelihood_judge_weighs_the_role_against_neutral_prompts() -> None:
    model = tiny_model("llama", seed=3)
    backend = backend_of("transformers", model)
    judge = LikelihoodJudge(backend, chat_format(backend), PIRATE, pairs=2)
    assert judge.describe()["trait"] == PIRATE.content_hash()
    for exchange, evidence in zip(EXCHANGES, judge.evidence(EXCHANGES), strict=True):
        assert evidence is not None
        differences = [
            _mean_logprob(model, PIRATE.role.system_prompts[i], exchange)
            - _mean_logprob(model, PIRATE.default.system_prompts[i % 4], exchange)
            for i in (0, 4)
        ]
        assert evidence.log_odds == pytest.approx(sum(differences) / 2, abs=1e-5)


def _mean_logprob(model: Any, system: str, exchange: Exchange) -> float:
    """Of a response's tokens, in float64, with nothing of the package."""
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": system}, {"role": "user", "content": exchange.question}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    answer = tokenizer.encode(exchange.response)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode(text) + answer])).logits[0].double()
    predicting = logits.log_softmax(dim=-1)[-len(answer) - 1 : -1]
    return float(predicting[range(len(answer)), answer].mean())


def test_a_local_judge_reads_the_roles_rubric() -> None:
    model = likely("llama")
    model.config.max_position_embeddings = 8192  # a tiny tokenizer has a token for each character
    backend = backend_of("transformers", model)
    judged = LocalJudge(backend, chat_format(backend), PIRATE, coherence=False).judge(EXCHANGES[:1])
    wanted = by_hand(model, PIRATE.judge_rubric, EXCHANGES[0])
    assert judged[0].trait.value == pytest.approx(wanted, abs=1e-3)


def test_a_server_gives_the_expected_grade(tmp_path: Path) -> None:
    def respond(body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["messages"][0]["content"]
        if "57" in prompt:
            return completion("57", {"57": 0.99})
        return completion("3", {"3": 0.6, "2": 0.4}) if "<answer>\nArr" in prompt else completion("1", {"1": 1.0})

    with serving(respond=respond) as loopback:
        server = CompletionServer(ServerSettings("judge", loopback.url, attempts=2), CompletionCache(tmp_path))
        judged = LLMJudge(server, PIRATE, coherence=False).judge(EXCHANGES)
    assert [found.trait.value for found in judged] == [pytest.approx(2.6), 1]


def test_a_judge_of_another_package_takes_roles_too(plant: Any) -> None:
    plant(JUDGES.group, THEIRS, length="SPEC")
    opened = JudgeOptions().open("length:20", {"pirate": PIRATE}, ModelOptions())
    assert opened["pirate"].describe()["trait"] == PIRATE.content_hash()
