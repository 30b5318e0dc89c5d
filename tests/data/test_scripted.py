"""Scripted users: the built-in ones, and files of others with what may be wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_lens.core.errors import PersonaLensError
from persona_lens.data.scripted import read_users, scripted_users, spread_over_domains
from persona_lens.data.tables import DataError

GOOD = """
format_version: 1
domain: tea
users:
  - name: ann
    about: >-
      She likes
      tea.
    turns: [Hello, "  What is tea?\\n"]
  - name: bob
    turns:
      - Which cup?
"""


def file_of(folder: Path, text: str) -> Path:
    file = folder / "users.yaml"
    file.write_text(text)
    return file


def test_the_built_in_ones_are_ten_of_each_domain_with_fifteen_messages() -> None:
    users = scripted_users()
    domains = [user.domain for user in users]
    assert {domain: domains.count(domain) for domain in domains} == dict.fromkeys(
        ("coding", "philosophy", "therapy", "writing"), 10
    )
    assert {len(user.turns) for user in users} == {15}
    assert all(user.about for user in users)
    assert len({turn for user in users for turn in user.turns}) == 600


def test_a_file_is_read_with_its_texts_stripped(tmp_path: Path) -> None:
    ann, bob = scripted_users([file_of(tmp_path, GOOD)])
    assert (ann.name, ann.domain, ann.turns, ann.about) == ("ann", "tea", ("Hello", "What is tea?"), "She likes tea.")
    assert bob.about == ""
    assert bob.describe() == {"name": "bob", "domain": "tea", "turns": ["Which cup?"], "about": ""}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("format_version: 1", "format_version: 2", "format_version: input should be 1"),
        ("domain: tea\n", "", "domain: field required"),
        ("- Which cup?", "- ''", "users #2 turns #1: string should have at least 1 character"),
        ("- Which cup?", "- 7", "users #2 turns #1: input should be a valid string"),
        ("turns:\n      - Which cup?", "turns: []", "users #2 turns: list should have at least 1 item"),
        ("about:", "abuot:", "users #1 abuot: extra inputs are not permitted"),
        ("bob", "ann", "two users are called 'ann'"),
        ("users:", "[", "not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_its_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    file = file_of(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(PersonaLensError) as failed:
        read_users(file)
    assert said in str(failed.value)
    assert str(file) in str(failed.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no scripted users"):
        read_users(file_of(tmp_path, "- a\n- b\n"))
    with pytest.raises(PersonaLensError, match="cannot be read"):
        read_users(tmp_path / "none.yaml")


def test_they_are_taken_from_each_domain_in_turn() -> None:
    users = spread_over_domains(scripted_users(), 6, 10)
    domains = ["coding", "philosophy", "therapy", "writing"]
    assert [user.domain for user in users] == [*domains, *domains[:2]]
    assert len({user.name for user in users}) == 6
    with pytest.raises(DataError, match="41 conversations of 10 turns are asked for, and there are 40 scripted users"):
        spread_over_domains(scripted_users(), 41, 10)
    with pytest.raises(DataError, match="1 conversation of 16 turns are asked for, and there are 0"):
        spread_over_domains(scripted_users(), 1, 16)
