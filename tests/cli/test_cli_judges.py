"""Judges on the command line: an extraction and a sweep by a server, scores of a file, comparisons."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from persona_lens.cli import app
from persona_lens.cli.options import repeated
from tests.ledger import ledger
from tests.models.server.loopback import Loopback, completion, serving
from tests.shell import Shell
from tests.tiny import saved_model

TINY = ("--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8")
KEY = "sk-nobody-may-see-this"


def judging(body: dict[str, Any]) -> dict[str, Any]:
    """Half of all answers high, half low; all of them coherent."""
    prompt = body["messages"][0]["content"]
    if prompt.startswith("Reply with the number 57"):
        return completion("57", {"57": 1.0})
    number = "90" if "how coherent" in prompt else ("85", "15")[hashlib.sha256(prompt.encode()).digest()[0] % 2]
    return completion(number, {number: 1.0})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("PERSONA_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("A_KEY", KEY)
    with serving(respond=judging) as loopback:
        yield loopback


def options(server: Loopback) -> tuple[str, ...]:
    return ("--judge", "openai:judge", "--judge-url", server.url, "--judge-key", "A_KEY", "--prices", "0.4,1.6")


SHELL = Shell(columns=80)
run, refused = SHELL.done, SHELL.refused


def extraction(model: Path, out: Path, *more: str) -> tuple[str, ...]:
    return ("extract", str(model), "optimistic", "--out", str(out), "--questions", "4", "--unpaired", *TINY, *more)


def test_extraction_and_steering_by_a_server(model: Path, server: Loopback, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(*extraction(model, out, *options(server), "--json"))
    summary = json.loads(first.stdout)
    assert summary["judge"]["judge"] == "openai"
    assert set(summary["mean_score"]) == {"positive", "negative"}
    assert re.search(r"judge: 8\d answers and \d+ from the cache, [\d,]+ tokens, \$0\.00\d\d", first.stderr)
    assert server.headers["authorization"] == f"Bearer {KEY}"
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert all(KEY.encode() not in file.read_bytes() for file in kept)
    asked = sum(server.seen.values())
    again = run(*extraction(model, out, *options(server), "--json"))
    assert json.loads(again.stdout) == summary
    assert sum(server.seen.values()) == asked
    steering = (
        "steer",
        "sweep",
        str(model),
        str(out),
        "--layers",
        "1",
        "--questions",
        "3",
        "--random-directions",
        "0",
        *TINY,
    )
    assert "name another judge (--judge)" in refused(*steering)
    table = run(*steering, *options(server)).stdout
    assert "coherence" in table
    assert "90.00" in table


def test_a_local_judge(model: Path, tmp_path: Path) -> None:
    """The tiny model says no number: every response has its reason, and the error says so."""
    said = refused(*extraction(model, tmp_path / "short", "--judge", "local"))
    assert re.search(r"none of 40 responses got a score: the judge's prompt has [\d,]+ tokens, more than 509", said)
    long = shutil.copytree(model, tmp_path / "long")
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    said = refused(*extraction(long, tmp_path / "run", "--judge", "local"))
    assert "got a score: refusal: numbers have a probability" in said


def test_a_dry_run_says_what_judging_costs_at_most(model: Path, server: Loopback, tmp_path: Path) -> None:
    found = run(*extraction(model, tmp_path / "run", *options(server), "--dry-run", "--json"))
    rollouts, judged = json.loads(found.stdout)["work"]
    assert (rollouts["label"], rollouts["rows"], rollouts["cost"]) == ("rollouts", 40, None)
    assert (judged["label"], judged["rows"]) == ("judging", 80)
    assert 0.4 * judged["tokens"] / 1e6 < judged["cost"] < 1.6 * judged["tokens"] / 1e6
    table = run(*extraction(model, tmp_path / "run", *options(server), "--dry-run")).stdout
    assert "dollars at most" in table
    assert sum(server.seen.values()) == 0
    assert not (tmp_path / "run").exists()


def test_a_spending_limit_stops_and_the_same_command_goes_on(model: Path, server: Loopback, tmp_path: Path) -> None:
    out = tmp_path / "run"
    limited = (*options(server), "--judge-at-once", "2", "--max-spend")
    result = CliRunner().invoke(app, list(extraction(model, out, *limited, "0.001")))
    assert "the spending limit of $0.00 is reached" in str(result.exception)
    assert re.search(r"judge: \d+ answers", result.stderr)
    asked = sum(server.seen.values())
    assert 0 < asked < 80
    run(*extraction(model, out, *limited, "1"))
    assert len(server.seen) == sum(server.seen.values())  # nothing twice


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--judge", "gpt"), "--judge takes likelihood, local, local:MODEL or openai:MODEL; got 'gpt'"),
        (("--judge", "openai:"), "--judge takes"),
        (("--judge-url", "http://127.0.0.1:1/v1"), "--judge-url: only for --judge openai:MODEL"),
        (("--judge", "local", "--prices", "1,1", "--judge-rate", "9"), "--judge-rate, --prices: only for"),
        (("--judge", "openai:x", "--prices", "1"), "--prices takes 2 numbers, got '1'"),
        (("--judge", "openai:x", "--judge-rate", "1,2,3"), "--judge-rate takes 1 or 2 numbers"),
        (("--judge", "openai:x", "--max-spend", "1"), "a spending limit needs prices"),
        (("--judge", "openai:x", "--judge-method", "guess"), "--judge-method takes auto, logprobs, samples, number"),
        (("--judge", "openai:x", "--judge-url", "ftp://x"), "looks like http://127.0.0.1:8000/v1"),
        (("--judge", "openai:x", "--judge-at-once", "0"), "concurrency and attempts are at least 1"),
        (("--judge-prefill", "Score: "), "--judge-prefill: only for --judge local or local:MODEL"),
        (("--coherence", "101"), "coherence must be from 0 to 100"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    given: tuple[str, ...], said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert said in refused(*extraction(model, tmp_path / "run", *given))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Responses with scores."""
    rows = [
        {"question": f"Question {i % 4}?", "response": f"Response {i}.", "score": (13 * i) % 101} for i in range(24)
    ]
    file = tmp_path / "table.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_scores_of_a_file(table: Path, server: Loopback, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    arguments = ("judge", "score", str(table), "--trait", "optimistic", "--out", str(out), *options(server))
    planned = run(*arguments, "--dry-run").stdout
    assert "48" in planned
    assert sum(server.seen.values()) == 0
    found = run(*arguments)
    assert "24 of 24 responses have a score" in found.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["response"] for row in rows] == [f"Response {i}." for i in range(24)]
    assert {row["score"] for row in rows} == {85, 15}
    assert {(row["coherence"], row["method"]) for row in rows} == {(90, "logprobs")}
    assert list(tmp_path.glob("*.working")) == []
    assert "is there already" in refused(*arguments)
    compared = json.loads(run("judge", "compare", str(table), str(out), "--json").stdout)
    assert compared["counts"]["scored"] == 24


def test_a_comparison_with_a_judge_that_scores_now(table: Path, server: Loopback) -> None:
    judge = ("openai:judge", *options(server)[2:])
    arguments = ("judge", "compare", str(table), *judge)
    (planned,) = json.loads(run(*arguments, "--trait", "optimistic", "--dry-run", "--json").stdout)["work"]
    assert (planned["label"], planned["rows"], sum(server.seen.values())) == ("judging", 48, 0)
    found = json.loads(run(*arguments, "--trait", "optimistic", "--json").stdout)
    assert found["counts"]["scored"] == 24
    assert sum(server.seen.values()) == planned["calls"] + 1  # which asks the server for probabilities at all
    assert json.loads(run("judge", "compare", *[str(table)] * 2, "--dry-run", "--json").stdout) == {"work": []}
    assert "nothing is asked" in run("judge", "compare", *[str(table)] * 2, "--dry-run").stdout
    assert "name the trait (--trait)" in refused(*arguments)
    assert "--trait: only where SECOND is a judge" in refused("judge", "compare", *[str(table)] * 2, "--trait", "evil")
    assert "--prices: only for" in refused("judge", "compare", str(table), str(table), "--prices", "1,1")
    assert "got 'likelihood'" in refused(
        "judge", "score", str(table), "--trait", "evil", "--out", "x.jsonl", "--judge", "likelihood"
    )


def test_the_likelihood_judge_of_an_extraction_scores_other_responses(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors name their model; a local folder is found by that name from where it is, or where one says it is."""
    out = tmp_path / "run"
    run(*extraction(model, out))
    command = ("judge", "compare", str(table), f"likelihood:{out}", "--trait", "optimistic", "--json")
    assert "say where it is (--judge-model FOLDER)" in refused(*command)
    placed = (*command, "--judge-model", str(model), "--dtype", "float32")
    (planned,) = json.loads(run(*placed, "--dry-run").stdout)["work"]
    with ledger() as ran:
        compared = run(*placed)
    assert ran["weighed"] == planned["tokens"]
    assert json.loads(compared.stdout)["counts"]["scored"] == 24
    monkeypatch.chdir(model.parent)
    assert run(*command, "--dtype", "float32").stdout == compared.stdout
    assert "--judge-model: only for --judge likelihood:VECTORS" in refused(
        *("judge", "compare", str(table), "openai:x", "--trait", "evil", "--judge-model", "x")
    )
    said = refused("judge", "compare", str(table), f"likelihood:{out}", "--trait", "evil")
    assert "is for the trait optimistic" in said


def test_a_command_is_repeated_without_what_is_secret_in_it() -> None:
    """As it stands on a report's page, and in summary.json."""
    asked = typer.Typer()

    @asked.command()
    def tune(context: typer.Context, judge_url: Annotated[str, typer.Option("--judge-url")]) -> None:
        typer.echo(repeated(context))

    said = CliRunner().invoke(asked, ["--judge-url", "https://me:s3cret@host/v1?key=s3cret&a=b"]).output
    assert said == "tune --judge-url 'https://host/v1?key=…&a=b'\n"


def test_a_missing_key_is_found_out_before_anything_is_generated(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    said = refused(*extraction(model, tmp_path / "run", "--judge", "openai:gpt"))
    assert "needs a key: set OPENAI_API_KEY" in said
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()
