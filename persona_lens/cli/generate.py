"""``persona-lens generate``: one prompt, answered with and without steering, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from persona_lens.cli import options
from persona_lens.cli.display import console, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.previews import PreviewOption, show_previews
from persona_lens.cli.steerings import Candidate, LayerOptions, SteeringOptions, candidates
from persona_lens.cli.sweep import AllowOtherModel, Vectors
from persona_lens.core.text import printable


@grouped
def generate(
    model: options.Model,
    vectors: Vectors,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)],
    written: SteeringOptions,
    one_layer: LayerOptions,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    max_new_tokens: options.MaxNewTokens = 100,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    preview: PreviewOption = False,
    allow_other_model: AllowOtherModel = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Answer a prompt with and without steering, side by side.

    Examples:
    `persona-lens generate smollm2-135m runs/optimistic-smollm2-135m "How will my exam go?" --layer 18`

    `persona-lens generate smollm2-135m runs/optimistic-smollm2-135m "How will my exam go?"
    --edits "optimistic@18:+1.5, evil@all:ablate" --with runs/evil-smollm2-135m --preview`
    """
    from persona_lens.steering import steered_replies
    from persona_lens.steering.preview import preview_tokens
    from persona_lens.vectors import load_vectors

    shown = candidates(load_vectors(vectors), written, one_layer)
    opened = opening.open(model, offline=preview)
    for each in shown:
        if each.steering is not None and not allow_other_model:
            each.steering.check_model(opened)
    chat = opening.chat(opened)
    if preview:
        ids = chat.encode(system, prompt)
        steerings = {each.title: each.steering for each in shown if each.steering is not None}
        show_previews(
            {
                title: preview_tokens(opened, ids, max_new_tokens, edits=steering)
                for title, steering in steerings.items()
            },
            as_json,
        )
        return
    answers = steered_replies(
        opened,
        prompt,
        [each.steering for each in shown],
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        allow_other_model=allow_other_model,
    )
    options.say_traffic(opened)
    _show(prompt, shown, answers, as_json)


def _show(prompt: str, shown: Sequence[Candidate], answers: Sequence[str], as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "edits": None if each.steering is None else str(each.steering),
                "coefficient": each.coefficient,
                "response": answer,
            }
            for each, answer in zip(shown, answers, strict=True)
        ]
        say_json({"prompt": prompt, "responses": rows})
        return
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    screen = console()
    width = max(30, screen.width // len(answers) - 2)
    whole = all(len(each.title) <= width - 6 for each in shown)  # a title that is cut may lose what tells it apart
    panels = [
        Panel(Text(printable(answer)), title=Text(printable(each.title)), width=width)
        if whole
        else Panel(Group(Text(printable(each.title), style="bold"), Text(), Text(printable(answer))), width=width)
        for each, answer in zip(shown, answers, strict=True)
    ]
    screen.print(Columns(panels))
