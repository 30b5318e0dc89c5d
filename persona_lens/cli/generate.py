"""``persona-lens generate``: a prompt answered with and without steering, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from persona_lens.cli import options
from persona_lens.cli.display import console
from persona_lens.cli.options.steerings import Candidate, LayerOptions, SteeringOptions, candidates
from persona_lens.cli.runner import deliver, say_traffic, show_previews
from persona_lens.cli.settings import argument
from persona_lens.core.text import printable


def generate(
    subject: Annotated[options.Subject, options.Here],
    vectors: options.Vectors,
    prompt: Annotated[str, argument("PROMPT", "What to ask.")],
    written: SteeringOptions,
    one_layer: LayerOptions,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 100,
    temperature: options.Temperature = 0.0,
    thinking_budget: options.ThinkingBudget = None,
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
    from persona_lens.steering import generate
    from persona_lens.steering.preview import preview_tokens

    shown = candidates(options.open_vectors(vectors), written, one_layer)
    backend, chat = subject.open(offline=preview)
    steerings = {each.title: each.steering for each in shown if each.steering is not None}
    for steering in steerings.values() if not allow_other_model else ():
        steering.check_model(backend)
    if preview:
        ids = chat.encode(system, prompt)
        previews = {
            title: preview_tokens(backend, ids, max_new_tokens, edits=each) for title, each in steerings.items()
        }
        show_previews(previews, subject.as_json)
        return
    answers = generate(
        backend,
        prompt,
        [each.steering for each in shown],
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        thinking_budget=thinking_budget,
        seed=seed,
        chat=chat,
        allow_other_model=True,  # it was asked above
    )
    say_traffic(backend)
    rows = [
        {"edits": each.steering and str(each.steering), "coefficient": each.coefficient, "response": answer}
        for each, answer in zip(shown, answers, strict=True)
    ]
    deliver({"prompt": prompt, "responses": rows}, lambda: _show(shown, answers), subject.as_json)


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
