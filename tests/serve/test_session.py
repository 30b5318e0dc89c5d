"""A conversation as a tree: branches, the file it is kept in, and the page it is exported as."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.core.errors import PersonaLensError
from persona_lens.serve import export, session_file
from persona_lens.serve.said import (
    Foretold,
    GaugeName,
    Made,
    ReplyReadings,
    SessionError,
    Sounded,
    TokenSaid,
)
from persona_lens.serve.session import Session
from tests.judging.test_agreement_blind import HOSTILE
from tests.monitoring.test_heatmap import Tokens

EVIL, KIND = GaugeName("evil@2", "evil", 2), GaugeName("kind@3", "kind", 3)
READ = ReplyReadings(
    prompt_last=(1.0, None),
    means=(2.0, 3.0),
    tokens=(TokenSaid("", (1.0, 2.0)), TokenSaid("é", (1.5, 2.5), id=5), TokenSaid("<b>", (1.0, None))),
    alarms=(Sounded("evil>1", 0, "evil", 2, 3.0, 2.1, 1),),
    forecast=(Foretold(0, 0.3, "like 3 of 10 replies"),),
)
MADE = Made("evil@2:+1", 0.5, 0.9, 20, 3)


def talked() -> Session:
    """Two questions; the second was taken back and asked in other words."""
    session = Session("small", [EVIL, KIND])
    session.add("system", "Be brief.")
    session.add("user", "Hello")
    session.add("assistant", "é<b>", made=MADE, readings=READ)
    session.add("user", "And?")
    session.add("assistant", "So.")
    session.back()
    session.add("user", "And then?")
    session.add("assistant", "Then that.", made=Made())
    return session


def test_what_is_said_answers_where_the_conversation_stands() -> None:
    session = talked()
    assert session.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "é<b>"},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Then that."},
    ]
    assert [each.content for each in session.branches()] == ["So.", "Then that."]
    fork = session.path[2]
    assert [each.content for each in session.children(fork.id)] == ["And?", "And then?"]
    session.go(session.branches()[0].id)
    assert session.messages[-1]["content"] == "So."
    session.go(None)
    assert session.messages == []
    assert session.back() is None
    with pytest.raises(SessionError, match="no message 'm99'"):
        session.go("m99")
    with pytest.raises(SessionError, match="not of 'tool'"):
        session.add("tool", "42")


def test_a_file_brings_the_same_session_back(tmp_path: Path) -> None:
    session = talked()
    path = session.save(tmp_path / "talk.jsonl")
    again = Session.load(path)
    assert again.to_jsonl() == session.to_jsonl() == path.read_text(encoding="utf-8")
    assert list(again) == list(session)
    assert (again.model, again.gauges, again.current) == ("small", (EVIL, KIND), session.current)
    assert again.path[2].made == MADE
    assert again.path[2].readings == READ
    assert again.add("user", "More").id not in {each.id for each in session}
    assert Session.from_jsonl(Session("empty").to_jsonl()).path == ()


def test_replies_that_were_read_elsewhere_too_widen_the_readings() -> None:
    session = Session("small", [EVIL])
    session.add("user", "Hello")
    session.add("assistant", "é<b>", readings=READ, gauges=[KIND, EVIL])
    assert session.gauges == (EVIL, KIND)
    read = session.path[-1].readings
    assert read is not None
    assert read.means == (3.0, 2.0)
    assert read.prompt_last == (None, 1.0)
    assert [token.values for token in read.tokens] == [(2.0, 1.0), (2.5, 1.5), (None, 1.0)]
    assert (read.alarms[0].gauge, read.forecast[0].gauge) == (1, 1)
    wide = GaugeName("dull@1", "dull", 1)
    session.add("assistant", "x", readings=ReplyReadings(means=(7.0,)), gauges=[wide])
    assert session.path[1].readings is not None
    assert session.path[1].readings.means == (3.0, 2.0, None)
    assert session.path[2].readings is not None
    assert session.path[2].readings.means == (None, None, 7.0)
    assert Session.from_jsonl(session.to_jsonl()).to_jsonl() == session.to_jsonl()
    with pytest.raises(SessionError, match="2 values for 1 gauge"):
        session.add("assistant", "x", readings=ReplyReadings(means=(1.0, 2.0)), gauges=[wide])


PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(PLAIN),
        json.dumps(PLAIN, indent=2),
        json.dumps({"messages": PLAIN}),
        json.dumps({"messages": PLAIN}, indent=1),
        "\n".join(map(json.dumps, PLAIN)),
        "\r\n\r\n".join(map(json.dumps, PLAIN)) + "\n",
        json.dumps([PLAIN[0], {"role": "assistant", "content": [{"type": "text", "text": "Hello."}], "name": "x"}]),
    ],
)
def test_plain_openai_messages_are_a_session_too(text: str) -> None:
    session = Session.from_jsonl(text)
    assert session.messages == PLAIN
    assert session.gauges == ()
    assert Session.from_jsonl(session.to_jsonl()).messages == PLAIN


def test_what_other_programs_leave_out_or_add_is_no_fault() -> None:
    """Numbers without decimals, null for what is not known, and fields of their own, as a page's script writes them."""
    rows: list[Any] = [
        {"persona_lens": "session", "format_version": 1, "model": "m", "gauges": [EVIL.to_json()], "current": "m1"},
        {"id": "m0", "parent": None, "role": "user", "content": "Hi"},
        {
            "id": "m1", "parent": "m0", "role": "assistant", "content": "Hello", "liked": True,
            "made": {"edits": "", "temperature": 1, "top_p": 1, "max_tokens": 200, "seed": 4},
            "readings": {
                "prompt_last": [1], "means": [None], "tokens": [{"id": None, "text": "Hello", "values": [2]}],
                "alarms": [{"alarm": "evil>2", "gauge": 0, "trait": "evil", "layer": 2, "value": 3, "token": 0}],
                "forecast": [{"gauge": 0, "probability": 1, "says": None}],
            },
        },
    ]  # fmt: skip
    session = Session.from_jsonl("\n".join(map(json.dumps, rows)))
    assert session.path[-1].made == Made("", 1.0, 1.0, 200, 4)
    assert "100%" in session.html()


HEADER = {"persona_lens": "session", "format_version": 1, "model": "m", "gauges": [EVIL.to_json()], "current": "a"}
FIRST = {"id": "a", "parent": None, "role": "user", "content": "Hi"}


def changed(value: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**value, **changes}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([changed(HEADER, format_version=2), FIRST], "line 1 begins no session of format version 1"),
        ([changed(HEADER, current="b"), FIRST], "line 1: the conversation stands at 'b'"),
        ([changed(HEADER, current=["a"]), FIRST], "no such message"),
        ([changed(HEADER, gauges=[{"name": 1}]), FIRST], "line 1: name"),
        ([changed(HEADER, gauges="x"), FIRST], "line 1: model must be a text"),
        ([HEADER, FIRST, FIRST], "line 3: the message 'a' is there twice"),
        ([HEADER, FIRST, changed(FIRST, id="b", parent="c")], "line 3: the parent 'c' must stand before"),
        ([HEADER, FIRST, changed(FIRST, id="b", parent="b")], "line 3: the parent 'b' must stand before"),
        ([HEADER, FIRST, changed(FIRST, id="b", parent="a", role="system")], "line 3: a system message must be"),
        ([HEADER, changed(FIRST, role="tool")], "line 2: role"),
        ([HEADER, changed(FIRST, id="../a")], "line 2: an id is"),
        ([HEADER, changed(FIRST, content=None)], "line 2: content"),
        ([HEADER, [FIRST]], "line 2 is "),
        ([HEADER, changed(FIRST, readings={"means": [1.0, 2.0]})], "line 2: readings have 2 values for 1 gauge"),
        ([HEADER, changed(FIRST, readings={"means": ["x"]})], "line 2: readings.means.0"),
        ([HEADER, changed(FIRST, readings={"forecast": [{"gauge": 1, "probability": 1}]})], "beyond the 1 gauge"),
        ([HEADER, changed(FIRST, made={"temperature": "hot"})], "line 2: made.temperature"),
        ([{"messages": PLAIN}, {"messages": PLAIN}], "these are 2 conversations"),
        ([{"role": "tool", "content": "x"}], "neither a session nor OpenAI messages: message 0"),
        ([7], "neither a session nor OpenAI messages"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(rows: list[Any], said: str) -> None:
    with pytest.raises(SessionError, match=re.escape(said)):
        Session.from_jsonl("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "nothing in it"),
        (b" \n ", "nothing in it"),
        (json.dumps(HEADER).encode() + b"\n{", "line 2: not JSON"),
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe", "not"),
        (b'{"persona_lens": "session", "format_version": 1, "model": "\\ud800"}', "half of a character"),
    ],
)
def test_what_is_no_json_is_refused(text: bytes, said: str) -> None:
    with pytest.raises(SessionError, match=said):
        Session.from_jsonl(text)


def test_reading_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(session_file, "MAX_BYTES", 10)
    with pytest.raises(SessionError, match="at most 10"):
        Session.from_jsonl("x" * 11)
    with pytest.raises(SessionError, match=r"talk\.jsonl: a session of"):
        Session.load(talked().save(tmp_path / "talk.jsonl"))
    with pytest.raises(SessionError, match=r"none\.jsonl"):
        Session.load(tmp_path / "none.jsonl")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "parent", "role", "content", "readings", "messages"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON, max_size=4), st.booleans())
def test_any_json_is_read_or_refused(rows: list[Any], session: bool) -> None:
    try:
        found = Session.from_jsonl("\n".join(map(json.dumps, [HEADER, FIRST, *rows] if session else rows)))
    except PersonaLensError:
        return
    assert Session.from_jsonl(found.to_jsonl()).to_jsonl() == found.to_jsonl()


def test_the_page_stands_alone_and_shows_every_branch() -> None:
    html = talked().html("Talk")
    page = Tokens(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "form"}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "src")]
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    for words in ("Be brief.", "evil@2:+1; temperature 0.5, top-p 0.9, seed 3", "not steered; greedy", "like 3 of 10"):
        assert words in page.text
    assert "Alarm evil>1: evil at layer 2 stood at +3.00 (+2.1 SD), token 1" in page.text
    assert page.text.count("So.") == 1
    assert "Branch 1" in page.text
    assert page.wholes == ["é", "é"]  # its two tokens are cells of one character, for each of two gauges
    assert [shown for _, shown in page.spans if shown] == ["<b>", "<b>"]
    assert "<svg" in html


def test_a_page_without_readings_or_messages() -> None:
    assert "Nothing has been said." in Session().html()
    assert "Hello." in Session.from_jsonl(json.dumps(PLAIN)).html()


def test_a_page_too_long_leaves_readings_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_SHOWN", 5)
    monkeypatch.setattr(export, "MAX_POINTS", 1)
    html = talked().html()
    assert "data-token" not in html
    assert "<svg" not in html
    assert "What was read" in html
    assert "too long with all that was read" in html


def test_a_page_of_many_branches_says_everything_once() -> None:
    """However deep and however many: the time does not grow with their product."""
    session = Session("small")
    for turn in range(1500):
        session.add("user", f"question {turn}.")
        asked = session.current
        session.add("assistant", f"other {turn}.")
        session.go(asked)
        session.add("assistant", f"answer {turn}.")
    html = session.html()
    assert all(
        html.count(f">{word} {turn}.<") == 1 for word in ("question", "answer", "other") for turn in (0, 7, 1499)
    )


@pytest.mark.parametrize("text", [*HOSTILE, "</style></span><script>alert(1)</script>", "\" onmouseover='x'", "$x$ {{"])
def test_hostile_text_is_shown_and_does_nothing(text: str) -> None:
    gauge = GaugeName(text, text, 1)
    read = ReplyReadings((1.0,), (1.0,), (TokenSaid(text, (1.0,)),), (Sounded(text, 0, text, 1, 2.0),))
    session = Session(text, [gauge])
    session.add("user", text)
    session.add("assistant", text, made=Made(text, 1.0), readings=read)
    session.back()
    session.add("user", text)
    session.add("assistant", text, made=Made(text, 1.0), readings=read)
    html = session.html(text)
    page = Tokens(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ufeff\ud800-\udfff]", html)
    html.encode()
