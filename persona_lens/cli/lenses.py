"""``persona-lens vectors lens`` and ``vectors attribute``: what a vector says, and who wrote along it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from persona_lens.cli import options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import ReductionOption, Vectors
from persona_lens.core.errors import PersonaLensError

if TYPE_CHECKING:
    from persona_lens.analysis.attribution import Attribution
    from persona_lens.analysis.logit_lens import LogitLens
    from persona_lens.backend import Backend

PROMPTS = 8  # of the trait's questions, for the scale of the final norm
REMOTE = (
    "the weights of a model on a server cannot be read, so there is no {} of it; leave out --remote to open the model "
    "on this machine"
)


@grouped
def lens_command(
    model: options.Model,
    vectors: Vectors,
    layers: Annotated[str, typer.Option("--layers", "--layer", help="`18`, `12,15,18`, `10-20` or `all`.")] = "all",
    top: Annotated[int, typer.Option("--top", help="Tokens shown on either side.")] = 10,
    reduction: ReductionOption = "response_mean",
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Show which tokens vectors promote and suppress through the final norm and the unembedding.

    The numbers are what adding the raw vector once to the last residual does to each logit, with the scale of the norm
    held at its mean over prompts of the trait's questions. Blocks in between are left out.

    Example: `persona-lens vectors lens smollm2-135m runs/optimistic-smollm2-135m --layers 12-24`
    """
    from persona_lens.analysis.logit_lens import logit_lens
    from persona_lens.vectors import load_vectors

    if opening.remote:
        raise PersonaLensError(REMOTE.format("lens"))
    loaded = load_vectors(vectors)
    chosen = options.layer_numbers(layers, loaded.model.n_layers)
    trait = loaded.trait_definition
    opened = opening.open(model)
    chat = opening.chat(opened)
    prompts = [chat.encode(None, question) for question in trait.evaluation_questions[:PROMPTS]]
    found = logit_lens(opened, loaded, chosen, prompts, top=top, reduction=reduction)
    if as_json:
        say_json(found.to_json())
    else:
        _show_lens(found)


@grouped
def attribute_command(
    model: options.Model,
    vectors: Vectors,
    prompt: Annotated[str, typer.Option("--prompt", help="What a user says.", show_default=False)],
    layer: Annotated[
        int | None, typer.Option("--layer", help="Layer of the vector, counted from 0.", show_default="the tuned one")
    ] = None,
    response: Annotated[
        str | None, typer.Option("--response", help="A response to it, to go on with.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt.", show_default=False)] = None,
    top: Annotated[int, typer.Option("--top", help="Parts shown.")] = 12,
    heads: Annotated[bool, typer.Option("--heads", help="Split attentions into heads, where that is exact.")] = False,
    reduction: ReductionOption = "response_mean",
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
) -> None:
    """Split the last token's projection on a vector into what each attention and MLP wrote.

    Example: `persona-lens vectors attribute smollm2-135m runs/optimistic-smollm2-135m --layer 18 --prompt "Will it
    rain?"`
    """
    from persona_lens.analysis.attribution import attribute
    from persona_lens.vectors import load_vectors

    if opening.remote:
        raise PersonaLensError(REMOTE.format("attribution"))
    loaded = load_vectors(vectors)
    at = loaded.tuned_choice().layer if layer is None else layer
    loaded.vector(at, reduction)  # before a model is loaded for nothing
    opened = opening.open(model)
    chat = opening.chat(opened)
    ids = [*chat.encode(system, prompt), *(chat.encode_answer(response) if response else [])]
    found = attribute(opened, loaded, at, ids, reduction=reduction, heads=heads)
    if as_json:
        say_json({"trait": loaded.trait, "reduction": reduction, **found.to_json()})
    else:
        _show_attribution(found, opened, loaded.trait, top)


def _show_lens(found: LogitLens) -> None:
    from persona_lens.cli.display import print_table

    print_table(
        f"What the {found.reduction} vectors of {found.trait} do to logits (norm held at {found.scale:.3g})",
        ("layer", "promoted", "suppressed", "strongest", "random"),
        [
            (
                str(each.layer),
                " ".join(repr(token.text) for token in each.promoted),
                " ".join(repr(token.text) for token in each.suppressed),
                f"{each.promoted[0].shift:+.2f}, {each.suppressed[0].shift:+.2f}",
                f"±{each.random_most:.2f} (up to {each.random_limit:.2f})",
            )
            for each in found.layers
        ],
    )


def _show_attribution(found: Attribution, backend: Backend, trait: str, top: int) -> None:
    from persona_lens.cli.display import print_table

    token = str(backend.tokenizer.decode([found.ids[-1]]))
    total = float(found.projection[-1])
    print_table(
        f"Projection of {token!r} on {trait} after layer {found.layer}: {total:+.3f}",
        ("written by", "projection", "share"),
        [
            (
                str(each),
                f"{float(each.values[-1]):+.3f}",
                f"{100 * float(each.values[-1]) / total:+.0f}%" if total else "-",
            )
            for each in found.strongest(count=top)
        ],
    )
    if found.heads:
        strongest = sorted(found.heads, key=lambda each: -abs(float(each.values[-1])))[:top]
        print_table("Heads", ("head", "projection"), [(str(h), f"{float(h.values[-1]):+.3f}") for h in strongest])
    say(
        f"all {len(found.parts)} parts sum to it but for {float(found.remainder[-1]):+.2g}, which is rounding in "
        f"{backend.info.dtype}"
    )
