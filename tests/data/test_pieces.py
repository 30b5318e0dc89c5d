"""Pieces: every token in exactly one, whole characters, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from persona_lens import PersonaLensError
from persona_lens.data.pieces import MAX_JOINED, TokenPiece, token_pieces, whole_pieces
from persona_lens.models import ensure_embedded, load_tokenizer, resolve
from tests.data.tokenizers import TOKENIZERS
from tests.tiny import tiny_tokenizer

TINY = tiny_tokenizer()
SAMPLES = (
    "😀",
    "日本語",
    "مرحبا",
    "हिन्दी",
    "e\u0301",
    "👨‍👩‍👧",
    "🇫🇷🇩🇪",
    "\ufffd",
    "<|im_end|>",
    "\n\n",
    "  ",
    "the exam",
)
texts = st.lists(st.one_of(st.sampled_from(SAMPLES), st.text(max_size=6)), max_size=8).map("".join)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    for pieces in (token_pieces(tokenizer, ids), whole_pieces(tokenizer, ids)):
        assert "".join(piece.text for piece in pieces) == decoded(tokenizer, ids)
        assert [token for piece in pieces for token in piece.ids] == ids
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces)][:-1] if pieces else not ids
        assert all(piece.ids and piece.shown.strip() for piece in pieces)


def bytes_of(text: str | bytes) -> list[int]:
    """Ids of single bytes in the tiny tokenizer."""
    raw = text.encode() if isinstance(text, str) else text
    return [BYTES[byte] for byte in raw]


def token_id(name: str) -> int:
    found = TINY.convert_tokens_to_ids(name)
    assert isinstance(found, int)
    return found


def _byte_ids() -> dict[int, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from 256 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    return {byte: token_id(letter) for byte, letter in letters.items()}


BYTES = _byte_ids()


def shape(pieces: tuple[TokenPiece, ...]) -> list[tuple[str, int]]:
    return [(piece.text, len(piece.ids)) for piece in pieces]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(text=texts)
def test_pieces_of_any_text_are_whole_and_complete(name: str, text: str) -> None:
    check(TOKENIZERS[name], TOKENIZERS[name].encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pieces_of_any_ids_are_whole_and_complete(name: str, data: st.DataObject) -> None:
    """A model may generate anything: halves of characters, control tokens between them, ids of no token."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=40))
    check(tokenizer, ids)


@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_no_character_of_a_text_is_broken(text: str) -> None:
    pieces = whole_pieces(TINY, bytes_of(text))
    assert shape(pieces) == [(character, len(character.encode())) for character in text]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a😀b", [("a", 1), ("😀", 4), ("b", 1)]),
        ("日本", [("日", 3), ("本", 3)]),
        ("e\u0301!", [("e\u0301", 3), ("!", 1)]),
        ("👨‍👩‍👧", [("👨‍👩‍👧", 18)]),
        ("🇫🇷🇩🇪", [("🇫🇷", 8), ("🇩🇪", 8)]),
        ("👍🏽.", [("👍🏽", 8), (".", 1)]),
        ("a\ufffdb", [("a", 1), ("\ufffd", 3), ("b", 1)]),
        (b"\xf0\x9fA", [("\ufffd", 2), ("A", 1)]),
        (b"\xefA", [("\ufffd", 1), ("A", 1)]),
        (b"\xef\xef\xbf\xbd", [("\ufffd", 1), ("\ufffd", 3)]),
        (b"ok\xf0\x9f\x98", [("o", 1), ("k", 1), ("\ufffd", 3)]),
        (b"\x80\x80", [("\ufffd", 1), ("\ufffd", 1)]),
        ("\n\u0301", [("\n", 1), ("\u0301", 2)]),
        (b"", []),
    ],
)
def test_characters_have_all_their_tokens(raw: str | bytes, expected: list[tuple[str, int]]) -> None:
    assert shape(token_pieces(TINY, bytes_of(raw))) == expected


def test_a_space_and_half_a_character_in_one_token_go_together() -> None:
    tokenizer = TOKENIZERS["merging"]
    ids = tokenizer.encode("well, 日x")
    names = tokenizer.convert_ids_to_tokens(ids)
    assert any(name.startswith("Ġæ") or name == "Ġ" for name in names)
    assert shape(token_pieces(tokenizer, ids))[-1] == ("x", 1)
    check(tokenizer, ids)


def test_control_tokens_stand_alone_even_within_a_character() -> None:
    end = token_id("<|im_end|>")
    head, tail = bytes_of("😀")[:2], bytes_of("😀")[2:]
    pieces = token_pieces(TINY, [*head, end, *tail, end])
    assert [(p.text, len(p.ids), p.special) for p in pieces] == [
        ("\ufffd", 2, False), ("<|im_end|>", 1, True),
        ("\ufffd", 1, False), ("\ufffd", 1, False), ("<|im_end|>", 1, True),
    ]  # fmt: skip


def test_ids_that_no_token_has_are_shown_by_number() -> None:
    (a,) = bytes_of("a")
    pieces = token_pieces(TINY, [99_999, a, 99_998, 99_997, a])
    assert [piece.shown for piece in pieces] == ["[id 99999]", "a", "[id 99998]", "[id 99997]", "a"]
    for bad in (-1, 2**32):
        with pytest.raises(PersonaLensError, match=f"token 1 has the id {bad}"):
            token_pieces(TINY, [a, bad])


def test_sentencepiece_keeps_the_space_of_every_word_but_the_first() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("the exam 😀 the", add_special_tokens=False)
    pieces = token_pieces(tokenizer, ids)
    assert "".join(piece.text for piece in pieces) == "the exam 😀 the"
    assert ("😀", 4) in shape(pieces)


def test_endless_accents_do_not_make_endless_pieces() -> None:
    pieces = token_pieces(TINY, bytes_of("a" + "\u0336" * 3000))
    assert max(len(piece.ids) for piece in pieces) <= MAX_JOINED
    assert all(piece.shown.startswith(("a", "◌")) for piece in pieces)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a", "a"), (" a", " a"), (" ", "␣"), ("  \t", "␣␣⇥"), ("\n", "↵\n"), (".\n\n", ".↵\n↵\n"), ("a\tb", "a⇥b"),
        ("\r\n", "␍↵\n"), ("\x1b[31m", "␛[31m"), ("\u202eabc", "[U+202E]abc"), ("\u200b", "[U+200B]"),
        ("\u200d", "[U+200D]"), ("\ufe0f", "[U+FE0F]"), ("\u00a0", "[U+00A0]"), ("\u0301", "◌\u0301"), ("", "[id 7]"),
        ("\u2066x", "[U+2066]x"), ("\u061c", "[U+061C]"), ("\x00", "␀"), (" \n", "␣↵\n"), ("👩‍🔬", "👩‍🔬"),
    ],
)  # fmt: skip
def test_everything_is_visible(text: str, shown: str) -> None:
    assert TokenPiece(text, 0, (7,)).shown == shown


def test_a_long_text_takes_time_in_proportion_to_its_length() -> None:
    """Counted in decoded tokens: a broken character must not make every later step decode everything."""
    decoded_tokens = 0

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(TINY, name)

        def decode(self, ids: list[int], **options: bool) -> str:
            nonlocal decoded_tokens
            decoded_tokens += len(ids)
            return str(TINY.decode(ids, **options))

    ids = bytes_of("日本語 😀 and plain text\n" * 20) + bytes_of(b"\xf0\x9f" * 50)
    tokenizer: object = Counting()
    pieces = token_pieces(tokenizer, ids)  # type: ignore[arg-type]
    assert sum(len(piece.ids) for piece in pieces) == len(ids)
    assert decoded_tokens < 30 * len(ids)


@pytest.mark.real
def test_the_embedded_models_tokens_are_whole() -> None:
    ensure_embedded()
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    text = "Hi 😀 naïve 日本語 مرحبا بالعالم हिन्दी 👨‍👩‍👧\n<|im_end|>\n"
    ids = tokenizer.encode(text)
    check(tokenizer, ids)
    pieces = token_pieces(tokenizer, ids)
    assert "\ufffd" not in "".join(piece.text for piece in pieces)
    assert (" 😀", 2) in shape(pieces)
    assert [piece.text for piece in pieces if piece.special] == ["<|im_end|>"]
    halves = [ids[:n] for n in range(len(ids))]
    for part in halves:
        check(tokenizer, part)
