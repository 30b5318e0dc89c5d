"""The forms of rows: what they are told by, and the messages in them."""

from __future__ import annotations

from typing import Any

import pytest

from persona_lens.data.datasets import SampleForm, conversation_of, detect_form
from persona_lens.data.tables import DataError

ASKED, SAID = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}
OTHER = {"role": "user", "content": "Milk?"}
ROWS: list[tuple[SampleForm, dict[str, Any]]] = [
    (SampleForm.MESSAGES, {"messages": [ASKED, SAID]}),
    (SampleForm.MESSAGES, {"conversation": [ASKED, SAID], "model": "x"}),
    (
        SampleForm.MESSAGES,
        {"messages": '[{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}]'},
    ),
    (SampleForm.SHAREGPT, {"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}]}),
    (SampleForm.PROMPT_RESPONSE, {"prompt": "Tea?", "response": "Yes."}),
    (SampleForm.PROMPT_RESPONSE, {"question": "Tea?", "answer": "Yes.", "id": 3}),
    (SampleForm.ALPACA, {"instruction": "Tea?", "input": "", "output": "Yes."}),
]


@pytest.mark.parametrize(("form", "row"), ROWS)
def test_each_form_is_told_and_gives_the_same_messages(form: SampleForm, row: dict[str, Any]) -> None:
    assert detect_form([{}, row], "file") is form
    assert conversation_of(row, form) == (ASKED, SAID)


def test_an_input_follows_the_instruction() -> None:
    row = {"instruction": "Translate.", "input": "Tee?", "output": "Tea?"}
    assert conversation_of(row, SampleForm.ALPACA)[0]["content"] == "Translate.\n\nTee?"


@pytest.mark.parametrize(("form", "row"), ROWS)
def test_a_system_column_comes_first(form: SampleForm, row: dict[str, Any]) -> None:
    found = conversation_of({**row, "system": "Be brief."}, form)
    assert found == ({"role": "system", "content": "Be brief."}, ASKED, SAID)


def test_what_follows_the_last_answer_is_left_out() -> None:
    assert conversation_of({"messages": [ASKED, SAID, OTHER]}, SampleForm.MESSAGES) == (ASKED, SAID)


@pytest.mark.parametrize(
    ("form", "row", "said"),
    [
        (SampleForm.PROMPT_RESPONSE, {"prompt": "Tea?", "response": " "}, "the response is empty"),
        (SampleForm.PROMPT_RESPONSE, {"prompt": "", "response": "Yes."}, "the prompt is empty"),
        (SampleForm.PROMPT_RESPONSE, {"prompt": "Tea?", "response": 3}, "response must be a text, but is int"),
        (SampleForm.PROMPT_RESPONSE, {"prompt": "Tea?"}, "has no response or completion.*columns are: 'prompt'"),
        (SampleForm.ALPACA, {"instruction": "Tea?"}, "has no output"),
        (SampleForm.MESSAGES, {"id": 1}, "has no messages or conversations or conversation"),
        (SampleForm.MESSAGES, {"messages": [ASKED]}, "no answer of an assistant"),
        (SampleForm.MESSAGES, {"messages": [SAID]}, "nothing was asked before the answer"),
        (SampleForm.MESSAGES, {"messages": [{"role": "clown", "content": "?"}, SAID]}, "has role 'clown'"),
        (SampleForm.MESSAGES, {"messages": None}, "must be a list of messages"),
        (SampleForm.SHAREGPT, {"conversations": [{"from": "human"}]}, "no text in value"),
    ],
)
def test_what_is_wrong_with_a_row(form: SampleForm, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        conversation_of(row, form)


def test_rows_of_no_form_are_named_by_their_columns() -> None:
    with pytest.raises(DataError, match=r"data\.csv: the rows have no form that is known.*have: 'a', 'b'"):
        detect_form([{"a": 1}, {"b": 2}], "data.csv")
