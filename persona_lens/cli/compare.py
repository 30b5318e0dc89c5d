"""``persona-lens steer compare``: several steerings on the same questions, each beside its null."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import number, say, show_rows
from persona_lens.cli.runner import Experiment, Run, Session
from persona_lens.cli.settings import Fields, Given, Option
from persona_lens.cli.steerings import SteeringOptions
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.steering import ArmSettings
    from persona_lens.steering.comparison import Comparison

QUESTIONS = Option("How many of the held-out questions to ask.")


def compare_command(
    run: Run,
    vectors: options.Vectors,
    written: SteeringOptions,
    given: Annotated[
        Given, Fields("persona_lens.steering:ArmSettings", without=("question_set",), questions=QUESTIONS)
    ],
) -> None:
    """Let the unsteered model and several steerings answer the same questions, and score what comes.

    The questions and the score are those of VECTORS' trait. Beside each steering stands the same one in random
    directions, with norms and angles kept.

    Example: `persona-lens steer compare smollm2-135m runs/optimistic-smollm2-135m --edits optimistic@18:+1.5
    --edits "optimistic@all:increments(+1.5)"`
    """
    from persona_lens.steering.comparison import compare_steerings, comparison_work
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    arms = written.open(loaded)
    if not arms:
        raise PersonaLensError(f"name what to compare, such as --edits {loaded.trait}@18:+1.5; repeat it for more")
    settings: ArmSettings = given.make()
    experiment = Experiment(
        lambda at: compare_steerings(
            at.backend, arms, loaded, settings, folder=at.folder, judge=at.judge, chat=at.chat, progress=at.shown
        ),
        _show,
        lambda at: comparison_work(at.backend, arms, loaded, settings, at.chat, at.judge),
        traits=loaded.trait_definition,
    )
    run.carry_out(experiment)


def _show(found: Comparison, _: Session) -> None:
    effects = [(name, effect) for name, effect in found.effects.items() if effect is not None]
    measured = "surprise" if any(effect.surprise for _, effect in effects) else "coherence"
    plain = found.summary["unsteered"]

    def beside(effect: Any) -> str:
        value = getattr(effect, measured) if effect else plain[measured]
        return number(value and (value.mean if effect else value["mean"]), ".2f")

    show_rows(
        f"Trait score of {found.summary['trait']}, its change [95% interval], and {measured}",
        [("unsteered", None), *effects],
        {
            "steering": lambda row: row[0],
            "score": lambda row: number(row[1].score.mean if row[1] else plain["score"]["mean"], ".1f"),
            "change": lambda row: row[1].change if row[1] else "",
            "random": lambda row: row[1].random if row[1] else "",
            "difference": lambda row: row[1].difference if row[1] else "",
            "clear": lambda row: row[1].clear if row[1] else "",
            measured: lambda row: beside(row[1]),
        },
    )
    for name, effect in found.effects.items():
        if effect is None:
            say(f"warning: no response under {name} has a score", err=True)
