"""Conversations from files: every form, and a report for every row that is none."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from persona_lens import PersonaLensError
from persona_lens.core.progress import PersonaLensNote
from persona_lens.data.transcripts import BadTranscript, Transcript, TranscriptForm, open_transcripts

ASK = {"role": "user", "content": "How will it go?"}
SAY = {"role": "assistant", "content": "Well."}


def jsonl(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def said(row: Transcript | BadTranscript) -> list[tuple[str, str]]:
    assert isinstance(row, Transcript), row
    return [(message["role"], message["content"]) for message in row.messages]


def problem(row: Transcript | BadTranscript) -> str:
    assert isinstance(row, BadTranscript), row
    return row.problem


def test_openai_messages(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    path = jsonl(
        tmp_path / "t.jsonl",
        {"id": "x", "messages": [{"role": "developer", "content": "Be kind."}, ASK, SAY]},
        "",
        {"messages": [ASK, {"role": "assistant", "content": parts}], "model": "m"},
    )
    file = open_transcripts(path)
    assert file.form is TranscriptForm.OPENAI
    first, second = file
    assert said(first) == [("system", "Be kind."), ("user", "How will it go?"), ("assistant", "Well.")]
    assert said(second) == [("user", "How will it go?"), ("assistant", "abc")]
    assert isinstance(first, Transcript)
    assert isinstance(second, Transcript)
    assert (first.id, first.line, second.id, second.line) == ("x", 1, "line 3", 3)
    assert second.place == f"{path}:3"


def test_sharegpt_conversations(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    path = jsonl(
        tmp_path / "t.jsonl",
        {"id": 7, "conversations": talk},
        {"conversations": talk, "system": "Be kind."},
        {"conversation": [{"from": "system", "value": "S"}, *talk], "system": "other"},
    )
    file = open_transcripts(path)
    assert file.form is TranscriptForm.SHAREGPT
    rows = list(file)
    pair = [("user", "Hi"), ("assistant", "Hello")]
    assert [said(row) for row in rows] == [pair, [("system", "Be kind."), *pair], [("system", "S"), *pair]]
    assert isinstance(rows[0], Transcript)
    assert rows[0].id == "7"


def test_tables_of_other_kinds(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([["id", "messages"], ["a", json.dumps([ASK, SAY])], ["b", "[oops"]])
    good, bad = open_transcripts(path)
    assert said(good)[0] == ("user", "How will it go?")
    assert problem(bad) == f"{path}:3: messages is a text that is not JSON: '[oops'"
    parquet = tmp_path / "t.parquet"
    pq.write_table(pa.table({"conversations": [[{"from": "human", "value": "Hi"}]]}), parquet)
    (row,) = open_transcripts(parquet)
    assert said(row) == [("user", "Hi")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "not JSON"),
        ("[1]", "each line must be one JSON object"),
        ({"text": "x"}, "the row has no messages or conversations or conversation; its columns are: 'text'"),
        ({"messages": []}, "messages must be a list of messages, at least one, but is []"),
        ({"messages": None}, "but is null"),
        ({"messages": ["hi"]}, "message 0 must be an object, but is 'hi'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 0 has role 'tool'; calls of tools cannot be read"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "message 0 has role 'narrator'; it can be one"),
        ({"messages": [{**SAY, "tool_calls": [{"id": "1"}]}]}, "has tool_calls; calls of tools cannot be read"),
        ({"messages": [{"content": "x"}]}, "message 0 has role null"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 0 has role [\"user\"]"),
        ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": []}]}, "message 1 has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 0 has a part that is no text"),
        ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, "message 0 has a part that is no text"),
        ({"messages": [ASK, {"role": "system", "content": "x"}]}, "message 1 is a system message; only the first"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no message of a user or an assistant"),
        ({"messages": [{"role": "\x1b[31m\u202e", "content": "x"}]}, "message 0 has role '␛[31m[U+202E]'"),
    ],
)  # fmt: skip
def test_bad_rows_are_reported_by_line_and_reading_goes_on(tmp_path: Path, row: Any, message: str) -> None:
    good = {"messages": [ASK, SAY]}
    path = jsonl(tmp_path / "t.jsonl", good, row, good)
    before, bad, after = open_transcripts(path)
    assert said(before) == said(after)
    assert isinstance(bad, BadTranscript)
    assert bad.line == 2
    assert bad.problem.startswith(f"{path}:2: ")
    assert message in bad.problem
    assert isinstance(bad.error, PersonaLensError)
    assert str(bad.error) == bad.problem


def test_bad_rows_at_both_ends_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"oops\n" + json.dumps({"messages": [ASK]}).encode() + b'\n{"messages": "\xff"}\n')
    first, good, last = open_transcripts(path)
    assert "not JSON" in problem(first)
    assert said(good)
    assert "is not UTF-8" in problem(last)


def test_sharegpt_rows_that_are_none(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "t.jsonl",
        {"conversations": [{"from": "observation", "value": "x"}]},
        {"conversations": [{"from": "human", "value": None}]},
    )
    role, value = open_transcripts(path)
    assert "message 0 has from 'observation'; calls of tools cannot be read" in problem(role)
    assert "message 0 has no text in value: null" in problem(value)


def test_the_form_can_be_set_and_is_checked(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"messages": [ASK], "conversations": [{"from": "human", "value": "Other"}]})
    assert open_transcripts(path).form is TranscriptForm.OPENAI
    (row,) = open_transcripts(path, "sharegpt")
    assert said(row) == [("user", "Other")]
    with pytest.raises(PersonaLensError, match="no form 'alpaca' of transcripts; take one of openai, sharegpt, plain"):
        open_transcripts(path, "alpaca")
    other = jsonl(tmp_path / "other.jsonl", {"prompt": "x", "answer": "y"})
    with pytest.raises(PersonaLensError, match=r"need a column messages .* their columns are: 'prompt', 'answer'"):
        open_transcripts(other)
    with pytest.raises(PersonaLensError, match="none that can be read"):
        open_transcripts(jsonl(tmp_path / "none.jsonl", "oops"))
    for missing in ("t.txt", "gone.jsonl"):
        with pytest.raises(PersonaLensError, match=f"there is no file .*{missing}"):
            open_transcripts(tmp_path / missing)
    with pytest.raises(PersonaLensError, match="must end in one of"):
        open_transcripts(jsonl(tmp_path / "t.xlsx", {}))
    (tmp_path / "x.txt").write_text("User: Hi", encoding="utf-8")
    with pytest.raises(PersonaLensError, match="its form cannot be openai"):
        open_transcripts(tmp_path / "x.txt", "openai")


PLAIN = """\

System: Be kind.

user: How will
it go?

  Indented, and a User: within a line.
ASSISTANT:
\\User: is not a speaker here.
\\---
Users: nor is this

---
Human: Again?
AI: Yes.
-----

---
"""


def test_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode())
    file = open_transcripts(path)
    assert file.form is TranscriptForm.PLAIN
    first, second = file
    assert said(first) == [
        ("system", "Be kind."),
        ("user", "How will\nit go?\n\n  Indented, and a User: within a line."),
        ("assistant", "User: is not a speaker here.\n---\nUsers: nor is this"),
    ]
    assert said(second) == [("user", "Again?"), ("assistant", "Yes.")]
    assert isinstance(first, Transcript)
    assert isinstance(second, Transcript)
    assert (first.line, second.line, second.id) == (2, 14, "line 14")


def test_plain_text_that_is_no_conversation_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "t.md"
    path.write_text("Notes\nUser: Hi\n---\nUser: Ok\nSystem: late\n---\nAssistant: Yes\n", encoding="utf-8")
    stray, late, good = open_transcripts(path)
    assert problem(stray) == f"{path}:1: the line belongs to no message; begin one with User:, Assistant: or System:"
    assert problem(late).startswith(f"{path}:4: message 1 is a system message")
    assert said(good) == [("assistant", "Yes")]
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(PersonaLensError, match="holds no conversations"):
        list(open_transcripts(path))
    path.write_bytes(b"User: \xff")
    with pytest.raises(PersonaLensError, match="not UTF-8"):
        list(open_transcripts(path))


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"id": "1", "messages": [ASK, SAY], "system_prompt": "Be a pirate.", "n": 3})
    with pytest.warns(PersonaLensNote, match="are not read: system_prompt$"):
        open_transcripts(path)
    path = jsonl(tmp_path / "c.jsonl", {"conversations": [ASK, SAY]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", PersonaLensNote)
        assert [said(each) for each in open_transcripts(path, "openai")] == [
            [("user", "How will it go?"), ("assistant", "Well.")]
        ]
