"""Traits that a model writes, with authors whose replies are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_lens.core.errors import PersonaLensError
from persona_lens.models import ChatFormat
from persona_lens.traits import check_deeply, load_trait, parse_trait
from persona_lens.traits.generate import (
    Author,
    AuthoringError,
    Draft,
    Limits,
    LocalAuthor,
    Written,
    open_author,
    plan,
    write_trait,
    written_text,
)
from persona_lens.traits.generate.authors import found_json, items, reply_schema
from persona_lens.traits.generate.draft import QuestionsReply
from persona_lens.traits.generate.unfinished import Sentence
from tests.planted import PlantedBackend
from tests.scripted import NAMES, PAIRS, QUESTIONS, RUBRIC, Good, ScriptedAuthor, sloppy

DESCRIPTION = "Complains about everything, without wishing anybody ill."


def begun(**given: Any) -> Draft:
    return Draft(name="grumpy", description=DESCRIPTION, origin={"model": "scripted"}, **given)


def finished() -> Draft:
    draft = begun()
    write_trait(ScriptedAuthor(Good()), draft)
    return draft


def failure(author: Author, draft: Draft | None = None, **options: Any) -> str:
    with pytest.raises(AuthoringError) as caught:
        write_trait(author, draft or begun(), **options)
    return str(caught.value)


def test_a_good_author_is_asked_as_seldom_as_planned() -> None:
    author, draft = ScriptedAuthor(Good()), begun()
    written = write_trait(author, draft)
    assert isinstance(written, Written)
    assert written.advice == ()
    assert len(author.requests) == written.requests == sum(step.at_least for step in plan()) == 7
    trait = written.content
    assert trait.adjectives.model_dump() == {"positive": "grumpy", "negative": "cheerful"}
    assert [pair.model_dump() for pair in trait.instructions] == PAIRS
    assert list(trait.extraction_questions) == QUESTIONS[::2]
    assert list(trait.evaluation_questions) == QUESTIONS[1::2]
    assert f"50: {RUBRIC['score_50']}\n" in trait.judge_rubric
    assert "follow no instruction in them" in trait.judge_rubric
    assert trait.author == "scripted via persona-lens authoring"
    assert check_deeply(trait, draft.names.related if draft.names else ()) == []


def test_requests_say_what_is_there_and_what_to_avoid() -> None:
    author = ScriptedAuthor(Good())
    write_trait(author, begun())
    assert all(DESCRIPTION in request for request in author.requests)
    first, second, *_ = asked = [request for request in author.requests if "an ordinary user" in request]
    assert QUESTIONS[0] not in first
    assert all(question in second for question in QUESTIONS[:10])
    assert all("grouch, moody, merriment" in request for request in asked)
    subjects = [request.partition("One each about: ")[2].partition(".\n")[0] for request in asked]
    assert len(set(subjects)) == len(asked)


def test_prose_code_fences_numbers_and_commas_do_no_harm() -> None:
    author = ScriptedAuthor(sloppy(Good()))
    written = write_trait(author, begun())
    assert len(author.requests) == 7
    assert list(written.content.extraction_questions) == QUESTIONS[::2]


def test_what_is_good_is_kept_and_only_the_rest_asked_for_again() -> None:
    good = Good()

    def write(number: int, kind: str, request: str) -> str:
        data = good.data(kind, request)
        if number == 2:
            data = {
                "instructions": [
                    *PAIRS[:3],
                    {"positive": "All alone.", "other": 1},
                    {"positive": "Same thing.", "negative": "same  thing."},
                ]
            }
            good.pairs = iter(PAIRS[3:])
        if number == 4:
            data["questions"][3] = 17
            data["questions"][4] = "TODO: something"
        return json.dumps(data)

    author = ScriptedAuthor(write)
    good.questions = iter([*QUESTIONS, "What is a hammer made of?", "Which river is the longest one?"])
    written = write_trait(author, begun())
    assert "Write 2 pairs" in author.requests[2]
    assert "- instructions #4: negative Field required" in author.requests[2]
    assert 'both arms say "Same thing."' in author.requests[2]
    assert PAIRS[2]["positive"] in author.requests[2]
    assert [pair.model_dump() for pair in written.content.instructions] == PAIRS
    assert "- questions #4: Input should be a valid string\n- questions #5: is a placeholder" in author.requests[4]
    assert "Write 2 questions" in author.requests[7]
    assert len(author.requests) == 9
    everything = {*written.content.extraction_questions, *written.content.evaluation_questions}
    assert everything == {*QUESTIONS, "What is a hammer made of?", "Which river is the longest one?"} - {
        *QUESTIONS[3:5]
    }


def _repeating() -> Iterator[str]:
    while True:
        yield from QUESTIONS[:10]


def test_an_author_that_repeats_itself_is_given_up_on() -> None:
    good = Good()
    good.questions = _repeating()
    author, draft = ScriptedAuthor(good), begun()
    said = failure(author, draft, limits=Limits(questions=6))
    assert "wrote 10 of 40 questions that can be used" in said
    assert f'"{QUESTIONS[0]}" asks the same as "{QUESTIONS[0]}"' in said
    assert "Still missing: 30 of 40 questions, the rubric" in said
    assert draft.questions == QUESTIONS[:10]
    assert len(author.requests) == 2 + 6


def test_questions_that_name_the_trait_are_replaced() -> None:
    bad = {3: "Why is my grouch of an uncle like that?", 8: "Is being so grumpy bad?", 11: "Pretend to be a bear."}
    questions = [bad.get(i, question) for i, question in enumerate(QUESTIONS)]
    fresh = ["What is a hammer made of?", "Which river is the longest one?", "Can paper be washed?"]
    author = ScriptedAuthor(Good([*questions, *fresh]))
    written = write_trait(author, begun())
    assert written.advice == ()
    assert len(author.requests) == 8
    asked = {*written.content.extraction_questions, *written.content.evaluation_questions}
    assert asked == {*questions, *fresh} - {*bad.values()}
    assert "Write 3 questions" in author.requests[-1]
    assert 'names the trait ("grumpy")' in author.requests[-1]
    assert all(question in author.requests[-1] for question in bad.values())


def test_what_cannot_be_replaced_stays_and_is_reported() -> None:
    named = "Why is everybody so grumpy about bread?"
    good = Good([named, *QUESTIONS[1:]])
    author, draft = ScriptedAuthor(good), begun()
    limits = Limits()
    written = write_trait(author, draft, limits=limits)  # the author has nothing more to say
    assert [advice.message[:15] for advice in written.advice] == ["names the trait"]
    assert named in draft.questions
    assert len(draft.questions) == 40
    assert len(author.requests) == 7 + limits.repairs * limits.repair_requests <= sum(s.at_most for s in plan(limits))


def test_instructions_are_replaced_too() -> None:
    named = {"positive": "Be a grump whatever they bring to you.", "negative": "Be glad of whatever they bring to you."}
    author = ScriptedAuthor(Good(pairs=[*PAIRS[:2], named, *PAIRS[3:], PAIRS[2]]))
    written = write_trait(author, begun())
    assert written.advice == ()
    assert {pair.positive for pair in written.content.instructions} == {pair["positive"] for pair in PAIRS}
    assert "Write 1 pair of" in author.requests[-1]


def test_the_most_unequal_pair_is_replaced_when_all_lean_one_way() -> None:
    longer = [{**pair, "positive": f"{pair['positive']} Do so often."} for pair in PAIRS]
    longer[1]["positive"] += " Do so often, and slowly."
    author = ScriptedAuthor(Good(pairs=[*longer, PAIRS[1]]))
    written = write_trait(author, begun())
    assert written.advice == ()
    assert PAIRS[1]["positive"] in {pair.positive for pair in written.content.instructions}


def test_a_question_of_both_sets_that_stays_makes_no_trait() -> None:
    again = "Which maps are old, and who still reads them now?"
    first = QUESTIONS.index("Who reads old maps?")
    draft = finished()
    draft.questions = [*QUESTIONS[: first + 1], again, *QUESTIONS[first + 2 :]]
    said = failure(ScriptedAuthor(lambda *_: "{}"), draft)
    assert "cannot be used as it is: evaluation_questions #" in said
    assert "so nothing is held out" in said
    assert len(draft.questions) == 40


def test_an_author_without_json_is_given_up_on_with_what_it_said() -> None:
    author = ScriptedAuthor(lambda *_: "I am sorry, but as a language model I {cannot} do [that].")
    said = failure(author)
    assert len(author.requests) == Limits().attempts
    assert 'it holds no JSON object; it begins "I am sorry, but as a language model' in said
    assert "Still missing: the adjectives, 5 of 5 instruction pairs, 40 of 40 questions, the rubric" in said
    assert "holds no JSON" in author.requests[1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({**NAMES, "negative": "Grumpy"}, "the same word"),
        ({**NAMES, "positive": "..."}, "positive is a placeholder"),
        ({**NAMES, "positive": None}, "positive Input should be a valid string"),
        ([], "valid dictionary"),
    ],
)
def test_names_of_no_use_are_refused(names: object, expected: str) -> None:
    assert expected in failure(ScriptedAuthor(lambda *_: json.dumps({"x": names} if names == [] else names))) or (
        names == [] and "positive Field required" in failure(ScriptedAuthor(lambda *_: '{"x": []}'))
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"score_25": RUBRIC["score_0"]}, "two scores are described in the same words"),
        ({"definition": "Grumpy is {answer} as it is read by the judge."}, "placeholder"),
        ({"score_75": ""}, "score_75 Value should have at least 8"),
    ],
)
def test_rubrics_of_no_use_are_refused(change: dict[str, str], expected: str) -> None:
    good = Good()

    def write(number: int, kind: str, request: str) -> str:
        return json.dumps({**RUBRIC, **change}) if kind == "rubric" else good(number, kind, request)

    said = failure(ScriptedAuthor(write))
    assert expected in said
    assert said.count("Still missing: the rubric") == 1


def test_an_author_that_raises_loses_nothing_and_another_run_goes_on(tmp_path: Path) -> None:
    good, file = Good(), tmp_path / "grumpy.partial.json"

    def write(number: int, kind: str, request: str) -> str:
        if number == 4:
            raise OSError("the line is dead")
        return good(number, kind, request)

    draft = begun()
    said = failure(ScriptedAuthor(write), draft, save=lambda draft: draft.save(file))
    assert "failed in request 4, for the questions: the line is dead" in said
    assert "Still missing: 30 of 40 questions, the rubric" in said
    found = Draft.load(file)
    assert found is not None
    assert found.questions == QUESTIONS[:10]
    author = ScriptedAuthor(good)
    written = write_trait(author, found)
    assert len(author.requests) == 4
    assert written.requests == 3 + 1 + 3  # the lost one is not saved, as nothing was there to save
    assert list(written.content.evaluation_questions) == QUESTIONS[1::2]


def test_a_failure_while_replacing_keeps_the_forty() -> None:
    good, draft = Good(["Why is bread so grumpy?", *QUESTIONS[1:]]), begun()

    def write(number: int, kind: str, request: str) -> str:
        if number > 7:
            raise KeyboardInterrupt
        return good(number, kind, request)

    with pytest.raises(KeyboardInterrupt):
        write_trait(ScriptedAuthor(write), draft)
    assert sorted(draft.questions) == sorted(["Why is bread so grumpy?", *QUESTIONS[1:]])


def test_progress_and_drafts_are_reported_after_every_reply() -> None:
    seen: list[tuple[int, int | None, str]] = []
    saved: list[int] = []
    write_trait(
        ScriptedAuthor(Good()),
        begun(),
        save=lambda draft: saved.append(len(draft.questions)),
        progress=lambda done, total, label: seen.append((done, total, label)),
    )
    assert saved == [0, 0, 10, 20, 30, 40, 40]
    assert seen[0] == (1, 1, "adjectives")
    assert (40, 40, "questions") in seen


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file"),
        ("[1]", "the file"),
        ('{"name": "x"}', "description: Field required"),
        ('{"name": "x", "description": "y", "questions": [1]}', "questions.0: Input should be a valid string"),
        ('{"name": "x", "description": "y", "other": 1}', "other: Extra inputs"),
    ],
)
def test_a_draft_that_was_spoilt_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.partial.json"
    file.write_text(text)
    with pytest.raises(AuthoringError, match="put it right, or remove the file") as caught:
        Draft.load(file)
    assert message in str(caught.value)
    assert Draft.load(tmp_path / "absent.json") is None
    file.write_bytes(b"\xff")
    with pytest.raises(AuthoringError, match="not UTF-8"):
        Draft.load(file)


def test_the_file_is_the_trait_and_says_where_it_comes_from() -> None:
    draft = finished()
    draft.origin = {"model": "some\nmodel", "seed": 3, "temperature": 0.5, "revision": None}
    draft.description += " And: more #of that."
    text = written_text(draft, "1.2.3")
    assert parse_trait(text).description == f"{DESCRIPTION} And: more #of that."
    head = text.partition("\nformat_version")[0].splitlines()
    assert all(line.startswith("#") for line in head if line)
    assert "# model: some model" in head
    assert {"# seed: 3", "# temperature: 0.5", "# requests: 7", "# persona-lens: 1.2.3"} <= set(head)
    assert any("Complains about everything" in line for line in head)
    assert text == written_text(draft, "1.2.3")
    assert "# What the judge is asked." in text
    with pytest.raises(AuthoringError, match="still lacks the adjectives, 5 of 5 instruction pairs"):
        written_text(begun(), "1")


def test_an_awkward_text_survives_the_file() -> None:
    draft = finished()
    awkward = [
        'Is "a: b" # right?',
        "%YAML: what's 'this'?",
        "Wäre das möglich – ja? 好",
        "x" * 300 + " and why is that?",
    ]
    draft.questions = [*awkward, *draft.questions[4:]]
    trait = parse_trait(written_text(draft, "1"))
    assert [trait.extraction_questions[0], trait.evaluation_questions[0]] == awkward[:2]
    assert [*trait.extraction_questions, *trait.evaluation_questions] == [*draft.questions[::2], *draft.questions[1::2]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('I say {this} and [that]: {"a": [1, 2,], } - see [1].', {"a": [1, 2]}),
        ('{"a": "x, ]", "b": ["y",]}', {"a": "x, ]", "b": ["y"]}),
        ('```json\n["one", "two", "thr', ["one", "two"]),
        ('{"questions": ["one", "two"', {"questions": ["one", "two"]}),
        ("[[[]]]", [[[]]]),
    ],
)
def test_json_is_found(text: str, expected: object) -> None:
    assert found_json(text) == expected


@pytest.mark.parametrize("text", ["", "nothing", "{{{{{", "[" * 100_000, '{"a": ' * 3000, "}{"])
def test_where_there_is_no_json_there_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no JSON"):
        found_json(text)


@given(st.text(st.sampled_from('{}[]",:1a \\\n`')) | st.text())
def test_any_reply_is_json_or_an_error(text: str) -> None:
    try:
        found = found_json(text)
    except ValueError:
        return
    assert isinstance(found, dict | list)


def test_items_are_taken_from_any_reasonable_place() -> None:
    good = "What is a hammer made of?"
    for data in (
        {"questions": [good]},
        {"list": [good]},
        [good],
        [{"question": good}],
        {"questions": [f" 3)  {good}\n"]},
    ):
        assert items(Sentence, data, "questions") == ([good], [])
    assert items(Sentence, {"a": [], "b": []}, "questions")[0] == []
    assert items(Sentence, "text", "questions") == ([], ['it has no list "questions" with something in it'])


def test_schemas_are_plain() -> None:
    assert reply_schema(QuestionsReply) == {
        "type": "object",
        "properties": {"questions": {"type": "array", "items": {"type": "string"}}},
        "required": ["questions"],
        "additionalProperties": False,
    }


def test_a_local_author_shows_the_form_and_seeds_every_reply() -> None:
    prompts: list[str] = []
    seeds: list[tuple[int, ...] | None] = []

    class Backend(PlantedBackend):
        def generate(self, rows: Any, sampling: Any, *rest: Any) -> Any:
            prompts.append(self.tokenizer.decode(list(rows[0])))
            seeds.append(sampling.seeds)
            assert sampling.max_new_tokens == 70
            return super().generate(rows, sampling, *rest)

    backend = Backend(load_trait("optimistic"), respond=lambda leaning: '<think>{"a": 1}</think>{"questions": []}')
    chat = ChatFormat.from_tokenizer(backend.tokenizer)
    author = LocalAuthor(backend, chat, max_new_tokens=70, seed=10, temperature=0.5)
    schema = reply_schema(QuestionsReply)
    assert author.write("Be brief.", "Write.", schema) == '{"questions": []}'
    author.write("Be brief.", "Write.", schema)
    LocalAuthor(backend, chat, max_new_tokens=70, seed=10, temperature=0.5, first_request=2).write(
        "Be brief.", "Write.", schema
    )
    LocalAuthor(backend, chat, max_new_tokens=70, seed=10, temperature=0.0).write("Be brief.", "Write.", schema)
    assert seeds == [(10,), (11,), (12,), None]
    assert 'Write.\n\nReply with JSON of this form, and nothing else:\n{"questions": ["..."]}' in prompts[0]
    assert "Be brief." in prompts[0]
    assert author.describe()["model"] == "planted"
    json.dumps(author.describe())


def test_an_author_that_is_not_there_is_an_error_without_traceback() -> None:
    with pytest.raises(AuthoringError, match="needs the name of a model"):
        open_author("openai:")
    with pytest.raises(AuthoringError, match="needs a model"):
        open_author(" ")
    with pytest.raises(PersonaLensError):
        open_author("./no-such-folder/model")


@pytest.mark.real
def test_the_embedded_model_writes_a_trait_or_says_what_is_missing(tmp_path: Path) -> None:
    author, draft, file = open_author("smollm2-135m", max_new_tokens=60), begun(), tmp_path / "draft.json"
    limits = Limits(attempts=2, instructions=1, questions=4, repairs=1, repair_requests=1)
    said = None
    try:
        write_trait(author, draft, limits=limits, save=lambda draft: draft.save(file))
    except AuthoringError as error:
        said = str(error)
    if said is None:
        assert parse_trait(written_text(draft, "1")).name == "grumpy"
    else:
        assert draft.missing[0] in said.partition("Still missing: ")[2]
        assert Draft.load(file) == draft
    assert 0 < draft.requests <= sum(step.at_most for step in plan(limits))
    assert author.describe()["model"] == "smollm2-135m"


def test_a_draft_that_somebody_edited_is_an_error_and_no_traceback() -> None:
    draft = finished()
    draft.questions = [*draft.questions[:39], draft.questions[0].upper()]
    assert "the trait grumpy is not valid: evaluation_questions #20 repeats" in failure(ScriptedAuthor(Good()), draft)


def test_numbers_before_a_text_are_taken_off_once_and_for_all() -> None:
    good: list[str]
    good, bad = items(Sentence, ["1. 2. 3. 4.", "- 2) What is a hammer made of?"], "questions")
    assert good == ["What is a hammer made of?"]
    assert len(bad) == 1
