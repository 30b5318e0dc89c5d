"""``persona-lens axis``: a model's roles become its persona space, and the axis to the default Assistant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import interval_text, print_table, show_rows
from persona_lens.cli.extraction import say_thinking
from persona_lens.cli.runner import Job, Run
from persona_lens.cli.settings import Fields, Given, Option, argument
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import in_short

if TYPE_CHECKING:
    from persona_lens.analysis.capping import Capping
    from persona_lens.extraction.axis import Axis
    from persona_lens.traits import Role

RolesDirs = Annotated[list[Path] | None, Option("Another folder of role files. Repeatable.", metavar="DIR")]
SHOWN_LAYERS = 6


def axis_command(
    run: Annotated[Run, Fields(out=Option(shown="runs/axis-MODEL"))],
    given: Annotated[Given, Fields("persona_lens.extraction.axis:AxisSettings")],
    roles: Annotated[str | None, Option(shown="all")] = None,
    roles_dir: RolesDirs = None,
    default: Annotated[Path | None, Option(metavar="FILE")] = None,
    vectors: Annotated[list[Path] | None, Option(metavar="VECTORS")] = None,
) -> None:
    """Find where the default Assistant stands among the roles that a model can play, and the axis between.

    Every role answers the shared questions under each of its prompts, and so does the default. The folder gets
    `vectors.safetensors`, the axis as vectors of the trait `assistant`; `space.safetensors`, the roles; and a report
    with the map.

    Examples:
    `persona-lens axis smollm2-135m --questions 4 --vectors runs/optimistic-smollm2-135m`

    `persona-lens axis Qwen/Qwen2.5-7B-Instruct --max-new-tokens 300 --judge openai:gpt-4.1-mini`

    Args:
        roles: Names or files of roles, with commas between them.
        default: Another default Assistant, with its questions.
        vectors: Vectors of traits, to be placed in the same space. Repeatable.
    """
    from persona_lens.extraction.axis import axis_work, persona_axis
    from persona_lens.traits import PlayedRole, load_default

    settings = given.make()
    chosen, assistant = open_roles(roles, roles_dir), load_default(default)
    placed = list(options.open_by_trait(vectors or ()).values())
    job = Job(
        lambda at: persona_axis(
            at.backend, roles=chosen, default=assistant, settings=settings, traits=placed, **at.given
        ),
        lambda found, _: _show(found),
        lambda at: axis_work(at.backend, chosen, assistant, settings, at.chat, at.judging.get("judges")),
        traits={role.name: PlayedRole(role, assistant) for role in chosen},
        name="axis",
    )
    run.carry_out(job)


def cap_command(
    run: Annotated[Run, Fields(out=Option(shown="runs/cap-MODEL"))],
    axis: Annotated[Path, argument("AXIS", "The run folder of `persona-lens axis`.")],
    given: Annotated[Given, Fields("persona_lens.analysis.bench:CapSettings", without=("ranges",))],
    ranges: Annotated[str | None, Option(metavar="FIRST-LAST,…")] = None,
    roles_dir: RolesDirs = None,
    default: Annotated[Path | None, Option(metavar="FILE")] = None,
) -> None:
    """Find a floor along the axis that keeps a model from playing roles at little cost, and confirm it.

    Caps are tried at several ranges of layers and percentiles of the model's own responses, by what they do to replies
    to persona prompts and by what they cost; the choice is confirmed on other roles and questions, beside random
    directions. The folder gets `steering.safetensors`, which `--edits` takes everywhere, and the axis.

    Example: `persona-lens axis cap smollm2-135m runs/axis-smollm2-135m`

    Args:
        ranges: Ranges of layers to try, such as 16-19,20-27.
        default: The default Assistant of that run, if it was another than the built-in one.
    """
    from persona_lens.analysis.capping import AxisRun, cap_axis
    from persona_lens.traits import PlayedRole, load_default

    loaded, assistant = AxisRun.load(axis), load_default(default)
    roles = loaded.roles(roles_dir or ())
    settings = given.make(loaded.space.model.n_layers, **({} if ranges is None else {"ranges": _ranges(ranges)}))
    job = Job(
        lambda at: cap_axis(at.backend, loaded, roles=roles, default=assistant, settings=settings, **at.given),
        lambda found, _: _show_caps(found),
        traits={name: PlayedRole(role, assistant) for name, role in roles.items()},
        name="cap",
    )
    run.carry_out(job)


def _ranges(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise PersonaLensError(f"--ranges takes ranges of layers such as 16-19,20-27; got {in_short(text)!r}")
        found.append((int(first), int(last or first)))
    return tuple(found)


def _show_caps(found: Capping) -> None:
    forms = {"persona": ".1f", "surprise": ".3f", "accuracy": ".3f"}
    rows = [
        (
            each["text"].removeprefix("assistant@"),
            *(interval_text(each[name], form, noun=None) for name, form in forms.items()),
        )
        for each in found.summary["candidates"]
    ]
    print_table(
        "Caps tried: changes of the score by which personas are played (points of 100), of the surprise of ordinary "
        "replies (nats a token), and of the share of right answers",
        ("layers: cap", "persona", "surprise", "right answers"),
        rows,
    )


def open_roles(names: str | None, roles_dirs: Sequence[Path] | None) -> list[Role]:
    """Roles by their names or files, all within reach by default."""
    from persona_lens.traits import find_roles, load_role

    if names is None:
        catalogue = find_roles(roles_dirs or ())
        options.say_notes(catalogue.warnings(), "warning")
        return [file.read() for file in catalogue.files]
    listed = [name.strip() for name in names.split(",")]
    if not all(listed):
        raise PersonaLensError(f"--roles takes names with commas between them, got {names!r}")
    return [load_role(name, roles_dirs or ()) for name in listed]


def _show(found: Axis) -> None:
    summary = found.summary
    say_thinking(summary, "the axis is that of its answers")
    every = max(1, len(summary["layers"]) // SHOWN_LAYERS)
    rows = [each for each in summary["layers"] if each["layer"] % every == 0 or each["layer"] == summary["layer"]]
    print_table(
        "By layer, with 95% intervals over roles; in brackets, what 95% of permuted labels stay below",
        ("layer", "axis and component 1", "axes of two halves", "roles of two halves"),
        [
            (str(each["layer"]), *(_beside(each, name) for name in ("cosine", "axis_halves", "role_halves")))
            for each in rows
        ],
    )
    show_rows(
        f"The default among the roles, layer {summary['layer']}",
        [{**each, "share": 100 * s} for each, s in zip(summary["standings"], summary["explained"], strict=True)],
        {"component": "component", "variance, %": ("share", ".1f"), "place, 0 to 1": ("place", ".2f")},
    )
    if summary["traits"]:
        layer = summary["layer"]
        show_rows(
            f"Traits along the axis, layer {layer}: cosines; random directions stay within {2 * summary['chance']:.2f}",
            [{"trait": each["trait"], "cosine": each["axis"][layer]} for each in summary["traits"]],
            {"trait": "trait", "cosine": ("cosine", ".2f")},
        )


def _beside(row: dict[str, Any], name: str) -> str:
    found = row[name]
    return "-" if found is None else f"{interval_text(found, '.2f', noun=None)} ({row[f'{name}_null']:.2f})"
