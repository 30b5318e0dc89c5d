"""Roles that a model writes; the session is that of traits, and is tested there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persona_lens.traits import check_role
from persona_lens.traits.generate import (
    CASTING,
    AuthoringError,
    Limits,
    RoleDraft,
    write_role,
    written_text,
)
from persona_lens.traits.parsing import parse
from persona_lens.traits.role import ROLES
from tests.scripted import GRADES, PROMPTS, Good, ScriptedAuthor, sloppy

DESCRIPTION = "Keeps an inn on a mountain road; warm, busy, and proud of the stew."


def begun(**given: Any) -> RoleDraft:
    return RoleDraft(name="inn_keeper", description=DESCRIPTION, origin={"model": "scripted"}, **given)


@pytest.mark.parametrize("author", [Good(), sloppy(Good())])
def test_a_good_author_is_asked_as_seldom_as_planned(author: Any) -> None:
    scripted, draft = ScriptedAuthor(author), begun()
    written = write_role(scripted, draft)
    assert written.advice == ()
    assert len(scripted.requests) == written.requests == sum(step.at_least for step in CASTING.plan()) == 2
    role = written.content
    assert list(role.system_prompts) == PROMPTS
    assert list(role.grades[2:]) == [GRADES["somewhat"], GRADES["fully"]]
    assert role.grades[1].endswith("nothing in it is of the inn keeper.")
    assert all(f'The role is "inn keeper": {DESCRIPTION}' in request for request in scripted.requests)


def test_the_file_reads_back_and_says_who_wrote_it() -> None:
    draft = begun()
    written = write_role(ScriptedAuthor(Good()), draft)
    text = written_text(draft, "1.2")
    role, _ = parse(ROLES, text, "inn_keeper.yaml")
    assert role == written.content
    assert role.author == "scripted via persona-lens authoring"
    assert text.startswith("# inn_keeper: a role for persona-lens, written by a model.")
    assert {"# model: scripted", "# requests: 2", "# persona-lens: 1.2"} <= set(text.splitlines())


def test_what_is_weak_is_asked_for_again() -> None:
    long, twin = "stew " * 90, f"{PROMPTS[0]}!"
    prompts = [PROMPTS[0], twin, long, *PROMPTS[1:]]
    author = ScriptedAuthor(Good(prompts=prompts))
    written = write_role(author, begun())
    assert list(written.content.system_prompts) == PROMPTS
    assert "is too long" in author.requests[1]
    assert "is there already" in author.requests[1]
    assert "Write 2 system prompts" in author.requests[1]


def test_an_author_of_no_use_says_what_is_missing() -> None:
    with pytest.raises(AuthoringError, match=r"Still missing: 5 of 5 system prompts, the grades"):
        write_role(ScriptedAuthor(lambda *_: "No."), begun())

    def same(number: int, kind: str, request: str) -> str:
        return json.dumps(
            {"somewhat": GRADES["fully"], "fully": GRADES["fully"]} if kind == "grades" else Good().data(kind, request)
        )

    with pytest.raises(AuthoringError, match="both grades are described in the same words"):
        write_role(ScriptedAuthor(same), begun(), limits=Limits(attempts=2))


def test_a_draft_is_kept_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "inn_keeper.partial.json"
    good = Good()

    def write(number: int, kind: str, request: str) -> str:
        if kind == "grades":
            raise OSError("the line is dead")
        return good(number, kind, request)

    with pytest.raises(AuthoringError, match="the line is dead"):
        write_role(ScriptedAuthor(write), begun(), save=lambda draft: draft.save(file))
    draft = RoleDraft.load(file)
    assert draft is not None
    assert (draft.missing, draft.system_prompts) == (["the grades"], PROMPTS)
    assert check_role(write_role(ScriptedAuthor(Good()), draft).content) == []
    with pytest.raises(AuthoringError, match=r"the role inn_keeper still lacks the grades"):
        begun(system_prompts=PROMPTS).fields()


def test_names_and_descriptions_that_cannot_be_used() -> None:
    with pytest.raises(AuthoringError, match="say what the role is, and is not"):
        RoleDraft.begin("inn_keeper", " ", {})
    with pytest.raises(ROLES.failed, match="'Inn Keeper' cannot name a role"):
        RoleDraft.begin("Inn Keeper", DESCRIPTION, {})
