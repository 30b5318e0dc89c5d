"""``persona-lens generate``: one prompt, answered with and without steering, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import console
from persona_lens.cli.runner import deliver, say_traffic, show_previews
from persona_lens.cli.settings import argument
from persona_lens.cli.steerings import Candidate, LayerOptions, SteeringOptions, candidates
from persona_lens.core.text import printable


def generate(
    subject: options.Subject,
    vectors: options.Vectors,
    prompt: Annotated[str, argument("PROMPT", "What to ask.")],
    written: SteeringOptions,
    one_layer: LayerOptions,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 100,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    preview: options.Preview = False,
    allow_other_model: options.AllowOtherModel = False,
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
    backend, chat = subject.open(offline=preview)
    for each in shown:
        if each.steering is not None and not allow_other_model:
            each.steering.check_model(backend)
    if preview:
        ids = chat.encode(system, prompt)
        steerings = {each.title: each.steering for each in shown if each.steering is not None}
        previews = {
            title: preview_tokens(backend, ids, max_new_tokens, edits=each) for title, each in steerings.items()
        }
        show_previews(previews, subject.as_json)
        return
    answers = steered_replies(
        backend,
        prompt,
        [each.steering for each in shown],
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        allow_other_model=True,  # it was asked above
    )
    say_traffic(backend)
    deliver(_summary(prompt, shown, answers), lambda: _show(shown, answers), subject.as_json)


def _summary(prompt: str, shown: Sequence[Candidate], answers: Sequence[str]) -> dict[str, Any]:
    rows = [
        {"edits": each.steering and str(each.steering), "coefficient": each.coefficient, "response": answer}
        for each, answer in zip(shown, answers, strict=True)
    ]
    return {"prompt": prompt, "responses": rows}


def _show(shown: Sequence[Candidate], answers: Sequence[str]) -> None:
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
