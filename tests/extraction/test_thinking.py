"""Extraction from models that think before they answer: vectors of answers, of thinking, and of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from persona_lens import load_vectors
from persona_lens.backend import Read, ReadKind, TokenError
from persona_lens.cli import app
from persona_lens.extraction import ExtractionError, ExtractionSettings, extract, plan_requests
from persona_lens.extraction.run import means_read
from persona_lens.models import ChatFormat
from persona_lens.monitoring import Panel
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import Steering
from persona_lens.traits import Arm, load_trait
from persona_lens.vectors.diagnosis import diagnose
from persona_lens.vectors.samples import read_samples
from tests.families import FAMILIES
from tests.planted import PlantedBackend
from tests.tiny import tiny_model, tiny_tokenizer

TRAIT = load_trait("optimistic")
SETTINGS = ExtractionSettings(questions=4, rollouts=RolloutSettings(max_new_tokens=64))
BOTH = ("answer_mean", "thinking_mean")


def thinking(respond: Callable[[float], str], **options: Any) -> tuple[PlantedBackend, ChatFormat]:
    """A planted model of a family that thinks where it is asked to."""
    backend = PlantedBackend(TRAIT, respond=respond, **options)
    backend.tokenizer, backend.end_ids = FAMILIES["qwen3"].made(), (1,)
    return backend, ChatFormat.from_tokenizer(backend.tokenizer, thinking=True)


def aloud(leaning: float) -> str:
    return f"<think>\nHm.\n</think>\n\nleaning {leaning:+.3f}"


def test_vectors_are_of_the_answers_unless_another_reduction_is_named(tmp_path: Path) -> None:
    backend, chat = thinking(aloud)
    found = extract(backend, TRAIT, tmp_path, settings=SETTINGS, chat=chat)
    vectors = load_vectors(tmp_path)
    for name, planted in (backend.planted | backend.of_parts).items():
        torch.testing.assert_close(vectors.directions[name], planted, rtol=0, atol=1e-6)
    assert vectors.default_reduction == "answer_mean"
    answers = vectors.directions["answer_mean"][1]
    assert torch.equal(vectors[1], answers)
    assert torch.equal(vectors.edit(1).direction, answers)
    assert torch.equal(Panel.of(vectors, 1).gauges[0].direction, answers)
    assert Panel.of(vectors, 1).gauges[0].reduction == "answer_mean"
    named = {"": "answer_mean", **{f".{name}": name for name in ("thinking_mean", "response_mean")}}
    for written, name in named.items():
        steering = Steering.parse(f"optimistic{written}@1:+1.5", vectors)
        assert torch.equal(steering.edits()[0].direction, vectors.directions[name][1])
        assert str(steering) == f"optimistic{written}@1:+1.5"
    assert str(Steering.parse("optimistic.answer_mean@1:+1.5", vectors)) == "optimistic@1:+1.5"
    told = {"default_reduction": "answer_mean", "kept_responses_with_thinking": 40, "responses_without_answer": 0}
    assert vectors.provenance["thinking"] == found.summary["thinking"] == told
    assert all(rollout.response.startswith("leaning") for rollout in found.rollouts)
    assert diagnose(tmp_path).reduction == "answer_mean"


def test_responses_that_never_come_to_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    numbers = count()
    backend, chat = thinking(lambda x: aloud(x) if next(numbers) % 5 else "<think>\nHm. Hm.")
    found = extract(backend, TRAIT, tmp_path, settings=SETTINGS, chat=chat)
    unanswered = [not rollout.response for rollout in found.rollouts]
    assert sum(unanswered) == 8
    counts = found.summary["counts"].values()
    assert sum(each["no_answer"] for each in counts) == found.summary["thinking"]["responses_without_answer"] == 8
    assert not any(row["kept"] for row, empty in zip(found.scores, unanswered, strict=True) if empty)
    torch.testing.assert_close(found.vectors.rows("answer_mean"), backend.of_parts["answer_mean"], rtol=0, atol=1e-6)


def test_a_model_that_comes_to_no_answer_at_all_needs_more_tokens(tmp_path: Path) -> None:
    backend, chat = thinking(lambda _: "<think>\nHm. Hm.")
    with pytest.raises(ExtractionError, match=r"^40 of 40 responses came to no answer.*--max-new-tokens"):
        extract(backend, TRAIT, tmp_path, settings=SETTINGS, chat=chat)


def test_a_backend_that_does_not_limit_thinking_is_found_out(tmp_path: Path) -> None:
    backend, chat = thinking(aloud)
    settings = replace(SETTINGS, rollouts=replace(SETTINGS.rollouts, thinking_budget=2))
    with pytest.raises(TokenError, match="row 0 thinks beyond its budget: this backend does not limit thinking"):
        extract(backend, TRAIT, tmp_path, settings=settings, chat=chat)


def test_thinking_is_averaged_over_the_responses_that_have_any(tmp_path: Path) -> None:
    numbers = count()
    backend, chat = thinking(lambda x: aloud(x) if next(numbers) % 3 else f"leaning {x:+.3f}", noise=0.5)
    extract(backend, TRAIT, tmp_path, settings=SETTINGS, chat=chat)
    run = read_samples(tmp_path)
    assert len(run.layer(1, "answer_mean")) == len(run.responses) > len(run.layer(1, "thinking_mean"))
    assert diagnose(tmp_path, reduction="thinking_mean").reduction == "thinking_mean"
    assert run.vectors.provenance["thinking"]["kept_responses_with_thinking"] == len(run.layer(1, "thinking_mean"))


def test_a_model_that_may_think_and_never_does_has_the_usual_vectors(tmp_path: Path) -> None:
    backend, chat = thinking("leaning {:+.3f}".format)
    found = extract(backend, TRAIT, tmp_path, settings=SETTINGS, chat=chat)
    assert found.vectors.directions.keys() == backend.planted.keys()
    assert "thinking" not in {**found.summary, **found.vectors.provenance}
    assert found.vectors.default_reduction == "response_mean"


def test_nothing_more_is_read_where_the_model_does_not_think() -> None:
    usual = (ReadKind.RESPONSE_MEAN, ReadKind.PROMPT_MEAN, ReadKind.PROMPT_LAST)
    plain = ChatFormat.from_tokenizer(tiny_tokenizer())
    off = ChatFormat.from_tokenizer(FAMILIES["qwen3"].tokenizer())
    for chat in (plain, off):
        assert tuple(read.kind for read in means_read(chat, SETTINGS)) == usual
    first = ChatFormat.from_tokenizer(FAMILIES["deepseek_r1_first"].tokenizer())  # of which the template says nothing
    assert {read.kind for read in means_read(first, SETTINGS)} > {ReadKind.ANSWER_MEAN, ReadKind.THINKING_MEAN}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model of such a family in a folder, and responses with thinking, scored, for two questions."""
    folder = tmp_path_factory.mktemp("thinking")
    tokenizer, model = FAMILIES["qwq"].tokenizer(), tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = []
    for number, request in enumerate(plan_requests(TRAIT, ExtractionSettings(questions=2))):
        arm = request.labels["arm"]
        thought = f"Thought {number}.\n</think>\n\n" if number != 3 else "Thought 3, and no end"
        row = {"question": request.question, "system": request.system, "arm": arm, "pair": request.labels["pair"]}
        score = 90.0 if arm == Arm.POSITIVE else 10.0
        lines.append({**row, "response": f"{thought}{f'It is {arm}.' if number != 3 else ''}", "score": score})
    file = folder / "responses.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "model", file


def by_hand(backend: Any, chat: ChatFormat, rows: Sequence[Any], kept: Sequence[bool], answer: bool) -> torch.Tensor:
    """The difference of means of one part, of plain passes over every token."""
    means: dict[str, list[torch.Tensor]] = {}
    closing = chat.tokenizer.convert_tokens_to_ids("</think>")
    for rollout in (row for row, there in zip(rows, kept, strict=True) if there):
        request, ids = rollout.request, list(rollout.response_ids)
        prompt = chat.encode(request.system, request.question)
        end = ids.index(closing)
        from persona_lens.backend import TokenBatch

        read = backend.forward(TokenBatch.of([prompt], [tuple(ids)]), (), [Read(ReadKind.ACTIVATIONS)]).reads
        h = read["activations"][0][:, -len(ids) :].double()
        means.setdefault(request.labels["arm"], []).append((h[:, end + 1 :] if answer else h[:, :end]).mean(dim=1))
    one, other = (torch.stack(means[arm.value]).mean(dim=0) for arm in (Arm.POSITIVE, Arm.NEGATIVE))
    return (one - other).float()


def test_given_responses_are_split_by_their_ids_and_the_command_says_so(
    given: tuple[Path, Path], tmp_path: Path
) -> None:
    model, file = given
    out = tmp_path / "run"
    command = ["extract", str(model), "optimistic", "--responses", str(file), "--questions", "2", "--unpaired"]
    previewed = CliRunner().invoke(app, [*command, "--preview", "--json"])
    assert previewed.exit_code == 0, previewed.output
    means = [token["reads"][-2:] for token in json.loads(previewed.stdout)["previews"][0]["tokens"]]
    assert means[-1] == [True, False]  # of the answer
    assert [False, True] in means  # of the thinking
    for more, guessed in ((("--responses", str(file)), False), ((), True)):
        looked = CliRunner().invoke(app, [*command[:3], *more, "--questions", "2", "--preview"])
        assert looked.exit_code == 0, looked.output
        assert ("here what the response begins with goes on to its end" in looked.output) == guessed
    ran = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    assert "answers (answer_mean); 1 response came to no answer and is left out" in " ".join(ran.output.split())
    shown = CliRunner().invoke(app, ["vectors", "show", str(out)]).output
    assert "answer_mean, since the model thinks before it answers" in shown
    vectors = load_vectors(out)
    assert vectors.provenance["counts"]["negative"]["no_answer"] == 1
    from persona_lens import open_backend

    backend = open_backend("transformers", str(model))
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    again = extract(backend, TRAIT, settings=ExtractionSettings(questions=2, paired=False), responses=[file], chat=chat)
    kept = [row["kept"] for row in again.scores]
    for name in BOTH:
        wanted = by_hand(backend, chat, again.rollouts, kept, name == "answer_mean")
        for found in (vectors, again.vectors):
            torch.testing.assert_close(found.directions[name], wanted, rtol=1e-4, atol=1e-4)
