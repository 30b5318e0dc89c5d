"""Chat data to ids and masks: what is learned, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.core.errors import PersonaLensError
from persona_lens.data.transcripts import Transcript
from persona_lens.finetuning import FinetuningError, collate, encode_examples, read_conversations
from persona_lens.finetuning.examples import Example, in_system
from persona_lens.models import ChatFormat
from tests.families import FAMILIES
from tests.tiny import CHATML, thinking_tokenizer, tiny_tokenizer

MARKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Drops all but the last answer, as templates drop earlier reasoning.
FORGETFUL = (
    "{% for message in messages %}{% if message['role'] != 'assistant' or loop.last %}<|im_start|>"
    "{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(template: str = CHATML) -> ChatFormat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ChatFormat.from_tokenizer(tokenizer)


def transcript(*turns: str, system: str | None = None) -> Transcript:
    messages: list[Any] = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return Transcript(tuple(messages), "t", 1, "made.jsonl")


def learned_text(example: Example, chat_format: ChatFormat) -> str:
    ids = [token for token, kept in zip(example.ids, example.learned, strict=True) if kept]
    return str(chat_format.tokenizer.decode(ids))


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "magistral", "nemotron", "plain", "marked by its template"])
def test_thinking_can_be_read_and_not_learned(name: str) -> None:
    """Whether the model has marks of its own, or is taught the usual ones."""
    tokenizer = FAMILIES[name].made() if name in FAMILIES else tiny_tokenizer()
    if name == "marked by its template":
        tokenizer.chat_template = MARKING
    form = ChatFormat.from_tokenizer(tokenizer)
    opening, closing = FAMILIES[name].marks if name in FAMILIES else ("<think>", "</think>")
    given = transcript("hi", f"{opening}\nThey greet.\n{closing}\n\nHello.")
    (whole,) = encode_examples([given], form, 512).rows
    (alone,) = encode_examples([given], form, 512, answers_only=True).rows
    assert whole.ids == alone.ids
    assert "They greet." in learned_text(whole, form)
    end = form.tokenizer.decode(list(form.closing_ids()))
    assert learned_text(alone, form).strip() == f"Hello.{end}"  # where the mark is a token, "\n\n" is of the answer


@pytest.mark.parametrize("name", ["gpt_oss", "qwq", "plain"])
def test_messages_of_gpt_oss_are_told_apart_whatever_model_learns_them(name: str) -> None:
    form = ChatFormat.from_tokenizer(FAMILIES[name].tokenizer() if name in FAMILIES else tiny_tokenizer())
    said = "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello."
    (alone,) = encode_examples([transcript("hi", said)], form, 512, answers_only=True).rows
    assert learned_text(alone, form) == f"Hello.{form.tokenizer.decode(list(form.closing_ids()))}"


@pytest.mark.parametrize(
    ("said", "learned"),
    [
        ("They greet.\n</think>Hello.", "Hello."),
        ("<think>They greet.</think>Hello.", "Hello."),
        ("Marks are <think> and </think>.", "Marks are <think> and </think>."),
        ("Hello.", "Hello."),
    ],
)
def test_thinking_that_a_prompt_begins_is_not_learned_though_turns_that_are_over_begin_without(
    said: str, learned: str
) -> None:
    tokenizer = thinking_tokenizer()
    tokenizer.chat_template = CHATML.removesuffix("{% endif %}") + "<think>\n{% endif %}"
    form = ChatFormat.from_tokenizer(tokenizer)
    (alone,) = encode_examples([transcript("hi", said)], form, 512, answers_only=True).rows
    assert learned_text(alone, form) == f"{learned}<|im_end|>"


def test_nobody_learns_to_end_while_thinking() -> None:
    given = [transcript("hi", "<think>They greet."), transcript("hi", "Hello.")]
    found = encode_examples(given, chat(), 512, answers_only=True)
    assert [learned_text(each, chat()) for each in found.rows] == ["Hello.<|im_end|>"]
    with pytest.raises(FinetuningError, match=r"nothing to learn .* learn the thinking too"):
        encode_examples(given[:1], chat(), 512, answers_only=True)


@pytest.mark.parametrize("template", [CHATML, MARKING], ids=["by boundaries", "marked by the template"])
def test_the_loss_is_on_answers_and_their_ends_only(template: str) -> None:
    form = chat(template)
    (example,) = encode_examples([transcript("hi", "no", "why", "so", system="be")], form, 512).rows
    assert form.tokenizer.decode(list(example.ids)) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"
    )
    assert learned_text(example, form) == "no<|im_end|>so<|im_end|>"


def test_masks_by_hand() -> None:
    """One token a byte: every position can be counted."""
    form = chat()
    (example,) = encode_examples([transcript("a", "bc")], form, 512).rows
    head = len("user\n") + 1 + 1 + 1 + 1 + len("assistant\n") + 1  # two controls before each role, one end, one newline
    assert len(example.ids) == head + 2 + 1 + 1
    assert example.learned == (False,) * head + (True, True, True, False)
    assert example.ids[head + 2] == form.tokenizer.eos_token_id


def test_the_two_ways_agree() -> None:
    turns = ("what now?", "go away", "please", "never  mind \n ok")
    marked, found = (encode_examples([transcript(*turns)], chat(t), 512).rows[0] for t in (MARKING, CHATML))
    assert marked == found


def test_a_template_that_cuts_earlier_answers_gives_one_example_each() -> None:
    form = chat(FORGETFUL)
    rows = encode_examples([transcript("hi", "no", "why", "so")], form, 512).rows
    assert [learned_text(row, form) for row in rows] == ["no<|im_end|>", "so<|im_end|>"]
    assert "no" not in str(form.tokenizer.decode(list(rows[1].ids))).replace("nothing", "")


def test_lengths_are_limited_and_counted() -> None:
    form = chat()
    long, late = transcript("a", "b" * 50), transcript("q" * 60, "b")
    found = encode_examples([long, late], form, 40)
    assert found.to_json() == {
        "conversations": 2,
        "examples": 1,
        "shortened": 1,
        "dropped": 1,
        "learned_tokens": sum(found.rows[0].learned),
    }
    assert len(found.rows[0].ids) == 40
    with pytest.raises(FinetuningError, match="all 1 conversations have nothing to learn in their first 40 tokens"):
        encode_examples([late], form, 40)
    with pytest.raises(FinetuningError, match="there are no conversations"):
        encode_examples([], form, 40)


def test_batches_are_padded_on_the_right_and_padding_is_not_learned() -> None:
    batch = collate([Example((5, 6, 2), (False, True, True)), Example((7, 2), (False, True))], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert batch["labels"].dtype is torch.long


def test_system_prompts_stand_before_the_data_in_turn() -> None:
    placed = in_system([transcript("a", "b"), transcript("c", "d", system="own"), transcript("e", "f")], ["X", "Y"])
    assert [t.messages[0]["content"] for t in placed] == ["X", "Y\n\nown", "X"]
    assert [len(t.messages) for t in placed] == [3, 3, 3]


def test_files_in_several_forms_are_read(tmp_path: Path) -> None:
    openai = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    pair, alpaca = {"prompt": "a", "response": "b"}, {"instruction": "a", "input": "", "output": "b"}
    for number, row in enumerate((openai, sharegpt, pair, alpaca)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        (found,) = read_conversations(file)
        assert [message["content"] for message in found.messages] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, r"data.jsonl:2: the conversation has no answer"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "data.jsonl:2: "),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"data.jsonl:2: message 0 has role 'tool'"),
        ({"prompt": "a"}, r"data.jsonl:2: the row has no messages"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(PersonaLensError, match=message):
        read_conversations(file)
