"""Files of responses: what they may hold, what each row answers, and what is wrong with one, by file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persona_lens.backend import Backend
from persona_lens.backend.batches import context_length
from persona_lens.backend.blocks import context_of
from persona_lens.extraction.external import ExternalRollouts, external_rollouts
from persona_lens.extraction.means import ExtractionError
from persona_lens.extraction.responses import read_responses
from persona_lens.judging import Judgement, Score
from persona_lens.models.chat import chat_format
from persona_lens.runs.rollouts import Request
from persona_lens.traits import Arm, load_trait
from tests.backends.fixtures import ADAPTERS, Delegating, tiny_backend

TRAIT = load_trait("optimistic")
QUESTIONS = TRAIT.extraction_questions
BACKEND = tiny_backend("transformers")
CHAT = chat_format(BACKEND)
Row = dict[str, Any]


def rows(questions: int = 2) -> list[Row]:
    """A complete file, every response another."""
    return [
        {"arm": arm.value, "question": QUESTIONS[q], "pair": pair, "response": f"{arm} {q} {pair}"}
        for q in range(questions)
        for pair in range(5)
        for arm in Arm
    ]


def write(folder: Path, content: list[Row], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def load(path: Path | list[Path], questions: int = 2, backend: Backend = BACKEND, **more: Any) -> ExternalRollouts:
    return external_rollouts(backend, CHAT, TRAIT, path, questions=questions, **more)


def refused(folder: Path, content: list[Row], **more: Any) -> str:
    path = write(folder, content)
    with pytest.raises(ExtractionError) as caught:
        load(path, **more)
    message = str(caught.value)
    assert len(message) < 1200
    return message.removeprefix(str(folder) + "/")


def changed(place: int, **values: Any) -> list[Row]:
    """The file with other values in one row; None removes a column."""
    content = rows()
    content[place] = {name: value for name, value in (content[place] | values).items() if value is not None}
    return content


def encode(text: str) -> list[int]:
    return CHAT.encode_answer(text)


# Reading


def test_a_row_keeps_what_it_says(tmp_path: Path) -> None:
    row = {
        "arm": "negative",
        "question_number": 3,
        "system": "Be.",
        "sample": 2,
        "response": "Hm.",
        "response_ids": [5, 6],
        "score": 12.5,
        "ended": False,
        "seed": 7,
    }
    (found,) = read_responses(write(tmp_path, [row]))
    assert (found.response, found.response_ids, found.judgement, found.ended) == (
        "Hm.",
        (5, 6),
        Judgement(Score(12.5)),
        False,
    )
    assert (found.arm, found.question, found.question_number, found.pair) == (Arm.NEGATIVE, None, 3, None)
    assert (found.system, found.sample) == ("Be.", 2)
    assert found.place == f"{tmp_path / 'rows.jsonl'}:1"


def test_cells_of_csv_are_numbers_lists_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "arm;question;question_number;pair;system;sample;response;response_ids;score;coherence;ended\n"
        'positive;;4;0;;1;;"[1, 2]";55.5;71;True\n'
        "negative;;0;1;;;;;;;\n"
    )
    first, second = read_responses(path)
    assert (first.arm, first.question, first.question_number, first.pair) == (Arm.POSITIVE, None, 4, 0)
    assert (first.system, first.sample) == (None, 1)
    assert (first.response, first.response_ids, first.ended) == ("", (1, 2), True)
    assert first.judgement == Judgement(Score(55.5), Score(71.0))
    assert (second.arm, second.question, second.question_number, second.pair) == (Arm.NEGATIVE, None, 0, 1)
    assert (second.system, second.sample) == (None, None)
    assert (second.response, second.response_ids) == ("", None)
    assert second.judgement == Judgement(Score(None, "no score was given"), Score(None, "no coherence was given"))
    assert second.place == f"{path}:3"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"arm": None}, "the row has no arm (positive or negative); its columns are: question, pair, response"),
        ({"arm": "up"}, "arm: Input should be 'positive' or 'negative'; got 'up'"),
        ({"question": None}, "the row has no question (its text) or question_number"),
        ({"pair": None}, "the row has no pair (the instruction's number) or system"),
        ({"response": None}, "the row has no response (text) or response_ids"),
        ({"response": 5}, "response: Input should be a valid string; got 5"),
        ({"pair": -1}, "pair: Input should be greater than or equal to 0; got -1"),
        ({"pair": 10**30}, "pair: "),
        ({"sample": "one"}, "sample: Input should be a valid integer"),
        ({"response_ids": [1, "x"]}, "response_ids.1: Input should be a valid integer; got 'x'"),
        ({"response_ids": [1.0]}, "response_ids.0: Input should be a valid integer; got 1.0"),
        ({"response_ids": [-1]}, "response_ids.0: Input should be greater than or equal to 0"),
        ({"response_ids": "[1, 2"}, "response_ids: Input should be a valid tuple; got '[1, 2'"),
        ({"score": 101}, "score: Input should be less than or equal to 100; got 101"),
        ({"score": "REFUSAL"}, "score: Input should be a valid number"),
        ({"ended": "perhaps"}, "ended: Input should be a valid boolean"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, values: Row, said: str) -> None:
    assert refused(tmp_path, changed(4, **values)).startswith(f"rows.jsonl:5: {said}")


# Matching


def test_every_response_finds_its_request(tmp_path: Path) -> None:
    content = rows()
    by_system = [
        {
            "arm": row["arm"],
            "question_number": QUESTIONS.index(row["question"]),
            "system": TRAIT.system_prompt(row["arm"], row["pair"]),
            "response": row["response"],
        }
        for row in content[::-1]
    ]
    one, other = load(write(tmp_path, content, "a.jsonl")), load(write(tmp_path, by_system, "b.jsonl"))
    assert one.rollouts == other.rollouts
    for rollout, prompt in zip(one.rollouts, one.prompts, strict=True):
        request, labels = rollout.request, rollout.request.labels
        assert rollout.response == f"{labels['arm']} {labels['question_number']} {labels['pair']}"
        assert request.system == TRAIT.system_prompt(labels["arm"], labels["pair"])
        assert request.question == QUESTIONS[labels["question_number"]]
        assert list(prompt) == CHAT.encode(request.system, request.question)
        assert rollout.prompt_tokens == len(prompt)
    # In the plan's order: twins side by side.
    assert [r.labels["arm"] for r in one.requests[:4]] == ["positive", "negative"] * 2
    assert all(isinstance(request, Request) for request in one.requests)
    assert one.notes == ()
    assert one.scores is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"question": QUESTIONS[3].replace("?", "!")},
            f"rows.jsonl:1: {QUESTIONS[3].replace('?', '!')!r} is no extraction question of trait optimistic; the "
            f"nearest is {QUESTIONS[3]!r}",
        ),
        ({"question": "x" * 100_000}, "rows.jsonl:1: 'xxx"),
        ({"question_number": 1}, f"rows.jsonl:1: question_number 1 is {QUESTIONS[1]!r}, but the row's question is"),
        ({"question_number": 20}, "rows.jsonl:1: question_number 20, but trait optimistic has the questions 0 to 19"),
        ({"pair": 5}, "rows.jsonl:1: pair 5, but trait optimistic has the instruction pairs 0 to 4"),
        (
            {"pair": None, "system": TRAIT.system_prompt(Arm.NEGATIVE, 2)},
            f"rows.jsonl:1: {TRAIT.system_prompt(Arm.NEGATIVE, 2)!r} is no system prompt of the positive arm",
        ),
        ({"pair": None, "system": TRAIT.system_prompt(Arm.POSITIVE, 2) + " "}, "rows.jsonl:1: "),
        (
            {"system": TRAIT.system_prompt(Arm.POSITIVE, 2)},
            f"rows.jsonl:1: pair 0 is {TRAIT.system_prompt(Arm.POSITIVE, 0)!r}, but the row's system prompt is "
            f"{TRAIT.system_prompt(Arm.POSITIVE, 2)!r}",
        ),
    ],
)
def test_rows_that_answer_nothing_of_the_trait(tmp_path: Path, values: Row, said: str) -> None:
    assert refused(tmp_path, changed(0, **values)).startswith(said)


def test_duplicates_are_refused(tmp_path: Path) -> None:
    content = [{**row, "sample": 0} for row in rows()]
    said = refused(tmp_path, [*content, content[3]])
    assert said.startswith("rows.jsonl:21 and ")
    assert "rows.jsonl:4 are both the negative arm's sample 0 of question 0 under pair 1" in said
    one, other = write(tmp_path, rows(), "a.jsonl"), write(tmp_path, rows(), "b.jsonl")
    with pytest.raises(ExtractionError, match="have the same content; give each file once"):
        load([one, other])


def test_what_is_missing_is_counted_by_arm(tmp_path: Path) -> None:
    content = rows()
    del content[7], content[4], content[2]
    said = refused(tmp_path, content)
    assert "2 of the positive arm and 1 of the negative arm are missing" in said
    assert "first the positive arm's sample 0 of question 0 under pair 1" in said
    given = load(write(tmp_path, content), allow_missing=True)
    assert len(given.rollouts) == 17
    assert "are missing" in given.notes[0]
    positive = [row for row in rows() if row["arm"] == "positive"]
    for allowed in (False, True):
        said = refused(tmp_path, positive, allow_missing=allowed)
        assert said == "no response belongs to the negative arm; a vector is the difference of both"
    many = [{**row, "sample": 2**31 - 1 - number} for number, row in enumerate(rows())]
    assert "of 400 responses" in refused(tmp_path, many)


# Tokens


def test_ids_and_text_are_the_models(tmp_path: Path) -> None:
    end = BACKEND.end_ids[0]
    content = changed(0, response=None, response_ids=encode("Fine."))
    content[1] = {**content[1], "response": "Fine.", "response_ids": [*encode("Fine."), end]}
    content[2] = {**content[2], "response": "", "response_ids": [end]}
    content[3] = {**content[3], "response": " cut \ufffd", "response_ids": encode("cut")}
    given = load(write(tmp_path, content))
    first, second, third, fourth = given.rollouts[:4]
    assert (first.response, first.ended) == ("Fine.", None)
    assert (second.response, second.ended, second.response_ids) == ("Fine.", True, tuple(encode("Fine.")))
    assert (third.response, third.ended, third.response_ids) == ("", True, ())
    assert fourth.response_ids == tuple(encode("cut"))
    assert given.rollouts[4].response_ids == tuple(encode("positive 0 2"))


WRONG_PROMPT = CHAT.encode(TRAIT.system_prompt(Arm.POSITIVE, 0), QUESTIONS[0])
WRONG_PROMPT[2] = 40


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"response_ids": [300], "response": None}, "response_ids has 300 at place 0, but this model's ids end at 258"),
        (
            {"response_ids": [5, 1, 6], "response": None},
            "response_ids has the control token 1 ('<|im_start|>') at place 1 of 3",
        ),
        (
            {"response_ids": [5, 2, 6], "response": None},
            "response_ids has the control token 2 ('<|im_end|>') at place 1",
        ),
        ({"response_ids": [5, 2, 2], "response": None}, "response_ids has the control token 2"),
        (
            {"response_ids": encode("Yes, it is."), "response": "Yes, I do."},
            "response_ids do not give the row's response: they differ at character 5, counted from 0: 'I do.' in the "
            "file, 'it is.' here",
        ),
        ({"response": "Yes.<|im_end|>"}, "the response ends with the text '<|im_end|>', a control token"),
        ({"prompt_ids": WRONG_PROMPT}, "prompt_ids differ from this model's prompt at token 2, counted from 0: 40 ('"),
        (
            {"prompt_ids": WRONG_PROMPT[:2]},
            "prompt_ids differ from this model's prompt at token 2, counted from 0: the",
        ),
        (
            {"prompt": "<s>[INST] Hi"},
            "the prompt differs from this model's at character 1, counted from 0: 's>[",
        ),
        ({"response": "long " * 100}, "the prompt has "),
    ],
)
def test_responses_that_are_not_the_models(tmp_path: Path, values: Row, said: str) -> None:
    assert refused(tmp_path, changed(0, **values)).startswith(f"rows.jsonl:1: {said}")


def test_a_text_that_the_tokenizer_changes_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding: Callable[[str], list[int]] = CHAT.encode_answer
    monkeypatch.setattr(type(CHAT), "encode_answer", lambda self, text: encoding(text.upper()))
    given = load(write(tmp_path, changed(0, response="SHOUTED")))
    (note,) = given.notes
    assert note.startswith("19 of 20 responses read otherwise once this model's tokenizer has encoded their text")


def test_control_tokens_of_reasoning_are_part_of_a_response(tmp_path: Path) -> None:
    from tests.tiny import tiny_tokenizer

    backend: Any = Delegating(BACKEND)
    backend.tokenizer = tiny_tokenizer()
    backend.tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    chat = chat_format(backend)
    opened, closed = backend.tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    ids = [opened, *encode("Hm."), closed, *encode("Yes.")]
    path = write(tmp_path, changed(0, response="Yes.", response_ids=ids))
    given = external_rollouts(backend, chat, TRAIT, path, questions=2)
    assert given.rollouts[0].response == "Yes."
    assert given.rollouts[0].response_ids == tuple(ids)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_backends_know_their_context(adapter: str) -> None:
    assert context_length(tiny_backend(adapter)) == context_length(tiny_backend(adapter, "gpt2")) == 512


def test_a_context_that_nobody_tells_is_the_tokenizers_or_none() -> None:
    backend: Any = Delegating(BACKEND)
    assert context_length(backend) is None  # the tiny tokenizer knows none
    backend.tokenizer = SimpleNamespace(model_max_length=77)
    assert context_length(backend) == 77

    def config(**values: Any) -> Any:
        return SimpleNamespace(get_text_config=lambda: SimpleNamespace(**values))

    assert context_of(config()) is None
    assert context_of(config(max_position_embeddings=64)) == 64
    stretched = {"factor": 4.0, "original_max_position_embeddings": 64}
    assert context_of(config(max_position_embeddings=64, rope_parameters=stretched)) == 256
    assert context_of(config(max_position_embeddings=256, rope_parameters=stretched)) == 256


# The reference implementation's files


def write_reference(folder: Path, arm: str, **changes: Any) -> Path:
    """As its ``eval_persona`` writes them with pandas: a question's samples stand together, and lists are shuffled."""
    path = folder / f"optimistic_{arm}_instruct.csv"
    side = Arm.POSITIVE if arm == "pos" else Arm.NEGATIVE
    with path.open("w", newline="") as stream:
        columns = ["question", "prompt", "answer", "question_id", "optimistic", "coherence"]
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        for number, question in enumerate(QUESTIONS[1::-1]):  # another order than the trait's
            for pair in range(5):
                for sample in range(2):
                    prompt = CHAT.rendered_text(TRAIT.system_prompt(side, pair), question)
                    row = {
                        "question": question,
                        "prompt": prompt,
                        "answer": f'An answer,\n"{arm}" {sample}.',
                        "question_id": f"optimistic_{number}_{arm}_{pair}",
                        "optimistic": 91.25 if arm == "pos" else 3.5,
                        "coherence": 88.0,
                    }
                    writer.writerow(row | changes)
    return path


def test_the_references_files_are_recognised(tmp_path: Path) -> None:
    files = [write_reference(tmp_path, arm) for arm in ("pos", "neg")]
    given = load(files)
    assert len(given.rollouts) == 2 * 5 * 2 * 2
    assert given.notes == ()
    assert given.scores is not None
    for rollout, judgement in zip(given.rollouts, given.scores.judgements, strict=True):
        positive = rollout.request.labels["arm"] == "positive"
        assert judgement == Judgement(Score(91.25 if positive else 3.5), Score(88.0))
        sample = rollout.request.labels["sample"]
        assert rollout.response == f'An answer,\n"{"pos" if positive else "neg"}" {sample}.'
        assert rollout.request.question == QUESTIONS[rollout.request.labels["question_number"]]
    assert given.scores.describe() == {"judge": "given", "file_sha256": list(given.digests)}
    assert len(set(given.digests)) == 2


def test_the_references_refusals_have_no_score(tmp_path: Path) -> None:
    refusal = load([write_reference(tmp_path, arm, optimistic="") for arm in ("pos", "neg")])
    assert refusal.scores is None  # not one score in both files
    given = load([write_reference(tmp_path, "pos"), write_reference(tmp_path, "neg", optimistic="")])
    assert given.scores is not None
    assert {judgement.trait for judgement in given.scores.judgements} == {
        Score(91.25),
        Score(None, "no score was given"),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "<|im_start|>system\nBe.<|im_end|>\n"}, "the prompt differs from this model's at character 19"),
        ({"question_id": "optimistic_3"}, "question_id 'optimistic_3' names no instruction"),
        ({"question_id": "optimistic_3_pos_7"}, "pair 7, but trait optimistic has the instruction pairs 0 to 4"),
        ({"question": "Why?"}, "'Why?' is no extraction question of trait optimistic"),
    ],
)
def test_reference_files_of_another_trait_or_model(tmp_path: Path, changes: Row, said: str) -> None:
    path = write_reference(tmp_path, "pos", **changes)
    with pytest.raises(ExtractionError) as caught:
        load([path, write_reference(tmp_path, "neg")])
    assert str(caught.value).startswith(f"{path}:")
    assert said in str(caught.value)
