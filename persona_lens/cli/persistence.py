"""``persona-lens steer persist``: how long steering holds in a conversation, way by way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, print_table
from persona_lens.cli.runner import Job, Run, Session
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.analysis.persistence import Persistence

WAYS = Option(
    "A way to steer, instead of all of them. Repeatable.",
    names=("--way",),
    metavar="WAY",
    values="`all`, `generated`, `clean`, `clean-all`, `floor`, `gated`, `random` or `prompted`",
)


def persist_command(
    run: Annotated[Run, Fields(out=Option(shown="runs/persistence-MODEL"))],
    vectors: options.SeveralVectors,
    given: Annotated[Given, Fields("persona_lens.analysis.persistence.settings:PersistSettings", ways=WAYS)],
    users: Annotated[list[Path] | None, Option(metavar="FILE", shown="the built-in ones")] = None,
) -> None:
    """Hold the same conversations in every way to steer: which keeps the trait, and which keeps the text?

    Scripted users talk with the model for some turns. Steered are all tokens or generated ones alone, with finished
    turns as they were steered or read clean; or a projection is held. Beside them stand the unsteered model, random
    directions and a system prompt. Intervals are over conversations.

    Example: `persona-lens steer persist smollm2-135m runs/optimistic-smollm2-135m --layer 18 --coefficient 1.5`

    Args:
        users: A file of scripted users. Repeatable.
    """
    from persona_lens.analysis.persistence import persist, persist_work
    from persona_lens.data.scripted import scripted_users

    loaded = options.open_by_trait(vectors)
    settings = given.make()
    people = scripted_users(users or ())
    job = Job(
        lambda at: persist(at.backend, loaded, settings, users=people, **at.given),
        _show,
        lambda at: persist_work(at.backend, loaded, settings, users=people, **at.asked),
        traits={name: each.trait_definition for name, each in loaded.items()},
        name="persistence",
    )
    run.carry_out(job)


SHOWN = {
    "score": ("score", ".1f"),
    "nll": ("surprise", ".2f"),
    "coherence": ("coherence", ".1f"),
    "capability": ("capability", ".2f"),
}


def _show(found: Persistence, _: Session) -> None:
    for name, trait in found.summary["traits"].items():
        ways: dict[str, Any] = trait["ways"]
        measures = [measure for measure in SHOWN if any(way["end"][measure] for way in ways.values())]
        last = found.outcomes[name].last
        heads = ["way", "score, turn 1"]
        heads += [f"{SHOWN[measure][0]}, last {counted(last, 'turn')}" for measure in measures]
        rows = [
            (
                way,
                interval_text(each["turns"][0]["score"], ".1f", "conversation"),
                *(interval_text(each["end"][measure], SHOWN[measure][1], "conversation") for measure in measures),
            )
            for way, each in ways.items()
        ]
        print_table(f"{name}, {trait['steering']} [95% interval over conversations]", heads, rows)
