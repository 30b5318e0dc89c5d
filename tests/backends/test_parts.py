"""Which token of a response is thinking and which is answer, compared with a search over the text."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from persona_lens.backend.parts import Parts
from persona_lens.backend.parts.machine import Part

HEADS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = HEADS.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PIECES = [
    ".</",
    "th",
    "ink",
    "think",
    ">",
    ">\n\n",
    "</",
    "\n",
    "\n\n",
    " ",
    " a",
    "b",
    "<",
    "/",
    "nk>",
    "k>x",
    "hi\n",
]
N, T, A = Part.NEITHER, Part.THINKING, Part.ANSWER


def tokenizer(
    template: str, tokens: tuple[str, ...] = (), control: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
) -> Any:
    """Byte-level, with some longer pieces; the tokens that stand for themselves are added."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    longer = ["".join(part for part, _ in encode.pre_tokenize_str(piece)) for piece in PIECES if piece not in tokens]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*letters, *longer]))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = encode
    inner.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    made = make(tokenizer_object=inner, eos_token=control[-1], pad_token=control[-1])
    made.add_special_tokens({"additional_special_tokens": list(control)})
    made.add_tokens(list(tokens))
    made.chat_template = template
    return made


def ids_of(tok: Any, *pieces: str) -> list[int]:
    """Pieces that are tokens as these, others letter by letter."""
    found: list[int] = []
    for piece in pieces:
        token = tok.convert_tokens_to_ids(piece)
        if token is None or tok.convert_ids_to_tokens(token) != piece:
            spelled = "".join(part for part, _ in tok.backend_tokenizer.pre_tokenizer.pre_tokenize_str(piece))
            whole = tok.get_vocab().get(spelled)
            found += [whole] if whole is not None else [tok.get_vocab()[letter] for letter in spelled]
        else:
            found.append(token)
    return found


def parts_of(tok: Any, prompt: list[str], response: list[str]) -> list[Part]:
    """What each piece is, all of whose tokens have to be the same but in pieces that are spelled."""
    return list(Parts.of(tok).of_response(ids_of(tok, *prompt), ids_of(tok, *response)))


HEAD = ["<|im_start|>", "user", "\n", "hi\n", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
MARKS = ("<think>", "</think>")


def test_the_model_opens_and_closes() -> None:
    tok = tokenizer(HEADS, MARKS)
    assert parts_of(tok, HEAD, ["<think>", "\n", "b", "</think>", "\n\n", "b"]) == [N, T, T, N, A, A]
    assert parts_of(tok, HEAD, ["\n", "<think>", "b"]) == [A, N, T], "thinking that never ends"
    assert parts_of(tok, HEAD, ["b", " a"]) == [A, A], "none"


def test_the_template_opens() -> None:
    tok = tokenizer(OPENS, MARKS)
    head = [*HEAD, "<think>", "\n"]
    assert parts_of(tok, head, ["b", "</think>", "b"]) == [T, N, A]
    assert parts_of(tok, head, ["<think>", "b", "</think>", "b"]) == [T, T, N, A], "and the model again"
    assert parts_of(tok, [*head, "\n", "</think>", "\n\n"], ["b", "b"]) == [A, A], "an empty block"


def test_several_blocks_and_quoted_marks() -> None:
    tok = tokenizer(HEADS, MARKS)
    response = ["<think>", "b", "</think>", "b", "\n", " ", "<think>", "b", "</think>", "<think>", "</think>", "b"]
    assert parts_of(tok, HEAD, response) == [N, T, N, A, A, A, N, T, N, N, N, A]
    assert parts_of(tok, HEAD, ["b", "<think>", "b", "</think>", "b"]) == [A] * 5, "within a line"
    assert parts_of(tok, HEAD, ["<think>", "</", "think", ">", "b"]) == [N, T, T, T, T], "spelled"
    assert parts_of(tok, HEAD, ["<", "think", ">", "b"]) == [A] * 4, "spelled"


def test_what_a_user_quotes_ends_with_the_turn() -> None:
    tok = tokenizer(HEADS, MARKS)
    asked = ["<|im_start|>", "user", "\n", "<think>", "b", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert parts_of(tok, asked, ["b"]) == [A]
    assert parts_of(tok, HEAD, ["<think>", "b", "<|im_start|>", "b"]) == [N, T, N, A]


def test_tokens_between_turns_need_not_be_control_tokens() -> None:
    """Those of DeepSeek are not."""
    template = (
        "{% for m in messages %}{{ '<｜User｜>' if m['role'] == 'user' else '<｜Assistant｜>' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    )
    tok = tokenizer(template, ("<｜User｜>", "<｜Assistant｜>", "<tool_call>", *MARKS))
    asked = ["<｜User｜>", "<think>", "b", "<｜Assistant｜>"]
    assert parts_of(tok, asked, ["b"]) == [A]
    assert parts_of(tok, asked, ["<think>", "b", "<tool_call>", "b"]) == [N, T, T, T]


def test_turns_that_words_separate() -> None:
    """A reply begins an answer wherever it begins; a prompt that ends in a mark opens it; what a user opens stays."""
    tok = tokenizer(PLAIN, MARKS)
    head = ["b", "\n", "assistant", ":", " "]
    assert parts_of(tok, head, ["<think>", "b", "</think>", "b"]) == [N, T, N, A]
    assert parts_of(tok, [*head, "<think>", "\n"], ["b", "</think>", "b"]) == [T, N, A]
    assert parts_of(tok, ["\n", "<think>", *head], ["b"]) == [T]


def test_marks_that_are_no_tokens() -> None:
    tok = tokenizer(OPENS)
    assert Parts.of(tok).marks == (MARKS,)
    head = [*HEAD, "<", "think", ">", "\n"]
    # Only the token that completes the mark is one: what stands before it in others cannot be known.
    assert parts_of(tok, head, ["b", ".</", "think", ">\n\n", "b"]) == [T, T, T, N, A]
    assert parts_of(tok, head, ["</", "th", "b", "</", "th", "ink", ">"]) == [T, T, T, T, T, T, N]
    assert parts_of(tok, head, ["</", "think", ">", "<", "th", "ink", ">", "b"]) == [T, T, N, A, A, A, N, T]
    assert parts_of(tok, HEAD, ["b", "<", "think", ">", "b"]) == [A] * 5
    assert parts_of(tok, HEAD, ["<", "<", "think", ">", "b"]) == [A] * 5
    assert parts_of(tok, HEAD, ["<", "th", "i", "nk>", "b"]) == [A, A, A, N, T]
    assert parts_of(tok, head, ["</", "thi", "k>x", "</", "think", "k>x", "</", "th", "i", "n", "k>x", "b"])[-2:] == [
        N,
        A,
    ]


def test_a_mark_may_begin_with_a_token_and_go_on_in_text() -> None:
    """Gemma's does."""
    tok = tokenizer(HEADS, (), ("<|channel>", "<channel|>", "<|im_start|>", "<|im_end|>"))
    response = ["<|channel>", "th", "ought", "\n", "b", "<channel|>", "b"]
    want = [N, A, *[A] * 4, N, T, T, N, A]  # "ought" is spelled
    assert parts_of(tok, HEAD, response) == want


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>")


def test_channels() -> None:
    template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    tok = tokenizer(template, (), HARMONY)
    parts = Parts.of(tok)
    assert parts.thinks
    head = ids_of(tok, "<|start|>", "user", "<|message|>", "b", "<|end|>", "<|start|>", "assistant")

    def found(*response: str) -> str:
        return "".join("nta"[part] for part in parts.of_response(head, ids_of(tok, *response)))

    analysis = ("<|channel|>", "analysis", "<|message|>", "b", "b", "<|end|>")
    final = ("<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "b", "<|channel|>")
    assert found(*analysis, *final) == "n" + 8 * "n" + "nttn" + "n" + 9 * "n" + "n" + 5 * "n" + "nan"
    assert found("<|channel|>", "final", " ", "<|constrain|>", "b", "<|message|>", "b") == "n" * 10 + "a"
    assert found("<|channel|>", "finale"[:4], "<|message|>", "b") == "n" * 6 + "t"
    assert found("<|channel|>", "commentary", " ", "to=b", "<|message|>", "b", "<|end|>") == "n" * 17 + "tn"
    assert found("b", "b") == "aa", "a reply without a channel"
    assert found(" ", "to=b", "<|channel|>", "final", "<|message|>", "b")[-1] == "a"


def test_a_model_that_never_thinks_only_answers() -> None:
    tok = tokenizer(HEADS)
    parts = Parts.of(tok)
    assert not parts.thinks
    assert parts_of(tok, HEAD, ["<", "think", ">", "<|im_start|>"]) == [A] * 4
    tok.chat_template = OPENS
    assert Parts.of(tok).thinks, "the template is another one"
    assert Parts.of(tok, HEADS).thinks is False


def test_a_tag_that_no_list_has_but_a_template_opens() -> None:
    tok = tokenizer(OPENS.replace("think", "muse"))
    assert Parts.of(tok).marks == (("<muse>", "</muse>"),)
    assert parts_of(tok, [*HEAD, *"<muse>", "\n"], ["b", *"</muse>", "b"])[-2:] == [N, A]


def by_search(pieces: list[str], boundary: int, opening: str, closing: str, control: str) -> list[Part]:
    """The same for pieces of text, the response's from ``boundary`` on, by looking ahead for whole marks.

    Args:
        pieces: Tokens.
        boundary: The first of the response.
        opening: What opens thinking, a text.
        closing: What closes it.
        control: What is between turns.
    """
    text, respond = "".join(pieces), len("".join(pieces[:boundary]))
    owner = [number for number, piece in enumerate(pieces) for _ in piece]
    found = [Part.ANSWER] * len(pieces)
    inside, since, at = False, 0, 0  # since: from where on there have to be spaces alone before a mark
    while at < len(text):
        if at == respond and not inside:
            before = text[:at].rstrip()
            inside = before.endswith(opening) and control not in text[len(before) : at]
            since = at if text[since:at].strip(" \t\n") else since
        mark = closing if inside else opening
        length = 1
        if text.startswith(control, at):
            length, inside, since = len(control), False, at + len(control)
            found[owner[at]] = Part.NEITHER
        elif text.startswith(mark, at) and (inside or not text[since:at].strip(" ")):
            length = len(mark)
            for place in range(at, at + length - 1):
                found[owner[place]] = Part.THINKING if inside else Part.ANSWER
            found[owner[at + length - 1]] = Part.NEITHER
            inside, since = not inside, at + length
        else:
            found[owner[at]] = Part.THINKING if inside else Part.ANSWER
            since = at + 1 if text[at] == "\n" and not inside else since
        at += length
    return found[boundary:]


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_random_texts(seed: int, spelled: bool) -> None:
    rng = random.Random(seed)
    tok = tokenizer(OPENS, () if spelled else MARKS)
    names = {"<|im_start|>": "S", "<think>": "O", "</think>": "C"}
    opening, closing = MARKS if spelled else ("O", "C")
    words = ["<think>", "</think>", "<think>", "</think>", "\n", " ", "b", "<", "<|im_start|>"]
    for _ in range(40):
        pieces: list[str] = []
        for word in (rng.choice(words) for _ in range(rng.randint(2, 14))):
            if spelled and word in MARKS:
                cuts = sorted(rng.sample(range(1, len(word)), rng.randint(0, 3)))
                pieces += [word[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)], strict=True)]
            else:
                pieces.append(word)
        boundary = rng.randint(1, len(pieces))
        if spelled:  # letter by letter, but for pieces that are tokens
            known = {*PIECES, "<|im_start|>"}
            halves = [[p] if p in known else list(p) for p in pieces]
            boundary = sum(map(len, halves[:boundary]))
            pieces = [letter for half in halves for letter in half]
            if cut_in_mark(pieces, boundary):
                continue
        got = parts_of(tok, pieces[:boundary], pieces[boundary:])
        shown = ["S" if p == "<|im_start|>" else p if spelled else names.get(p, p) for p in pieces]
        want = by_search(shown, boundary, opening, closing, "S")
        assert got == want, (pieces[:boundary], pieces[boundary:], got, want)


def cut_in_mark(pieces: list[str], boundary: int) -> bool:
    """Whether the prompt ends within a mark."""
    before, behind = "".join(pieces[:boundary]), "".join(pieces[boundary:])
    return any(before.endswith(m[:n]) and behind.startswith(m[n:]) for m in MARKS for n in range(1, len(m)))
