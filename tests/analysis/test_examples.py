"""Corpora, and where in them features are active."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from persona_lens.analysis import AnalysisError
from persona_lens.analysis.dissection import examples as examples_module
from persona_lens.analysis.dissection.examples import find_examples, read_corpus
from persona_lens.backend import Read, ReadKind, TokenBatch
from persona_lens.data.tables import DataError
from tests.analysis.dictionaries import LAYER, dictionary, directions
from tests.backends.fixtures import tiny_backend

TEXTS = ["hello there, you", "what a day", "x", "", "hello there, you too, and a longer text than that one"]


def by_hand(rows: Tensor) -> list[Tensor]:
    """Activations of every feature on each token of each text but the first: [tokens, features]."""
    backend = tiny_backend("transformers")
    found = []
    for text in TEXTS:
        ids = backend.tokenizer(text)["input_ids"]
        if len(ids) > 1:
            h = backend.forward(TokenBatch.of([ids]), (), [Read(ReadKind.ACTIVATIONS, (LAYER,))]).reads["activations"]
            found.append(torch.relu(h[0, 0, 1:] @ rows.T))
    return found


@pytest.mark.parametrize("values", [2**25, 100])
def test_the_strongest_place_of_each_text_comes_first(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "ENCODED_VALUES", values)  # 100: two tokens at once
    rows = directions()
    active = by_hand(rows)
    found = find_examples(tiny_backend("transformers"), dictionary(rows), [3, 8, 20], TEXTS, count=2)
    assert found.tokens == sum(map(len, active))
    counts = torch.cat(active).gt(0).sum(dim=0)
    assert found.counts.tolist() == counts.tolist()
    assert found.alive.tolist() == (counts > 0).tolist()
    numbers = [0, 1, 4]
    for each in found.found:
        peaks = sorted(
            ((float(a[:, each.feature].max()), n) for a, n in zip(active, numbers, strict=True)), reverse=True
        )
        assert [e.activation for e in each.examples] == pytest.approx([p for p, _ in peaks[:2] if p > 0], rel=1e-4)
        assert [e.text for e in each.examples] == [n for p, n in peaks[:2] if p > 0]
        assert each.share == pytest.approx(int(counts[each.feature]) / found.tokens)
        for example in each.examples:
            place = int(active[numbers.index(example.text)][:, each.feature].argmax()) + 1
            text = TEXTS[example.text]  # a token a byte
            assert example.token == text[place]
            assert text[:place].endswith(example.before)
            assert text[place + 1 :].startswith(example.after)


def test_the_first_token_and_special_ones_are_not_looked_at() -> None:
    backend = tiny_backend("transformers")
    rows = directions()
    plain = find_examples(backend, dictionary(rows), [0], ["hello"])
    assert plain.tokens == 4
    assert find_examples(backend, dictionary(rows), [0], ["hello<|im_end|>"]).tokens == 4


def test_a_feature_that_is_never_active_has_no_examples() -> None:
    silent = dictionary(encode=lambda h: torch.zeros(len(h), 40))
    found = find_examples(tiny_backend("transformers"), silent, [5], TEXTS)
    assert found.found[0].examples == ()
    assert not found.alive.any()


def test_without_an_encoder_or_text_there_are_none() -> None:
    backend = tiny_backend("transformers")
    with pytest.raises(AnalysisError, match="stand-in came without an encoder"):
        find_examples(backend, dictionary(encode=None), [1], TEXTS)
    with pytest.raises(AnalysisError, match="no text of the corpus has two tokens"):
        find_examples(backend, dictionary(), [1], ["a", ""])


def test_corpora_of_every_kind(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\n  two  \nthree\n", encoding="utf-8")
    assert read_corpus(lines) == ["one", "two", "three"]
    assert read_corpus(lines, limit=2) == ["one", "two"]
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text("".join(json.dumps({"question": "q", "response": r}) + "\n" for r in ("a b", "", "c")))
    assert read_corpus(rollouts) == ["a b", "c"]
    table = tmp_path / "table.csv"
    table.write_text("text,response\nfirst,no\n")
    assert read_corpus(table) == ["first"]


def test_files_that_are_no_corpora_are_refused_with_their_line(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q"}\n')
    with pytest.raises(AnalysisError, match=r"rows.jsonl:1: none of the columns is named text, .*; it has question"):
        read_corpus(rows)
    rows.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(AnalysisError, match=r"rows.jsonl:2: text must be a text, but is 3"):
        read_corpus(rows)
    rows.write_text('{"text": "a"}\nnonsense\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: not JSON"):
        read_corpus(rows)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(AnalysisError, match="holds no text"):
        read_corpus(empty)
    empty.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(AnalysisError, match="cannot be read"):
        read_corpus(empty)
    with pytest.raises(AnalysisError, match="cannot be read"):
        read_corpus(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="there is no file"):
        read_corpus(tmp_path / "missing.jsonl")
