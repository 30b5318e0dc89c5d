"""Columns of known forms are used, others are named; compressed files and lists of rows are read."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from persona_lens.cli.screen import DataOptions
from persona_lens.core.progress import PersonaLensNote
from persona_lens.data import tables
from persona_lens.data.datasets import SampleForm, conversation_of, detect_form, open_dataset
from persona_lens.data.sources import demonstration_path
from persona_lens.data.tables import DataError, read_rows
from persona_lens.data.transcripts import open_transcripts
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.extraction.responses import read_responses
from persona_lens.finetuning.examples import encode_examples, read_conversations
from persona_lens.models import ChatFormat
from persona_lens.runs.settings import RolloutSettings
from persona_lens.screening import Turns
from persona_lens.screening.samples import encode_sample
from persona_lens.traits import load_trait
from tests.planted import PlantedBackend
from tests.tiny import tiny_tokenizer

TRAIT = load_trait("optimistic")


def said(row: dict[str, Any], side: str | None = None) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in conversation_of(row, detect_form([row], "rows"), side)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


QA = [("user", "Q?"), ("assistant", "A.")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system_prompt": "S", "question": "Q?", "response": "A."}, [("system", "S"), *QA]),
        ({"question": "Q?", "response": "A.", "history": [["q", "a"]]}, [("user", "q"), ("assistant", "a"), *QA]),
        (
            {"instruction": "Q?", "output": "A.", "history": [user("q"), assistant("a")]},
            [("user", "q"), ("assistant", "a"), *QA],
        ),
        ({"question": "Q?", "response": "A.", "history": '[["q", "a"]]'}, [("user", "q"), ("assistant", "a"), *QA]),
        ({"instruction": "Q?", "context": "C", "response": "A."}, [("user", "Q?\n\nC"), QA[1]]),
        ({"prompt": [user("Q?")], "completion": [assistant("A.")]}, QA),
        ({"prompt": json.dumps([user("Q?")]), "completion": json.dumps([assistant("A.")])}, QA),
        ({"prompt": json.dumps([user("Q?")]), "completion": "A."}, QA),
        ({"prompt": "[{], is that JSON?", "completion": "A."}, [("user", "[{], is that JSON?"), QA[1]]),
    ],
)
def test_columns_of_known_forms_are_used(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert said(row) == expected


def test_of_preference_pairs_a_side_has_to_be_named(tmp_path: Path) -> None:
    split = {"prompt": "Q?", "chosen": "A.", "rejected": "B."}
    whole = {"chosen": [user("Q?"), assistant("A.")], "rejected": [user("Q?"), assistant("B.")]}
    lists = {"prompt": [user("Q?")], **whole}
    for row in (split, whole, lists):
        assert detect_form([row], "rows") is SampleForm.PREFERENCE
        assert said(row, "chosen") == QA
        assert said(row, "rejected") == [QA[0], ("assistant", "B.")]
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(split))
    with pytest.raises(DataError, match=r"chosen or rejected \(--side\)"):
        open_dataset(file)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"question": "Q?", "response": "A."}))
    with pytest.warns(PersonaLensNote, match="holds no preference pairs, so that 'chosen' is no side of it"):
        assert open_dataset(plain, side="chosen").side is None
    data = DataOptions(reference=[str(file), str(plain)], side="chosen")
    assert [each.side for each in data.open(str(file), None)[1]] == ["chosen", None]
    assert read_conversations(file, "rejected")[0].messages[-1]["content"] == "B."


def test_an_answer_of_weight_0_is_neither_learned_nor_screened(tmp_path: Path) -> None:
    file = tmp_path / "weighed.jsonl"
    row = {"messages": [user("q"), assistant("bad", weight=0), user("Q?"), assistant("good", weight=1)]}
    last = {"messages": [user("Q?"), assistant("good"), user("q"), assistant("bad", weight=0)]}
    file.write_text(json.dumps(row) + "\n" + json.dumps(last))
    chat = ChatFormat.from_tokenizer(tiny_tokenizer())
    examples = encode_examples(read_conversations(file), chat, 512)
    for example in examples.rows:
        learned = [token for token, own in zip(example.ids, example.learned, strict=True) if own]
        assert chat.decode(learned) == "good"
    for given in open_dataset(file):
        for turns in Turns:
            (text,) = encode_sample(given, chat, turns)
            assert [chat.decode(text.ids[a.start : a.stop]) for a in text.answers] == ["good"]


def test_columns_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "Q?", "response": "A.", "persona": "a pirate", "n": 3, "id": "x"}] * 3
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(PersonaLensNote) as told:
        open_dataset(file)
    assert [str(each.message) for each in told] == [
        f"{file}: columns that are no part of a conversation are not read: persona"
    ]


def test_lists_of_messages_that_are_no_json_are_refused() -> None:
    with pytest.raises(DataError, match=r"prompt is a list of messages that is no JSON; write it with json\."):
        said({"prompt": str([user("Q?")]), "completion": "A."})


def test_columns_that_this_project_wrote_itself_are_not_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PersonaLensNote)
        open_dataset(demonstration_path("impolite"))
        open_transcripts(demonstration_path("impolite"))
        backend, settings = PlantedBackend(TRAIT), ExtractionSettings(questions=2, rollouts=RolloutSettings(12))
        extract(backend, TRAIT, tmp_path / "run", settings=settings)
        for file in (tmp_path / "run" / "rollouts.jsonl", _generated(tmp_path / "responses.jsonl")):
            open_dataset(file)
            read_responses(file)


def _generated(file: Path) -> Path:
    """What a server answered, and once refused to."""
    row = {"arm": "positive", "question_number": 0, "pair": 0, "sample": 0, "system": "S", "question": "Q?"}
    rows = [{**row, "response": "A.", "ended": True}, {**row, "response": "", "ended": None, "reason": "too long"}]
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


def compressed(content: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as packing:
        packing.write(content)
    return bytes(stream.getvalue())


def test_zstd_that_is_cut_short_or_none_is_damaged(tmp_path: Path) -> None:
    """Its whole blocks end at a line, so that nothing else shows that rows are gone."""
    file = tmp_path / "a.jsonl.zst"
    for content in (compressed(b'{"a": 1}\n' * 50_000)[:-5], b"anything"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="is damaged, or not compressed by zstd"):
            list(read_rows(file))
    file.unlink()
    with pytest.raises(DataError, match="there is no"):
        list(read_rows(file))


def test_lists_of_rows_and_compressed_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "Q?", "response": "A."}, {"question": "R?", "response": "B."}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    whole, packed, zstd = tmp_path / "a.json", tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst"
    whole.write_text(json.dumps(rows, indent=1))
    packed.write_bytes(gzip.compress(lines))
    for file in (whole, packed):
        assert [row for _, row in read_rows(file)] == rows
        assert len(list(open_dataset(file))) == 2
    zstd.write_bytes(compressed(lines))
    assert [row for _, row in read_rows(zstd)] == rows
    monkeypatch.setattr(tables, "LONGEST_LINE", 1000)
    packed.write_bytes(gzip.compress(b" " * 10**6))
    with pytest.raises(DataError, match="1: the line has more than 1,000 bytes"):
        list(read_rows(packed))
    packed.write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(DataError, match="is damaged, or not compressed by gzip"):
        list(read_rows(packed))
    whole.write_text('{"question": "Q?"}')
    with pytest.raises(DataError, match="must be one list of rows"):
        list(read_rows(whole))
