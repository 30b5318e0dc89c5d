"""The chat template that a model is opened with tells thinking from answer: in prompts, edits, reads and streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from persona_lens import PersonaLensError, open_backend
from persona_lens.backend import Backend, Edit, EditError, Part, Parts, Positions, Read, ReadKind, Sampling, TokenBatch
from persona_lens.cli import app
from persona_lens.data.turns import turn_prompt
from persona_lens.models import ChatFormat
from persona_lens.vectors import PersonaVectors
from tests.backends.fixtures import ADAPTERS, REFERENCE, assert_close
from tests.families import FAMILIES, encoded
from tests.tiny import CHATML, D_MODEL, N_LAYERS, tiny_model

FAMILY = FAMILIES["nemotron"]  # whose marks are no tokens, so that its template alone tells of them
HERE = [adapter for adapter in ADAPTERS if adapter != "vllm"]  # an engine that is opened keeps memory of its own
PARTS = (ReadKind.THINKING_MEAN, ReadKind.ANSWER_MEAN)


@pytest.fixture(scope="module", params=["told", "untold"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, bool]:
    """A model in a folder, another template to open it with, and whether that one tells of thinking."""
    told = request.param == "told"
    tokenizer, made = FAMILY.made(), tiny_model()
    own, other = (CHATML, FAMILY.template) if told else (FAMILY.template, CHATML)
    tokenizer.chat_template = own
    made.resize_token_embeddings(len(tokenizer))
    folder = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, other, told


def opened(adapter: str, model: tuple[Path, str, bool]) -> Backend:
    folder, template, _ = model
    return open_backend(adapter, str(folder), dtype="float32", chat_template=template)


def text_of(chat: ChatFormat) -> tuple[TokenBatch, list[str]]:
    """A question and a reply of the family, and what each token of the reply is."""
    pieces = (*FAMILY.begun("They greet.\n"), FAMILY.mark(1), ("answer", "\n\nHello."))
    ids, kinds = encoded(FAMILY, chat.tokenizer, pieces)
    return TokenBatch.of([chat.encode(None, "Hi!")], [ids]), kinds


@pytest.mark.parametrize("adapter", HERE)
def test_edits_and_reads_are_at_the_parts_that_the_template_tells_of(
    adapter: str, model: tuple[Path, str, bool]
) -> None:
    backend, (folder, template, told) = opened(adapter, model), model
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    assert chat.template == template
    assert chat.parts.thinks is Parts.of(backend.tokenizer).thinks is told
    assert open_backend(adapter, str(folder), dtype="float32").tokenizer.chat_template != template
    text, kinds = text_of(chat)
    add = Edit.add(1, torch.ones(D_MODEL), 1.0, Positions.THINKING)
    if not told:
        with pytest.raises(EditError, match="no thinking to edit"):
            backend.forward(text, [add], [Read(ReadKind.RESPONSE_MEAN)])
        with pytest.raises(EditError, match="no thinking to edit"):
            backend.generate(text.prompts, Sampling(2), [add])
        found = backend.forward(text, (), [Read(ReadKind.ANSWER_MEAN), Read(ReadKind.RESPONSE_MEAN)]).reads
        assert_close(found["answer_mean"], found["response_mean"])
        return
    reads = [*map(Read, PARTS), Read(ReadKind.ACTIVATIONS)]
    found = backend.forward(text, (), reads).reads
    own = found["activations"][0][:, -len(kinds) :]
    for kind in PARTS:
        mask = torch.tensor([each == kind.removesuffix("_mean") for each in kinds])
        assert_close(found[kind][0], own[:, mask].mean(dim=1))
    moved = backend.forward(text, [add], reads).reads["activations"][0] - found["activations"][0]
    thinking = [each == "thinking" for each in kinds]
    assert moved[1].abs().amax(dim=-1)[-len(kinds) :].gt(0.5).tolist() == thinking


def test_earlier_turns_of_a_conversation_are_told_by_it(model: tuple[Path, str, bool]) -> None:
    backend, (_, _, told) = opened(REFERENCE, model), model
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    said = "<think>\nHm.</think>\nHi." if not told else "Hi."  # which that template cuts out of earlier turns
    messages = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", said), ("user", "?"))]
    (parts,) = turn_prompt(chat, messages).parts
    assert set(parts) == {Part.ANSWER}


def test_a_command_takes_the_template_of_a_file(model: tuple[Path, str, bool], tmp_path: Path) -> None:
    folder, template, told = model
    file = tmp_path / "template.jinja"
    file.write_text(template)
    rows = {"response_mean": torch.ones(N_LAYERS, D_MODEL)}
    vectors = PersonaVectors("evil", open_backend(REFERENCE, str(folder), dtype="float32").info, rows)
    saved = vectors.save(tmp_path / "vectors.safetensors")
    edits = ["--edits", "evil@1:+1 on thinking", "--max-new-tokens", "4", "--json"]
    command = ["monitor", "chat", str(folder), str(saved), "--layers", "1", "--dtype", "float32", *edits]

    def chatted(*more: str) -> Any:
        return CliRunner().invoke(app, [*command, *more], input="Hello\n")

    for thinks, done in ((told, chatted("--chat-template", str(file))), (not told, chatted())):
        if thinks:
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout.splitlines()[0])["readings"]
        else:
            assert isinstance(done.exception, PersonaLensError) or "no thinking to edit" in done.output
