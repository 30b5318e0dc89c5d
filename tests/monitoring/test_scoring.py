"""Finished conversations: every value is that of its own token, and bad conversations stop nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from persona_lens import PersonaLensError
from persona_lens.backend import Backend, Read, ReadKind, TokenBatch
from persona_lens.cli import app
from persona_lens.core.progress import PersonaLensNote
from persona_lens.data.transcripts import BadTranscript, open_transcripts
from persona_lens.models import ChatFormat
from persona_lens.monitoring import Panel
from persona_lens.monitoring.scoring import LOOK_AHEAD, ScoredTranscript, score_transcripts
from persona_lens.vectors import PersonaVectors, VectorsError
from tests.backends.fixtures import ADAPTERS, assert_close, tiny_backend
from tests.tiny import D_MODEL, N_LAYERS, saved_model, with_template

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello <there> 🙂"},
    {"role": "assistant", "content": "Hi! שלום"},
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": "No."},
]


def vectors(trait: str, seed: int, backend: Backend | None = None) -> PersonaVectors:
    rows = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return PersonaVectors(trait, (backend or tiny_backend("transformers")).info, {"response_mean": rows})


def panel() -> Panel:
    return Panel.of([vectors("kind", 0), vectors("evil", 1)], [0, 2])


def written(folder: Path, *rows: object) -> Path:
    file = folder / "chats.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_values_are_projections_of_each_token_and_turns_are_their_means(adapter: str, tmp_path: Path) -> None:
    backend = tiny_backend(adapter)
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    file = written(tmp_path, {"messages": CHAT}, {"messages": CHAT[:3]})
    both = list(score_transcripts(backend, open_transcripts(file), panel(), chat))
    for scored, messages in zip(both, (CHAT, CHAT[:3]), strict=True):
        assert isinstance(scored, ScoredTranscript)
        ids = tuple(chat.encode_messages(messages, add_generation_prompt=False))
        assert scored.encoded.ids == ids
        every = backend.forward(TokenBatch.of([ids]), (), [Read(ReadKind.ACTIVATIONS)]).reads["activations"][0]
        for number, gauge in enumerate(scored.panel.gauges):
            unit = gauge.direction / gauge.direction.norm()
            assert_close(scored.values[:, number], every[gauge.layer] @ unit)
        answers = [each for each in scored.encoded.messages if each.role == "assistant"]
        assert len(scored.turns) == len(answers) * 4
        for turn in scored.turns:
            answer = answers[turn.turn]
            column = scored.values[:, scored.panel.find(turn.trait, turn.layer)]
            said = column[answer.start : answer.stop]
            text = str(backend.tokenizer.decode(list(ids[answer.start : answer.stop])))
            assert text.strip() == messages[2 if turn.turn == 0 else 4]["content"]
            assert (turn.tokens, turn.mean, turn.highest) == (len(said), float(said.mean()), float(said.max()))
            assert answer.prompt_stop is not None
            assert turn.prompt_last == float(column[answer.prompt_stop - 1])


def test_the_heat_map_has_each_value_on_its_token(tmp_path: Path) -> None:
    backend = tiny_backend("transformers")
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    (scored,) = score_transcripts(backend, open_transcripts(written(tmp_path, {"messages": CHAT})), panel(), chat)
    assert isinstance(scored, ScoredTranscript)
    heatmap = scored.heatmap(backend.tokenizer)
    assert [(strip.trait, strip.layer) for strip in heatmap.strips] == [
        ("kind", 0),
        ("kind", 2),
        ("evil", 0),
        ("evil", 2),
    ]
    for strip in heatmap.strips:
        column = scored.values[:, scored.panel.find(strip.trait, strip.layer)].tolist()
        assert math.isnan(strip.values[0])
        assert list(strip.values[1:]) == column[1:]
    assert "<there>" not in heatmap.html()


def test_bad_conversations_are_handed_on_in_their_place(tmp_path: Path) -> None:
    backend = tiny_backend("transformers")
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    long = [{"role": "user", "content": "a" * 3000}, {"role": "assistant", "content": "b"}]
    file = written(tmp_path, {"messages": CHAT}, "{broken", {"messages": long}, {"messages": CHAT[:3]})
    found = list(score_transcripts(backend, open_transcripts(file), panel(), chat))
    assert [isinstance(each, ScoredTranscript) for each in found] == [True, False, False, True]
    problems = [each.problem for each in found if isinstance(each, BadTranscript)]
    assert "chats.jsonl:2: not JSON" in problems[0]
    assert "chats.jsonl:3: " in problems[1]
    assert "tokens, and the model takes" in problems[1]


def test_answers_are_read_one_by_one_where_the_template_changes_earlier_turns(tmp_path: Path) -> None:
    backend = tiny_backend("transformers")
    said = "m['content'] if loop.last else m['content'] | upper"
    template = (
        f"{{% for m in messages %}}{{{{ '<|im_start|>' + m['role'] + '\\n' + ({said}) + '<|im_end|>\\n' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    chat = ChatFormat.from_tokenizer(with_template(backend.tokenizer, template))
    file = written(tmp_path, {"messages": CHAT}, {"messages": CHAT[:3]})
    with pytest.warns(PersonaLensNote, match="read after their own prompts"):
        found = list(score_transcripts(backend, open_transcripts(file), panel(), chat))
    scored = found[0]
    assert isinstance(scored, ScoredTranscript), scored
    assert len(scored.encoded.texts) == 2
    assert [turn.turn for turn in scored.turns if (turn.trait, turn.layer) == ("kind", 0)] == [0, 1]
    for number, place in enumerate((2, 4)):
        prompt = chat.encode_messages(CHAT[:place])
        ids = (*prompt, *chat.encode_answer(CHAT[place]["content"]))
        every = backend.forward(TokenBatch.of([ids]), (), [panel().read]).reads["projections"][0]
        values = panel().values(every)
        for gauge, turn in enumerate(turn for turn in scored.turns if turn.turn == number):
            assert turn.mean == pytest.approx(float(values[len(prompt) :, gauge].mean()), abs=1e-4)
            assert turn.prompt_last == pytest.approx(float(values[len(prompt) - 1, gauge]), abs=1e-4)
    scored.heatmap(backend.tokenizer).html()
    assert len(scored.to_json(tokens=True)["ids"]) == sum(map(len, scored.encoded.texts))


def test_more_conversations_than_are_looked_ahead_come_in_order(tmp_path: Path) -> None:
    backend = tiny_backend("transformers")
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    rows = [{"messages": [CHAT[1], {"role": "assistant", "content": "x" * (n % 7)}]} for n in range(LOOK_AHEAD + 9)]
    found = list(score_transcripts(backend, open_transcripts(written(tmp_path, *rows)), panel(), chat))
    lines = [each.transcript.line for each in found if isinstance(each, ScoredTranscript)]
    assert lines == list(range(1, LOOK_AHEAD + 10))


def test_vectors_of_another_model_are_refused() -> None:
    backend = tiny_backend("transformers", "gpt2")
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    with pytest.raises(VectorsError, match=r"another model .*allow it with --allow-other-model"):
        list(score_transcripts(backend, [], panel(), chat))
    assert list(score_transcripts(backend, [], panel(), chat, allow_other_model=True)) == []
    with pytest.raises(VectorsError, match=r"Extract them on this model \(persona-lens extract\)\.$"):
        vectors("kind", 0).check_model(backend, allowable=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model's folder, and vectors of it."""
    from persona_lens.backend import open_backend

    folder = tmp_path_factory.mktemp("made")
    saved_model(folder / "model")
    backend = open_backend("transformers", str(folder / "model"), dtype="float32", device="cpu")
    return str(folder / "model"), str(vectors("kind", 0, backend).save(folder / "kind.safetensors"))


def test_the_command_writes_readings_and_heat_maps(made: tuple[str, str], tmp_path: Path) -> None:
    model, kind = made
    file = written(tmp_path, {"id": "first", "messages": CHAT}, "{broken", {"messages": CHAT[:3]})
    out, html = tmp_path / "out.jsonl", tmp_path / "html"
    command = ["monitor", "transcript", model, str(file), kind, "--layers", "1", "--dtype", "float32"]
    done = CliRunner().invoke(app, [*command, "--out", str(out), "--tokens", "--html", str(html), "--show"])
    assert done.exit_code == 0, (done.output, done.exception)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["first", "line 3"]
    assert [len(row["turns"]) for row in rows] == [2, 1]
    assert len(rows[0]["ids"]) == len(rows[0]["values"])
    assert sorted(path.name for path in html.iterdir()) == ["conversation-000001.html", "conversation-000003.html"]
    assert "2 conversations read, 1 not" in done.stderr
    assert "chats.jsonl:2: not JSON" in done.stderr
    again = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert isinstance(again.exception, PersonaLensError)
    assert "is already there" in str(again.exception)
    said = CliRunner().invoke(app, [*command, "--limit", "1", "--json"])
    turns = json.loads(said.stdout)["turns"]
    assert len(turns) == len(rows[0]["turns"])
    for alone, together in zip(turns, rows[0]["turns"], strict=True):
        assert alone.pop("trait") == together.pop("trait")
        assert alone == pytest.approx(together, rel=1e-4)  # a GPU rounds otherwise in another batch
    for wrong, message in ((["--tokens"], "--tokens adds to what --out writes"), (["--form", "xml"], "xml")):
        refused = CliRunner().invoke(app, [*command, *wrong])
        assert isinstance(refused.exception, PersonaLensError), refused.output
        assert message in str(refused.exception)
