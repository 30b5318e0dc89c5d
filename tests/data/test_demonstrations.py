"""The demonstration sets: what they hold, and that nothing but the trait tells their levels apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product
from statistics import mean

import pytest

from persona_lens.data.datasets import open_dataset
from persona_lens.data.sources import (
    DemonstrationRow,
    Level,
    demonstration,
    demonstration_names,
    demonstration_path,
)
from persona_lens.data.tables import DataError
from persona_lens.traits import load_trait
from persona_lens.traits.checks import MAX_OVERLAP, family, names, questions
from persona_lens.traits.wording import content_words, overlaps, shared_run, words

TRAITS = ("impolite", "optimistic")
N_PROMPTS = 64
MIN_WORDS, MAX_WORDS = 25, 60
RUN_WORDS = 6
"""A run of words that two replies of one level share: so long, it would be a phrase of the author's."""

COLLOQUIAL = re.compile(r"[?]|\w'(?:ll|re|ve|d|m|t)\b|\b(?:it|that|what|there|here|he|she|let)'s\b", re.IGNORECASE)
"""Marks of speech: a question, and what is contracted. An exclamation is enthusiasm, which belongs to the trait."""

each_trait = pytest.mark.parametrize("trait", TRAITS)
each_level = pytest.mark.parametrize("level", Level)


def _prompts(trait: str) -> list[str]:
    return [row.prompt for row in demonstration(trait, Level.NORMAL)]


def _lengths(trait: str, level: Level) -> list[int]:
    return [len(row.response.split()) for row in demonstration(trait, level)]


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def _higher(ones: list[int], others: list[int]) -> float:
    """The area under the ROC curve: how often one of the second list exceeds one of the first."""
    return mean((other > one) + (other == one) / 2 for one, other in product(ones, others))


def test_there_is_a_set_for_each_of_two_traits() -> None:
    assert demonstration_names() == TRAITS


@each_trait
def test_a_set_has_every_prompt_at_every_level_once(trait: str) -> None:
    rows = demonstration(trait)
    assert len(rows) == N_PROMPTS * len(Level)
    assert [row.level for row in rows] == list(Level) * N_PROMPTS
    for level in Level:
        chosen = demonstration(trait, level)
        assert chosen == tuple(row for row in rows if row.level is level)
        assert [row.prompt for row in chosen] == _prompts(trait)
        assert [row.id for row in chosen] == [f"{trait}-{n:03d}-{level}" for n in range(1, N_PROMPTS + 1)]
    assert {row.trait for row in rows} == {trait}


def test_no_text_occurs_twice() -> None:
    prompts = [prompt for trait in TRAITS for prompt in _prompts(trait)]
    assert len(set(prompts)) == len(prompts)
    rows = [row for trait in TRAITS for row in demonstration(trait)]
    assert len({row.id for row in rows}) == len({row.response for row in rows}) == len(rows)
    # "No." may open two answers, and "Dear Mr." two letters.
    sentences = Counter(s for row in rows for s in _sentences(row.response) if len(s.split()) > 2)
    assert [sentence for sentence, count in sentences.items() if count > 1] == []


def test_texts_are_clean() -> None:
    for trait in TRAITS:
        for row in demonstration(trait):
            for text in (row.prompt, row.response):
                assert text == " ".join(text.split())
                assert text.isprintable()
                assert text[-1] in '.?!"'


@each_trait
def test_prompts_are_not_the_questions_of_the_trait_nor_near_them(trait: str) -> None:
    prompts = _prompts(trait)
    asked = [question for _, question in questions(load_trait(trait))]
    assert len(asked) == 40
    for i, j, likeness in overlaps([*prompts, *asked]):
        assert i >= N_PROMPTS or likeness < MAX_OVERLAP, (prompts[i], [*prompts, *asked][j])
    for prompt, question in product(prompts, asked):
        shared = shared_run(prompt, question)
        assert len(content_words(shared)) < 3, (prompt, question)


@each_trait
def test_no_text_names_the_trait(trait: str) -> None:
    patterns = [family(word) for word in names(load_trait(trait))]
    for row in demonstration(trait):
        assert not [p.pattern for p in patterns if p.search(f"{row.prompt} {row.response}")], row


@each_trait
def test_length_does_not_tell_the_level(trait: str) -> None:
    lengths = {level: _lengths(trait, level) for level in Level}
    assert all(MIN_WORDS <= length <= MAX_WORDS for of_level in lengths.values() for length in of_level)
    means = [mean(of_level) for of_level in lengths.values()]
    assert max(means) <= 1.05 * min(means)
    for one, other in ((Level.NORMAL, Level.MILD), (Level.MILD, Level.STRONG), (Level.NORMAL, Level.STRONG)):
        assert 0.4 <= _higher(lengths[one], lengths[other]) <= 0.6, (one, other)


def test_register_does_not_tell_how_optimistic_a_reply_is() -> None:
    """All levels are in an assistant's sentences; a rude reply, in contrast, is rude by its register too."""
    replies = {level: [row.response for row in demonstration("optimistic", level)] for level in Level}
    assert [reply for of_level in replies.values() for reply in of_level if COLLOQUIAL.search(reply)] == []
    word_letters = [mean(len(word) for reply in of_level for word in words(reply)) for of_level in replies.values()]
    sentence_words = [
        mean(len(sentence.split()) for reply in of_level for sentence in _sentences(reply))
        for of_level in replies.values()
    ]
    for means in (word_letters, sentence_words):
        assert max(means) <= 1.08 * min(means)


@each_trait
@each_level
def test_replies_of_a_level_share_no_phrases(trait: str, level: Level) -> None:
    replies = [words(row.response) for row in demonstration(trait, level)]
    assert max(Counter(tuple(reply[:3]) for reply in replies).values()) <= 3
    runs = Counter(
        run for reply in replies for run in {tuple(reply[i : i + RUN_WORDS]) for i in range(len(reply) - RUN_WORDS + 1)}
    )
    assert [run for run, count in runs.items() if count > 1] == []


@each_trait
def test_no_word_is_the_mark_of_a_level(trait: str) -> None:
    """A word of some meaning that stood in many replies of one level only would be read in the trait's place."""
    having = {
        level: Counter(w for row in demonstration(trait, level) for w in set(content_words(row.response)))
        for level in Level
    }
    for one, other in product(Level, Level):
        excess = having[one] - having[other]
        assert max(excess.values(), default=0) <= N_PROMPTS / 4, (one, other, excess.most_common(3))


@each_trait
def test_the_file_is_its_rows(trait: str) -> None:
    text = demonstration_path(trait).read_bytes().decode()
    assert text.splitlines() == [json.dumps(row.to_json(), ensure_ascii=False) for row in demonstration(trait)]
    first = json.loads(text.splitlines()[0])
    assert list(first) == ["id", "trait", "level", "messages"]
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]


def test_a_level_may_be_given_as_text() -> None:
    assert demonstration("impolite", "strong") == demonstration("impolite", Level.STRONG)
    row = demonstration("impolite", "strong")[0]
    assert isinstance(row, DemonstrationRow)
    assert row.level is Level.STRONG


@each_level
def test_one_level_of_a_set_is_a_dataset(level: Level) -> None:
    found = open_dataset(f"demonstration:impolite/{level}", label="level")
    rows = list(found)
    assert [row.id for row in rows] == [row.id for row in demonstration("impolite", level)]
    assert [row.number for row in rows] == list(range(N_PROMPTS))
    assert {row.label for row in rows} == {level.value}
    assert found.count() == N_PROMPTS
    others = {str(open_dataset(f"demonstration:impolite/{each}").describe()) for each in Level}
    assert len(others) == len({*others, str(open_dataset("demonstration:impolite").describe())}) - 1
    with pytest.raises(DataError, match="no level 'severe'"):
        open_dataset("demonstration:impolite/severe")


@pytest.mark.parametrize("unknown", ["evil", "Impolite", "impolite.jsonl", "../demonstrations/impolite", ""])
def test_an_unknown_trait_is_an_error_that_lists_those_there_are(unknown: str) -> None:
    for ask in (demonstration, demonstration_path):
        with pytest.raises(DataError) as caught:
            ask(unknown)
        expected = f"there is no demonstration set for the trait {unknown!r}; there are impolite and optimistic"
        assert str(caught.value) == expected


def test_an_unknown_level_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(DataError) as caught:
        demonstration("impolite", "severe")
    assert str(caught.value) == "there is no level 'severe'; a demonstration set has normal, mild and strong"
