"""``--thinking-budget`` on the command line: what is generated, what a run keeps of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from persona_lens.backend import Part, Parts
from persona_lens.cli import app
from persona_lens.extraction import ExtractionSettings
from persona_lens.extraction.responses import planned_usage
from persona_lens.models import ChatFormat
from persona_lens.monitoring.drift.simulated_user import LocalUser
from persona_lens.runs.rollouts import Request
from persona_lens.runs.settings import RolloutSettings, settings_json
from persona_lens.screening import BaseResponses, ScreeningError, ScreeningSettings
from persona_lens.traits.generate.authors import LocalAuthor, open_author
from tests.backends.fixtures import backend_of
from tests.families import FAMILIES
from tests.serve.running import vectors_of
from tests.thinking import thinking_model
from tests.tiny import saved_model

NEW, BUDGET = 24, 2
SMALL = ("--dtype", "float32", "--questions", "0", "--neutral", "6", "--max-new-tokens", str(NEW))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that thinks, and vectors of it."""
    folder = tmp_path_factory.mktemp("thinking")
    tokenizer, model = FAMILIES["qwq"].tokenizer(), thinking_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    vectors_of(backend_of("transformers", model, tokenizer), "evil", 1).save(folder / "vectors.safetensors")
    return folder / "model", folder / "vectors.safetensors"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(result: Result) -> str:
    """What a command said; errors are put in words by whoever calls the application."""
    return " ".join(f"{result.output} {result.stderr} {result.exception}".split())


def measure(thinking: tuple[Path, Path], out: Path, *more: object) -> Result:
    model, vectors = thinking
    return call("monitor", "baseline", model, vectors, *SMALL, "--out", out, *more)


def test_a_run_is_made_within_its_budget_and_goes_on_with_no_other(thinking: tuple[Path, Path], tmp_path: Path) -> None:
    free, limited = tmp_path / "free", tmp_path / "limited"
    budget = ("--thinking-budget", BUDGET)
    for folder, more in ((free, ()), (limited, budget)):
        done = measure(thinking, folder, *more)
        assert done.exit_code == 0, told(done)
    tokenizer = FAMILIES["qwq"].tokenizer()
    chat, parts = ChatFormat.from_tokenizer(tokenizer), Parts.of(tokenizer)
    spent: dict[Path, list[int]] = {}
    for folder in (free, limited):
        rows = [json.loads(line) for line in (folder / "baseline-rollouts.jsonl").read_text().splitlines()]
        prompts = [chat.encode(row["system"], row["question"]) for row in rows]
        kinds = [parts.of_response(p, row["response_ids"]) for p, row in zip(prompts, rows, strict=True)]
        spent[folder] = [each.count(Part.THINKING) for each in kinds]
    assert max(spent[limited]) == BUDGET < max(spent[free])
    assert json.loads((limited / "run.json").read_text())["settings"]["rollouts"]["thinking_budget"] == BUDGET
    assert not any("thinking_budget" in file.read_text() for file in free.glob("*.json"))
    for folder, more, change in (
        (limited, ("--thinking-budget", 3), "thinking_budget: 2 -> 3"),
        (limited, (), "thinking_budget: 2 -> (absent)"),
        (free, budget, "thinking_budget: (absent) -> 2"),
    ):
        refused = measure(thinking, folder, *more)
        assert refused.exit_code == 1
        assert change in told(refused)


def test_an_answer_comes_after_so_much_thinking(thinking: tuple[Path, Path]) -> None:
    model, vectors = thinking
    command = ("generate", model, vectors, "Hello there", "--layer", 1, "--coefficients", "0", "--dtype", "float32")
    found = {}
    for budget in (None, 0):
        more = () if budget is None else ("--thinking-budget", budget)
        done = call(*command, "--max-new-tokens", 3, "--json", "--allow-other-model", *more)
        assert done.exit_code == 0, told(done)
        found[budget] = json.loads(done.stdout)["responses"][0]["response"]
    assert not found[None], "the thinking takes all tokens"
    assert found[0]


def test_a_model_that_never_thinks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    for more in (("--dry-run",), ()):
        done = call(
            "extract", model, "optimistic", "--thinking-budget", 5, "--out", tmp_path / "run", "--questions", 2, *more
        )
        assert done.exit_code == 1
        assert "there is no thinking to limit" in told(done)
        assert "--thinking-budget" in told(done)
    fewer = call("extract", model, "optimistic", "--thinking-budget", -1, "--dry-run")
    assert fewer.exit_code == 1
    assert "0 tokens (no thinking) or more, got -1" in told(fewer)
    given = tmp_path / "given.jsonl"
    given.write_text("")
    useless = call("extract", model, "optimistic", "--thinking-budget", 1, "--responses", given)
    assert useless.exit_code == 1
    assert "--thinking-budget: with --responses nothing is generated" in told(useless)


def test_servers_of_others_are_not_asked_for_what_they_may_pass_over(tmp_path: Path) -> None:
    asked = ("responses", "optimistic", "--server-model", "m", "--server-url", "http://127.0.0.1:9/v1", "--dry-run")
    done = call(*asked, "--out", tmp_path / "r.jsonl", "--thinking-budget", 5)
    assert done.exit_code == 1
    assert "no common way to limit thinking" in told(done)
    with pytest.raises(Exception, match="no common way"):
        planned_usage([Request(None, "Why?", 0)], RolloutSettings(thinking_budget=0))
    author = call("traits", "new", "sunny", "--author-model", "openai:m", "--thinking-budget", 5)
    assert author.exit_code == 1
    assert "--thinking-budget: only for a model that runs here" in told(author)
    with pytest.raises(Exception, match="cannot be limited"):
        open_author("openai:m", thinking_budget=3)


def test_authors_users_and_base_responses_are_limited_too() -> None:
    backend = backend_of("transformers", thinking_model(), FAMILIES["qwq"].tokenizer())
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    author: Any = LocalAuthor(backend, chat, 0, max_new_tokens=NEW, temperature=0.0)
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    assert author.write("", "Name one.", schema)
    assert author.describe()["thinking_budget"] == 0
    user = LocalUser(backend, chat, RolloutSettings(max_new_tokens=4, temperature=0.0, thinking_budget=0))
    assert user.write([[{"role": "user", "content": "Hello there"}]], [0])[0]
    assert user.describe()["thinking_budget"] == 0
    screening = ScreeningSettings(base=BaseResponses.GENERATE, thinking_budget=0)
    assert screening.to_json()["thinking_budget"] == 0
    assert "thinking_budget" not in ScreeningSettings().to_json()
    refused: list[dict[str, Any]] = [{"thinking_budget": 3}, {"base": BaseResponses.GENERATE, "thinking_budget": -1}]
    for wrong in refused:
        with pytest.raises(ScreeningError, match="thinking budget"):
            ScreeningSettings(**wrong)


def test_settings_without_a_budget_are_what_they_were() -> None:
    plain, limited = (ExtractionSettings(rollouts=RolloutSettings(thinking_budget=each)) for each in (None, 0))
    assert set(settings_json(plain)["rollouts"]) == {
        *("max_new_tokens", "temperature", "top_p", "batch_size", "batch_tokens")
    }
    assert settings_json(limited)["rollouts"]["thinking_budget"] == 0
