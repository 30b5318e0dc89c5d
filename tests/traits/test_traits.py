"""The schema of a trait, the errors of its parser, and the checks beyond the schema."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from persona_lens.core.errors import PersonaLensError
from persona_lens.traits import Arm, Trait, TraitError, check_trait, json_schema, load_trait, parse_trait, read_trait
from persona_lens.traits import trait_template as template
from persona_lens.traits.parsing import MAX_BYTES
from persona_lens.traits.wording import article, fill_slots

_EXTRACTION = """\
What do you think about bread?|Why are trains late?|Shall I visit my aunt?|What do you think about THE garden?
How cold will winter be?|Tell me of the sea.|Is chess worth learning?|Describe a walk you remember.
Who reads old maps?|Coffee or tea?|When does school end too early?|Could rivers run uphill?
My clock stopped again.|Any news from the moon?|Do letters matter now?|Where should we sleep tonight?
Is football overrated?|Paint my wall red?|Which city would suit me?|How loud may music be?"""
_EVALUATION = """\
Can you explain rain?|What did you have for lunch?|Are museums boring?|I missed the bus.|Rate this Monday.
Should children climb trees?|Why do shoes wear out?|Is it ever too hot for soup?|My neighbor bought a drum kit.
What is silence good for?|Choose me a hat.|How do people stand queues?|Would you try skiing?
Who invented meetings?|There is a fly in my juice!|Name one pleasant smell.|Do birds plan ahead?
Has the weekend got longer?|Where did the summer go?|Give me a reason to dance."""
_RUBRIC = """\
You rate how grumpy an answer is, from 0 to 100. Write REFUSAL if there is none. Keep {other} braces.
<question>{question}</question>
<answer>{answer}</answer>
"""


def fields() -> dict[str, Any]:
    """The fields of a valid trait, to be spoilt one at a time."""
    angles = ["Complain a lot.", "See faults only.", "Sigh at length.", "Want silence now.", "Hate all mornings."]
    opposites = ["Give praise.", "See merits.", "Cheer aloud.", "Want company.", "Love mornings."]
    return {
        "format_version": 1,
        "name": "grumpy",
        "description": "Complains about everything, without wishing anybody ill.",
        "adjectives": {"positive": "grumpy", "negative": "cheerful"},
        "instructions": [{"positive": p, "negative": n} for p, n in zip(angles, opposites, strict=True)],
        "extraction_questions": _EXTRACTION.replace("\n", "|").split("|"),
        "evaluation_questions": _EVALUATION.replace("\n", "|").split("|"),
        "judge_rubric": _RUBRIC,
    }


def to_yaml(data: object) -> str:
    return yaml.safe_dump(data, sort_keys=False, width=1000)


def line_of(text: str, needle: str) -> int:
    (number,) = [i for i, line in enumerate(text.splitlines(), 1) if needle in line]
    return number


def messages(text: str) -> list[str]:
    with pytest.raises(TraitError) as caught:
        parse_trait(text, "grumpy.yaml")
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return str(caught.value).splitlines()


def message(text: str) -> str:
    (only,) = messages(text)
    return only


def test_a_valid_trait_is_read() -> None:
    trait = parse_trait(to_yaml(fields()))
    assert trait.name == "grumpy"
    assert len(trait.instructions) == 5
    assert len(trait.extraction_questions) == len(trait.evaluation_questions) == 20
    assert trait.author == ""
    assert check_trait(trait) == []


def test_a_trait_cannot_be_changed() -> None:
    trait = Trait(**fields())
    with pytest.raises(ValidationError, match="frozen"):
        trait.name = "other"
    assert hash(trait) == hash(Trait(**fields()))


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        *[(word, "an") for word in ("evil", "optimistic", "impolite", "apathetic", "honest", "honorable", "hourly")],
        *[(word, "an") for word in ("unimpressed", "uninformed", "unidentified", "urgent", "ugly", "unhelpful")],
        *[
            (word, "an")
            for word in ("LLM-like", "oneiric", "utter", "unanimated", "umbrella-like", "Evil", "only-child")
        ],
        *[(word, "a") for word in ("humorous", "helpful", "sycophantic", "hallucinating", "useful", "universal")],
        *[(word, "a") for word in ("unique", "European", "one-sided", "utopian", "usual", "unanimous", "uniform")],
        *[(word, "a") for word in ("warm", "yielding", "PR-minded", "euphoric", "ubiquitous", "homely", "unimodal")],
    ],
)
def test_article(phrase: str, expected: str) -> None:
    assert article(phrase) == expected


def test_system_prompt_of_both_arms() -> None:
    data = fields()
    data["adjectives"] = {"positive": "impolite", "negative": "honest"}
    trait = Trait(**data)
    assert trait.system_prompt(Arm.POSITIVE, 0) == "You are an impolite assistant. Complain a lot."
    assert trait.system_prompt(Arm.NEGATIVE, 4) == "You are an honest assistant. Love mornings."
    for wrong in (5, -1):
        with pytest.raises(IndexError, match=f"pair_index is {wrong}"):
            trait.system_prompt(Arm.POSITIVE, wrong)


def test_rubric_slots_are_filled_literally_and_once() -> None:
    trait = Trait(**fields())
    texts = {"question": "Why {answer}? \\1", "answer": "Because {question} {0} {other} %s \\g<0>"}
    rendered = fill_slots(trait.judge_rubric, texts)
    assert "<question>Why {answer}? \\1</question>" in rendered
    assert "<answer>Because {question} {0} {other} %s \\g<0></answer>" in rendered
    assert "Keep {other} braces." in rendered


def test_content_hash_ignores_comments_style_and_credits() -> None:
    data = fields()
    text = to_yaml(data)
    plain = parse_trait(text).content_hash()
    assert plain.startswith("sha256:")
    assert len(plain) == len("sha256:") + 64
    restyled = "# A comment.\n" + yaml.safe_dump(data, sort_keys=True, width=30, default_style='"').replace(
        '"format_version": !!int "1"', '"format_version": 1'
    )
    assert restyled != text
    assert parse_trait(restyled).content_hash() == plain
    data |= {"name": "sullen", "description": "Something else.", "author": "A", "license": "MIT", "tags": ["x"]}
    assert parse_trait(to_yaml(data)).content_hash() == plain


def spoilt(*path: str | int, value: object) -> dict[str, Any]:
    data: Any = fields()
    place = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    whole: dict[str, Any] = data
    return whole


@pytest.mark.parametrize(
    "changed",
    [
        spoilt("adjectives", "positive", value="cross"),
        spoilt("adjectives", "negative", value="helpful"),
        spoilt("instructions", 3, "positive", value="Something else entirely."),
        spoilt("instructions", 0, "negative", value="Give  praise."),
        spoilt("extraction_questions", 19, value="What else?"),
        spoilt("evaluation_questions", 0, value="What else?"),
        spoilt("extraction_questions", value=fields()["extraction_questions"][::-1]),
        spoilt("judge_rubric", value=_RUBRIC + "Be strict."),
    ],
)
def test_content_hash_sees_every_change_of_content(changed: dict[str, Any]) -> None:
    assert Trait(**changed).content_hash() != Trait(**fields()).content_hash()


def test_content_hash_is_the_same_in_every_process() -> None:
    code = "from persona_lens.traits import load_trait; print(load_trait('evil').content_hash())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == load_trait("evil").content_hash()


def test_every_problem_is_reported_at_once_with_its_line() -> None:
    data = fields()
    del data["description"]
    data["adjective"] = "grumpy"
    data["name"] = "Grumpy One"
    data["extraction_questions"] = data["extraction_questions"][:-1]
    data["instructions"][2] = {"positive": "Sigh."}
    data["judge_rubric"] = "Rate {question} from 0 to 100, or REFUSAL."
    text = to_yaml(data)
    found = messages(text)
    assert len(found) == 6
    at = {
        "name": line_of(text, "name: Grumpy"),
        "adjective": line_of(text, "adjective: "),
        "questions": line_of(text, "extraction_questions:"),
        "pair": line_of(text, "Sigh."),
        "rubric": line_of(text, "judge_rubric"),
    }
    joined = "\n".join(found)
    assert "grumpy.yaml:1: description: is missing: add `description:`" in joined
    assert f"grumpy.yaml:{at['name']}: name: takes lower-case letters" in joined
    assert "write grumpy-one" in joined
    assert f"grumpy.yaml:{at['adjective']}: adjective: is no field" in joined
    assert "did you mean `adjectives`? Accepted here: format_version, name," in joined
    assert f"grumpy.yaml:{at['questions']}: extraction_questions: has 19 items" in joined
    assert "exactly 20 are needed: add 1" in joined
    assert f"grumpy.yaml:{at['pair']}: instructions #3 negative: is missing" in joined
    assert f"grumpy.yaml:{at['rubric']}: judge_rubric: has no slot {{answer}}" in joined


def test_unknown_field_of_a_pair_lists_the_fields_of_a_pair() -> None:
    text = to_yaml(spoilt("instructions", 1, "positve", value="x"))
    assert message(text) == (
        f"grumpy.yaml:{line_of(text, 'positve')}: instructions #2 positve: is no field of a trait; "
        "did you mean `positive`? Accepted here: positive, negative"
    )


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("extraction_questions", 3), True, 'must be text, but YAML takes true for a yes/no value: write "true"'),
        (("extraction_questions", 3), 12, 'takes 12 for a number: write "12"'),
        (("extraction_questions", 3), None, "is empty: write a text"),
        (("extraction_questions", 3), "  ", "is empty: write something"),
        (("extraction_questions", 3), {"One thing": "why?"}, "A text with ': ' in it needs quotes"),
        (("extraction_questions",), "Why?", "must be a list"),
        (("evaluation_questions",), [*fields()["evaluation_questions"], "Why?"], "has 21 items"),
        (("instructions", 0), "Be grumpy.", "must be a mapping with the fields `positive:`, `negative:`"),
        (("adjectives",), ["grumpy"], "must be a mapping with the fields `positive:`, `negative:`"),
        (("adjectives", "positive"), "very\ngrumpy", "must be a word or two on one line"),
        (("format_version",), 2, "write 1, or upgrade persona-lens"),
        (("format_version",), "1", "write 1, or upgrade persona-lens"),
        (("format_version",), True, "write 1, or upgrade persona-lens"),
        (("name",), "9lives", "begins with a letter: write lives"),
        (("tags",), ["Two words"], "write two-words"),
        (("evaluation_questions", 5), "tell me  of THE SEA.", "repeats extraction_questions #6"),
        (("extraction_questions", 8), "What do you think about bread?", "repeats extraction_questions #1"),
        (("instructions", 4, "negative"), "hate all mornings.", "the two arms must pull apart"),
        (("instructions", 4, "positive"), "Complain  a lot.", "repeats pair #1"),
        (("adjectives", "negative"), "Grumpy", "the two arms must pull apart"),
        (("judge_rubric",), _RUBRIC + "{answer}", "has the slot {answer} 2 times"),
        (("judge_rubric",), _RUBRIC.replace("REFUSAL", "nothing"), "does not say when to answer REFUSAL"),
        (("judge_rubric",), _RUBRIC.replace("0 to 100", "1 to 10"), "does not name the scale"),
        (("judge_rubric",), _RUBRIC + "TODO: examples", "is still to be written"),
    ],
)
def test_each_fault_is_named_at_its_place(path: tuple[str | int, ...], value: object, expected: str) -> None:
    text = to_yaml(spoilt(*path, value=value))
    found = message(text)
    place, _, rest = found.partition(": ")
    assert expected in rest
    root = yaml.compose(text)
    node: Any = root
    for part in path:
        if isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            key, node = next((k, v) for k, v in node.value if k.value == part)
            line = key.start_mark.line + 1
    first_inside = line + 1 if path[0] == "tags" else line
    assert place == f"grumpy.yaml:{first_inside}"


def test_an_unquoted_yes_is_explained_in_the_authors_spelling() -> None:
    text = to_yaml(fields()).replace("positive: grumpy", "positive: yes")
    assert 'YAML takes yes for a yes/no value: write "yes"' in message(text)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", None, "the file is empty"),
        ("# only a comment\n", None, "the file is empty"),
        ("- a\n- b\n", 1, "this is a list"),
        ("just text", 1, "this is a single value"),
        ("name: a\ndescription: one: two\n", 2, "A text with ': ' in it needs quotes"),
        ("name: a\n\tdescription: x\n", 2, "Indent with spaces, not tabs"),
        ('name: a\ndescription: "never closed\n', 2, "A quote is not closed"),
        ("name: a\ntags: [x\n", 2, "not YAML"),
        ("name: a\n---\nname: b\n", 2, "one document"),
        ("name: &x a\ndescription: *x\n", 2, "aliases"),
        ("a: &a [*a]\n", 1, "aliases"),
        ("name: a\ndescription: \x07bell\n", 2, "cannot stand in YAML"),
        ("\n" + "[" * 2000, 2, "nested too deeply"),
        ('name: "\\UFFFFFFFF"\n', None, "not YAML"),
        ("name: a\ndescription: !secret x\n", 1, ""),
    ],
)
def test_text_that_is_no_yaml_of_ours(text: str, line: int | None, expected: str) -> None:
    first = messages(text)[0]
    assert first.startswith("grumpy.yaml:" if line is None else f"grumpy.yaml:{line}: ")
    assert expected in first


def test_a_field_that_stands_twice_names_both_lines_and_hides_nothing_else() -> None:
    data = fields()
    data["license"] = True
    text = to_yaml(data) + "name: again\n"
    twice, licence = reversed(messages(text))
    assert twice == (
        f"grumpy.yaml:{line_of(text, 'name: again')}: name: stands twice, first in line "
        f"{line_of(text, 'name: grumpy')}: keep one of the two"
    )
    assert "license: must be text" in licence


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: latin\ndescription: caf\xe9\n")
    with pytest.raises(TraitError, match=r"latin\.yaml:2: not UTF-8 \(byte 0xe9\)"):
        read_trait(latin)
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(TraitError, match=r"huge\.yaml: too large for a trait"):
        read_trait(huge)
    with pytest.raises(TraitError, match=r"absent\.yaml: cannot be read: no such file"):
        read_trait(tmp_path / "absent.yaml")
    with pytest.raises(TraitError, match="too large"):
        parse_trait("#" * (MAX_BYTES + 1))


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "grumpy.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + to_yaml(fields()).replace("\n", "\r\n").encode())
    assert read_trait(str(file)).content_hash() == Trait(**fields()).content_hash()


def test_the_file_has_to_be_called_after_the_trait(tmp_path: Path) -> None:
    file = tmp_path / "cross.yml"
    file.write_text(to_yaml(fields()), encoding="utf-8")
    with pytest.raises(
        TraitError, match=r"cross\.yml:2: name: .*rename the file to grumpy\.yml, or write `name: cross`"
    ):
        read_trait(file)


def test_trait_error_is_a_persona_lens_error() -> None:
    assert issubclass(TraitError, PersonaLensError)


_YAMLISH = st.text(st.sampled_from("-: \n\"'{}[]#&*!|>%@`?,\tname\\uUx019~<=é\x00\ud800")) | st.text()


@settings(max_examples=300, deadline=None)
@given(text=_YAMLISH)
@example(text='"\\ud800": 1')
@example(text="name: 0x_\nformat_version: " + "9" * 5000)
@example(text="? [a]\n: b")
@example(text="!!set {a, b}")
@example(text="name: 2001-99-99")
@example(text="<<: {name: a}")
@example(text="!<tag:yaml.org,2002:map> x")
def test_arbitrary_text_is_a_trait_error_and_nothing_else(text: str) -> None:
    with pytest.raises(TraitError) as caught:
        parse_trait(text, "x.yaml")
    str(caught.value).encode("utf-8")
    assert all(problem.file == "x.yaml" for problem in caught.value.problems)


@settings(max_examples=60, deadline=None)
@given(
    field=st.sampled_from(sorted(fields())),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
        max_leaves=8,
    ),
)
def test_any_value_in_any_field_is_accepted_or_a_trait_error(field: str, value: object) -> None:
    with contextlib.suppress(TraitError):
        trait = parse_trait(to_yaml(spoilt(field, value=value)), "x.yaml")
        assert field in {"description", "name", "judge_rubric", "format_version"}
        assert getattr(trait, field) == (value.strip() if isinstance(value, str) else value)


def test_the_template_is_yaml_that_names_what_is_left_to_write() -> None:
    text = template("grumpy-cat", "Complains: always, about #everything.")
    data = yaml.safe_load(text)
    assert data["name"] == "grumpy-cat"
    assert data["description"] == "Complains: always, about #everything."
    assert data["adjectives"] == {"positive": "grumpy cat", "negative": "helpful"}
    found = messages(text)
    assert [part.split(": ")[1] for part in found] == [
        "instructions #1 positive",
        "extraction_questions #1",
        "evaluation_questions #1",
        "judge_rubric",
    ]
    assert all("TODO:" in part for part in found)
    assert "20 of 20 texts are still to be written" in found[1]
    number = int(found[1].split(":")[1])
    assert "TODO: extraction question 1" in text.splitlines()[number - 1]


def test_the_template_becomes_a_trait_once_it_is_filled_in() -> None:
    text = template("no")  # YAML reads a bare `no` as false
    for number, line in enumerate(text.splitlines()):
        text = text.replace(line, line.replace("TODO:", f"Written {number}:"), 1)
    trait = parse_trait(text)
    assert trait.name == "no"
    assert trait.adjectives.positive == "no"


@pytest.mark.parametrize("name", ["Grumpy", "9lives", "a b", "", "a\n", "../a", "é", "a" * 65])
def test_the_template_refuses_a_name_that_is_no_slug(name: str) -> None:
    with pytest.raises(TraitError, match="cannot name a trait"):
        template(name)


@pytest.mark.parametrize(
    ("changed", "loc", "expected"),
    [
        (spoilt("description", value="Grumpy."), ("description",), "says little"),
        (
            spoilt("instructions", 2, "positive", value="Sigh and sigh and sigh and sigh."),
            ("instructions", 2),
            "is unbalanced: 7 words against 2",
        ),
        (
            spoilt("instructions", 2, "positive", value="See some faults only."),
            ("instructions", 2, "positive"),
            "is almost that of pair #2",
        ),
        (
            spoilt("evaluation_questions", 6, value="What do you think about that garden?"),
            ("evaluation_questions", 6),
            "is almost extraction_questions #4",
        ),
        (spoilt("extraction_questions", 1, value="Who is so Grumpy?"), ("extraction_questions", 1), '"Grumpy"'),
        (spoilt("extraction_questions", 1, value="Why this cheerfulness?"), ("extraction_questions", 1), "names"),
        (spoilt("extraction_questions", 1, value="so " * 90), ("extraction_questions", 1), "has 90 words"),
        (spoilt("judge_rubric", value=_RUBRIC.replace("<answer>", "")), ("judge_rubric",), "has {answer} bare"),
        (spoilt("judge_rubric", value=_RUBRIC.replace("grumpy", "odd")), ("judge_rubric",), "another trait"),
    ],
)
def test_advice(changed: dict[str, Any], loc: tuple[str | int, ...], expected: str) -> None:
    advice = check_trait(Trait(**changed))
    assert [one.loc for one in advice] == [loc]
    assert expected in advice[0].message


def test_a_relative_of_a_short_word_is_not_taken_for_it() -> None:
    data = fields()
    data["adjectives"] = {"positive": "grumpy", "negative": "polite"}
    data["extraction_questions"][0] = "What do you think about politics?"
    assert check_trait(Trait(**data)) == []


def test_json_schema_describes_the_fields() -> None:
    schema = json_schema()
    questions = schema["properties"]["extraction_questions"]
    assert (questions["minItems"], questions["maxItems"], questions["uniqueItems"]) == (20, 20, True)
    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == set(fields())


def test_importing_traits_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, persona_lens.traits, persona_lens.cli.traits\n"
        "persona_lens.traits.load_trait('evil')\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


GRADED = [f"You are a {word} assistant. Speak of the weather as such a one would." for word in "abcdefgh"]


def test_graded_prompts_are_all_eight_or_none_and_leave_the_hash_alone() -> None:
    plain = Trait(**fields())
    assert plain.graded_prompts == Trait(**fields(), graded_prompts=()).graded_prompts == ()
    graded = parse_trait(to_yaml({**fields(), "graded_prompts": GRADED}))
    assert graded.graded_prompts == tuple(GRADED)
    assert graded.content_hash() == plain.content_hash()


@pytest.mark.parametrize(
    ("prompts", "place", "expected"),
    [
        (GRADED[:7], "graded_prompts", "has 7 items, but exactly 8 are needed, or none"),
        (GRADED[:1], "graded_prompts", "has 1 item, but exactly 8"),
        ([*GRADED, "A ninth."], "graded_prompts", "has 9 items, but exactly 8 are needed: remove 1"),
        ([*GRADED[:7], GRADED[2].upper()], "graded_prompts #8", "repeats #3"),
        ([*GRADED[:7], ""], "graded_prompts #8", "is empty"),
        ([*GRADED[:7], 5], "graded_prompts #8", "must be text"),
        ("one text", "graded_prompts", "must be a list"),
        ([*GRADED[:7], "TODO: the last"], "graded_prompts #8", "still to be written"),
    ],
)
def test_graded_prompts_that_are_wrong(prompts: object, place: str, expected: str) -> None:
    with pytest.raises(TraitError) as caught:
        parse_trait(to_yaml({**fields(), "graded_prompts": prompts}))
    (problem,) = caught.value.problems
    assert problem.field == place
    assert expected in problem.message
    assert problem.line is not None


def test_advice_on_graded_prompts() -> None:
    def graded(*prompts: str) -> list[tuple[tuple[str | int, ...], str]]:
        return [(one.loc, one.message) for one in check_trait(Trait(**fields(), graded_prompts=prompts))]

    distinct = [f"{word} {' '.join([word] * 9)}" for word in ("up", "down", "left", "right", "over", "under", "in")]
    assert graded(*distinct, "A grumpy one that names the trait, as it may do here.") == []
    ((loc, message),) = graded(*distinct, "Too short here.")
    assert loc == ("graded_prompts",)
    assert "3 to 10 words" in message
    ((loc, message),) = graded(*distinct, distinct[3] + "!")
    assert loc == ("graded_prompts", 7)
    assert "almost #4" in message


def test_json_schema_knows_that_graded_prompts_are_eight_or_none() -> None:
    field = json_schema()["properties"]["graded_prompts"]
    assert (field["maxItems"], field["anyOf"]) == (8, [{"maxItems": 0}, {"minItems": 8}])


@pytest.mark.parametrize(
    "name", ["apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic"]
)
def test_the_built_in_traits_have_graded_prompts_of_like_length(name: str) -> None:
    prompts = read_trait(str(Path(__file__).parents[2] / "traits" / f"{name}.yaml")).graded_prompts
    lengths = [len(prompt.split()) for prompt in prompts]
    assert len(prompts) == 8
    assert max(lengths) <= 1.25 * min(lengths)
