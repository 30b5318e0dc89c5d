"""Replies that begin with thinking: their readings, their heat maps, and what a chat shows of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from persona_lens import open_backend
from persona_lens.backend import Backend
from persona_lens.cli import app
from persona_lens.data.pieces import token_pieces
from persona_lens.data.transcripts import Transcript
from persona_lens.models import ChatFormat
from persona_lens.monitoring import ConversationMonitor, MonitoringError, Panel, TokenHeatmap
from persona_lens.monitoring.scoring import ScoredTranscript, score_transcripts
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import backend_of, tiny_backend
from tests.families import FAMILIES
from tests.thinking import ASKED, NEW, thinking_model
from tests.tiny import CHATML, D_MODEL, N_LAYERS, thinking_tokenizer, tiny_model, with_template


@pytest.fixture(scope="module")
def model() -> Any:
    return thinking_model()


@pytest.fixture(scope="module")
def backend(model: Any) -> Backend:
    return backend_of("transformers", model, FAMILIES["qwq"].tokenizer())


def vectors(backend: Backend) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(0))
    return PersonaVectors("evil", backend.info, {"response_mean": rows})


def test_a_reply_has_a_mean_for_its_thinking_and_one_for_its_answer(backend: Backend) -> None:
    monitor = ConversationMonitor(backend, Panel.of(vectors(backend), 1))
    turn = monitor.reply(ASKED, max_new_tokens=NEW)
    assert turn.token_values is not None
    assert len(turn.parts) == len(turn.token_values) == turn.readings[0].tokens
    behind = turn.parts.index("answer")
    assert turn.parts == ("thinking",) * behind + ("answer",) * (len(turn.parts) - behind)
    values, reading = turn.token_values[:, 0], turn.readings[0]
    assert reading.thinking_mean == pytest.approx(float(values[:behind].mean()), rel=1e-5)
    assert reading.answer_mean == pytest.approx(float(values[behind:].mean()), rel=1e-5)
    assert reading.to_json()["answer_mean"] == reading.answer_mean


@pytest.mark.parametrize("name", ["qwq", "plain"])
def test_transcripts_are_split_where_a_text_has_marks(backend: Backend, name: str) -> None:
    """Of a model that marks its thinking, and of one to which the marks are text as any other."""
    own = backend if name == "qwq" else tiny_backend("transformers")
    panel = Panel.of(vectors(own), 1)
    thought = "Hm, why?\n</think>\n\n" if name == "qwq" else "<think>Hm, why?</think>\n\n"
    messages = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": f"{thought}Hi."}]
    plain = [*messages[:1], {"role": "assistant", "content": "Hi."}]
    given = [Transcript(tuple(each), "t", 1) for each in (messages, plain)]
    first, second = score_transcripts(own, given, panel, ChatFormat.from_tokenizer(own.tokenizer))
    assert isinstance(first, ScoredTranscript)
    assert isinstance(second, ScoredTranscript)
    (reading,), (other,) = first.turns, second.turns
    answer = [at for at, part in enumerate(first.parts) if part == "answer"]
    assert own.tokenizer.decode([first.encoded.ids[at] for at in answer]) == "\n\nHi."
    assert reading.answer_mean == pytest.approx(float(first.values[answer, 0].mean()), rel=1e-5)
    assert reading.thinking_mean is not None
    assert second.parts == ()
    assert other.to_json().keys() == {"turn", "trait", "layer", "tokens", "mean", "highest", "prompt_last"}
    page = first.heatmap(own.tokenizer).html()
    assert page.count('<div class="part thinking"><div class="part-name">thinking</div>') == 1
    assert page.count('<div class="part answer"><div class="part-name">answer</div>') == 1
    assert 'class="part-name"' not in second.heatmap(own.tokenizer).html()


@pytest.mark.parametrize("opening", ["", "<think>\n"], ids=["closed alone", "opened again"])
def test_transcripts_are_split_where_a_turn_that_is_over_begins_otherwise_than_a_prompt_ends(opening: str) -> None:
    """As of models whose prompts end in the thinking, and whose template writes earlier turns without it."""
    tokenizer = thinking_tokenizer()
    open_ended = CHATML.removesuffix("{% endif %}") + "<think>\n{% endif %}"
    own = backend_of("transformers", tiny_model(thinks=True), with_template(tokenizer, open_ended))
    said = {"role": "assistant", "content": f"{opening}Hm, why?\n</think>Hi."}
    asked = {"role": "user", "content": ASKED}
    messages = (asked, said, asked, {**said, "content": "Hi."})
    (found,) = score_transcripts(
        own, [Transcript(messages, "t", 1)], Panel.of(vectors(own), 1), ChatFormat.from_tokenizer(own.tokenizer)
    )
    assert isinstance(found, ScoredTranscript)
    answer = [at for at, part in enumerate(found.parts) if part == "answer"]
    assert own.tokenizer.decode([found.encoded.ids[at] for at in answer]) == "Hi."
    first, second = found.turns
    assert first.answer_mean == pytest.approx(float(found.values[answer, 0].mean()), rel=1e-5)
    assert second.thinking_mean is None


def test_a_heat_map_names_its_stretches() -> None:
    tokenizer = FAMILIES["qwq"].tokenizer()
    ids = tokenizer.encode("ab</think>cd", add_special_tokens=False)
    parts = ("thinking", "thinking", "thinking", "answer", "answer")
    shown = TokenHeatmap.of(token_pieces(tokenizer, ids), [0.0, 1, 2, 3, 4])
    apart = TokenHeatmap(shown.pieces, shown.strips, parts=parts)

    def printed(heatmap: TokenHeatmap) -> list[str]:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(heatmap)
        return [line.strip() for line in console.file.getvalue().splitlines()[1:]]  # type: ignore[attr-defined]

    assert printed(shown) == ["a[0.00]b[+1.00]</think>[+2.00]c[+3.00]d[+4.00]"]
    assert printed(apart) == ["── thinking ──", "a[0.00]b[+1.00]</think>[+2.00]", "── answer ──", "c[+3.00]d[+4.00]"]
    with pytest.raises(MonitoringError, match="4 parts for 5 tokens"):
        TokenHeatmap(shown.pieces, shown.strips, parts=parts[1:])


def test_a_chat_shows_what_is_thinking_and_what_is_answer(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    FAMILIES["qwq"].tokenizer().save_pretrained(tmp_path / "model")
    info = open_backend("transformers", str(tmp_path / "model"), dtype="float32").info
    rows = {"response_mean": torch.ones(N_LAYERS, D_MODEL)}
    file = PersonaVectors("evil", info, rows).save(tmp_path / "vectors.safetensors")
    command = ["monitor", "chat", str(tmp_path / "model"), str(file), "--layers", "1", "--dtype", "float32"]
    more = ["--max-new-tokens", str(NEW)]
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, *more, "--show"], input=f"{ASKED}\n")
    assert shown.exit_code == 0, shown.output
    assert "── thinking ──" in shown.output
    assert "── answer ──" in shown.output
    read = CliRunner().invoke(app, [*command, *more, "--json"], input=f"{ASKED}\n")
    reading = json.loads(read.stdout.splitlines()[0])["readings"][0]
    assert reading["thinking_mean"] != reading["answer_mean"]
