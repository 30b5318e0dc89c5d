"""Thinking and answer of families of models, told apart by token ids, on their own templates and control tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from persona_lens.backend import parity_parts
from persona_lens.backend.parts import Part, Parts
from persona_lens.models import ChatFormat
from tests.families import CUT, FAMILIES, Family, Piece, encoded

HI: Piece = ("answer", "\n\nHello there.")


def responses(family: Family) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """What a model of the family may say, by name."""
    opening, closing = family.marks
    thought = family.begun("They greet me.\nI greet them.")
    yield "ordinary", (*thought, family.mark(1), HI)
    yield "never ends", thought
    yield "cut within the closing mark", (*thought, ("thinking", "</"))
    yield (
        "several blocks",
        ((*thought, family.mark(1), ("answer", "One.\n\n"), *family.block("More?\n"), ("answer", "\nTwo."))),
    )
    yield "no thought in the block", (*family.begun(""), family.mark(1), HI)
    if family.heads is not None:
        direct, aside = family.heads
        if direct:
            yield "no thinking", (("mark", direct), HI)
            yield "another message", (*thought, ("mark", aside), ("thinking", "I call it."), family.mark(1), HI)
        return
    yield "no block", (HI,) if not family.opened else (family.mark(1), HI)
    quoting: Piece = ("answer", f"Write {opening} and {closing} here, then {closing}.")
    yield "quotes the marks", (*thought, family.mark(1), quoting)
    within = family.begun(f"I write {opening} or\n{opening}.")
    yield "the thinking quotes the opening mark", (*within, family.mark(1), HI)
    if not family.written:
        spelled = [mark[:3] + CUT + mark[3:] for mark in family.marks]
        inner: Piece = ("thinking", f"\n{spelled[0]}a{spelled[1]} is spelled.")
        yield "spells the marks", (*thought, inner, family.mark(1), ("answer", f"\n{spelled[0]}Hm.{spelled[1]}\nSo."))


TOLD = {name: family for name, family in FAMILIES.items() if family.told}
CASES = [(name, case) for name, family in TOLD.items() for case, _ in responses(family)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_parts_of_a_response_are_exact(name: str, case: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    chat = ChatFormat.from_tokenizer(tokenizer, thinking=True)
    ids, kinds = encoded(family, tokenizer, dict(responses(family))[case])
    opening, closing = family.marks
    asked = ["What is the sea?", f"What does {opening} mean?", f"{opening}\nI wonder.", f"It is {closing}"]
    for question in asked[: 1 if family.heads is not None else None]:
        for system in (None, "Be kind."):
            found = Parts.of(tokenizer).of_response(chat.encode(system, question), ids)
            assert ["mark" if part.name == "NEITHER" else part.name.lower() for part in found] == kinds, question


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.state[0] == "off"])
def test_all_is_answer_where_the_template_switches_thinking_off(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    chat = ChatFormat.from_tokenizer(tokenizer)
    ids = tokenizer.encode("\n\nHello there.", add_special_tokens=False)
    found = Parts.of(tokenizer).of_response(chat.encode("Be kind.", "Why?", [("One?", "Two.")]), ids)
    assert {part.name for part in found} == {"ANSWER"}


@pytest.mark.parametrize("name", TOLD)
def test_thinking_in_earlier_turns_is_of_no_consequence(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    chat = ChatFormat.from_tokenizer(tokenizer, thinking=True)
    earlier = "".join(text for _, text in (family.mark(0), ("thinking", "Hm."), family.mark(1), HI))
    if family.heads is not None:
        earlier = "Hello."
    prompt = chat.encode(None, "And?", [("Hello!", earlier)])
    ids, kinds = encoded(family, tokenizer, (*family.begun("So."), family.mark(1), HI))
    found = Parts.of(tokenizer).of_response(prompt, ids)
    assert ["mark" if part.name == "NEITHER" else part.name.lower() for part in found] == kinds


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_template_does_about_thinking_is_found(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    found = [ChatFormat.from_tokenizer(tokenizer, thinking=asked) for asked in (False, True)]
    assert tuple(each.thinking for each in found) == family.state
    assert (found[1].opened_reasoning is not None) == family.opened
    assert all(each.may_reason == family.told for each in found if each.thinking != "off")


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_answer_is_what_its_ids_say(name: str, case: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    chat = ChatFormat.from_tokenizer(tokenizer, thinking=True)
    pieces = dict(responses(family))[case]
    ids, _ = encoded(family, tokenizer, pieces)
    closed = family.mark(1) in pieces or not (family.opened or family.mark(0) in pieces)
    last = [text for kind, text in pieces if kind == "answer"] if closed else []
    wanted = "".join(last).replace(CUT, "").strip()
    assert chat.answer(ids).strip() == wanted or case == "several blocks"


def of_text(name: str, text: str, prompt: str = "Why?") -> dict[str, str]:
    """The text of each part of a row of a data set, as one of a family reads it."""
    chat = ChatFormat.from_tokenizer(FAMILIES[name].tokenizer())
    ids = chat.encode_answer(text)
    parts = chat.parts_of_text(chat.encode(None, prompt), ids)
    return {
        part.name.lower(): str(
            chat.tokenizer.decode([token for token, own in zip(ids, parts, strict=True) if own is part])
        )
        for part in Part
    }


HEAD, FINAL = "<|start|>assistant", "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"


@pytest.mark.parametrize("name", ["qwen3", "kimi_k2", "seed", "gpt_oss"])  # of which each byte is a token
@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        (f"{ANALYSIS}They\nask.<|end|>{HEAD}{FINAL}The sea.<|return|>", "They\nask.", "The sea."),
        (f"{HEAD}{ANALYSIS}They ask.<|end|>\n{HEAD}{FINAL}The sea.", "They ask.", "The sea."),
        (f"{ANALYSIS}They ask.{HEAD}<|channel|>commentary to=f <|constrain|>json<|message|>I call.<|call|>{FINAL}Né.",
         "They ask.I call.", "Né."),
        (f"{FINAL}The sea.<|end|>", "", "The sea."),
        (f"{ANALYSIS}They ask", "They ask", ""),
        (f"{ANALYSIS}They ask.<|end|>{HEAD}<|chan", "They ask.", ""),
        (f"{ANALYSIS}They ask.<|end|>Hello.", "They ask.", "Hello."),
        (f"They write {ANALYSIS} in front.", "", f"They write {ANALYSIS} in front."),
        (f"<think>\nI see {FINAL}.</think>Yes.", f"\nI see {FINAL}.", "Yes."),
    ],
)  # fmt: skip
def test_messages_of_gpt_oss_are_known_in_a_text(name: str, text: str, thinking: str, answer: str) -> None:
    found = of_text(name, text)
    assert (found["thinking"], found["answer"]) == (thinking, answer)
    assert len("".join(found.values())) == len(text)


@pytest.mark.parametrize("name", TOLD)
def test_a_text_without_marks_is_an_answer_though_the_prompt_opens_the_thinking(name: str) -> None:
    assert of_text(name, "The sea.") == {"neither": "", "thinking": "", "answer": "The sea."}
    quoting = f"Write {FAMILIES[name].marks[0]} first."
    assert of_text(name, quoting)["answer"] == quoting
    if FAMILIES[name].marks[0][0] == "<":
        assert of_text(name, "<think>Hm. Hm.")["thinking"] == "Hm. Hm."


@pytest.mark.parametrize("name", ["nemotron", "magistral_2506", "kimi_vl_named"])
def test_of_a_finished_response_no_token_of_a_mark_is_answer(name: str) -> None:
    """While it is written, nobody can know that a mark has begun."""
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    chat = ChatFormat.from_tokenizer(tokenizer, thinking=True)
    prompt = chat.encode(None, "Why?")
    ids, _ = encoded(family, tokenizer, (*family.begun("So."), family.mark(1), HI))
    assert chat.parts.of_response(prompt, ids)[0] is Part.ANSWER
    told = chat.stretches(prompt, ids)
    answer = [token for token, part in zip(ids, told, strict=True) if part == "answer"]
    assert chat.decode(answer).strip() == "Hello there."


@pytest.mark.parametrize("name", FAMILIES)
def test_what_closes_thinking_ends_no_turn(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    ends = ChatFormat.from_tokenizer(tokenizer).end_of_turn_ids()
    closing = tokenizer.encode(family.marks[1], add_special_tokens=False)
    heads = {"<|end|>", "<|eom|>"} if family.heads is not None else set()  # of messages: a turn may hold several
    assert ends
    assert not {tokenizer.convert_ids_to_tokens(token) for token in {*ends}.intersection(closing)} - heads


@pytest.mark.parametrize("name", TOLD)
def test_the_parity_suite_writes_thinking_as_the_family_does(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    chat = ChatFormat.from_tokenizer(tokenizer, thinking=True)
    opening, closing = parity_parts._marks(tokenizer)
    thought, answer = (tokenizer.encode(text, add_special_tokens=False) for text in ("Hm", "Yes"))
    head = () if FAMILIES[name].opened else opening
    found = Parts.of(tokenizer).of_response(chat.encode(None, "Why?"), (*head, *thought, *closing, *answer))
    assert {part.name for part in found[len(head) : len(head) + len(thought)]} == {"THINKING"}
    assert found[-len(answer) :] == (found[-1],) * len(answer)
    assert found[-1].name == "ANSWER"
