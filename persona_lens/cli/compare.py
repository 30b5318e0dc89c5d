"""``persona-lens steer compare``: several steerings on the same questions, each beside its null."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.steerings import SteeringOptions
from persona_lens.cli.sweep import Vectors
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.steering.comparison import Comparison


@grouped
def compare_command(
    model: options.Model,
    vectors: Vectors,
    written: SteeringOptions,
    questions: Annotated[int, typer.Option(help="How many of the held-out questions to ask.")] = 20,
    samples: Annotated[int, typer.Option(help="Responses for each question and steering.")] = 1,
    random_directions: Annotated[
        int, typer.Option(help="Random rotations of each steering beside it; 0 leaves them out.")
    ] = 5,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; kept and resumed.", show_default=False)] = None,
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    dry_run: options.DryRun = False,
    judge: judges.JudgeName = "likelihood",
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Let the unsteered model and several steerings answer the same questions, and score what comes.

    The questions and the score are those of VECTORS' trait. Beside each steering stands the same one in random
    directions, with norms and angles kept.

    Example: `persona-lens steer compare smollm2-135m runs/optimistic-smollm2-135m --edits optimistic@18:+1.5
    --edits "optimistic@all:increments(+1.5)"`
    """
    from persona_lens.cli.display import showing_progress
    from persona_lens.runs.rollouts import RolloutSettings
    from persona_lens.steering.comparison import ArmSettings, compare_steerings, comparison_work
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    arms = written.open(loaded)
    if not arms:
        raise PersonaLensError(f"name what to compare, such as --edits {loaded.trait}@18:+1.5; repeat it for more")
    settings = ArmSettings(
        questions=tuple(range(questions)),
        samples=samples,
        random_directions=random_directions,
        seed=seed,
        rollouts=RolloutSettings(max_new_tokens, temperature, batch_size=batch_size),
    )
    opened = opening.open(model, offline=dry_run)
    chat = opening.chat(opened)
    scoring = judging.open(judge, loaded.trait_definition, opened, chat, opening.dtype, opening.device)
    work = partial(comparison_work, opened, arms, loaded, settings, chat, scoring)
    if options.planned(work, opening, dry_run, as_json):
        return
    with judges.saying_spending(scoring), showing_progress() as progress:
        found = compare_steerings(
            opened, arms, loaded, settings, folder=out, judge=scoring, chat=chat, progress=progress
        )
    options.say_traffic(opened)
    if as_json:
        say_json(found.summary)
    else:
        _show(found)


def _show(found: Comparison) -> None:
    from persona_lens.cli.display import interval_text, print_table

    effects = [(name, effect) for name, effect in found.effects.items() if effect is not None]
    measured = "surprise" if any(effect.surprise for _, effect in effects) else "coherence"
    plain = found.summary["unsteered"]
    print_table(
        f"Trait score of {found.summary['trait']}, its change [95% interval], and {measured}",
        ("steering", "score", "change", "random", "difference", "clear", measured),
        [
            ("unsteered", f"{plain['score']['mean']:.1f}", "", "", "", "", _plain(plain[measured])),
            *(
                (
                    name,
                    f"{effect.score.mean:.1f}",
                    interval_text(effect.change),
                    interval_text(effect.random),
                    interval_text(effect.difference),
                    "yes" if effect.clear else "no",
                    f"{value.mean:.2f}" if (value := getattr(effect, measured)) else "-",
                )
                for name, effect in effects
            ),
        ],
    )
    for name, effect in found.effects.items():
        if effect is None:
            say(f"warning: no response under {name} has a score", err=True)


def _plain(estimate: dict[str, float] | None) -> str:
    return f"{estimate['mean']:.2f}" if estimate else "-"
