"""``persona-lens generate``: one prompt, answered with and without steering, side by side."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from persona_lens.cli import options
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import AllowOtherModel, PositionsOption, ReductionOption, Vectors


@grouped
def generate(
    model: options.Model,
    vectors: Vectors,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)],
    layer: Annotated[int, typer.Option("--layer", help="Layer to steer, counted from 0.")],
    coefficients: Annotated[
        str, typer.Option("--coefficients", help="Multiples of the raw vector; 0 is always shown too.")
    ] = "-2,2",
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    positions: PositionsOption = "all",
    reduction: ReductionOption = "response_mean",
    max_new_tokens: options.MaxNewTokens = 100,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    allow_other_model: AllowOtherModel = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Answer a prompt with and without steering, side by side.

    Example: `persona-lens generate smollm2-135m runs/optimistic-smollm2-135m "How will my exam go?" --layer 18`
    """
    from persona_lens.backend import Positions
    from persona_lens.replies import steered_replies
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    wanted = options.choice(Positions, positions, "--positions")
    strengths = sorted({0.0, *options.numbers(coefficients, "--coefficients")})
    loaded.vector(layer, reduction)
    opened = opening.open(model)
    if not allow_other_model:
        loaded.check_model(opened)
    answers = steered_replies(
        opened,
        prompt,
        loaded,
        layer,
        strengths,
        system=system,
        positions=wanted,
        reduction=reduction,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=opening.chat(opened),
    )
    options.say_traffic(opened)
    _show(loaded.trait, layer, prompt, dict(zip(strengths, answers, strict=True)), as_json)


def _show(trait: str, layer: int, prompt: str, answers: dict[float, str], as_json: bool) -> None:
    if as_json:
        rows = [{"coefficient": coefficient, "response": text} for coefficient, text in answers.items()]
        typer.echo(json.dumps({"trait": trait, "layer": layer, "prompt": prompt, "responses": rows}))
        return
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    width = max(30, console.width // len(answers) - 2)
    panels = [
        Panel(Text(text), title=f"{trait} {coefficient:+g}" if coefficient else "unsteered", width=width)
        for coefficient, text in answers.items()
    ]
    console.print(Columns(panels))
