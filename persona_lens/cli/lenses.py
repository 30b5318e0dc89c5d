"""``persona-lens vectors lens`` and ``vectors attribute``: what a vector says, and who wrote along it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_lens.cli import options
from persona_lens.cli.display import print_table, say, show_rows
from persona_lens.cli.runner import deliver
from persona_lens.cli.values import layer_numbers
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


def lens_command(
    subject: options.Subject,
    vectors: options.Vectors,
    layers: options.Layers = "all",
    top: int = 10,
    reduction: options.Reduction = "response_mean",
) -> None:
    """Show which tokens vectors promote and suppress through the final norm and the unembedding.

    The numbers are what adding the raw vector once to the last residual does to each logit, with the scale of the norm
    held at its mean over prompts of the trait's questions. Blocks in between are left out.

    Example: `persona-lens vectors lens smollm2-135m runs/optimistic-smollm2-135m --layers 12-24`

    Args:
        top: Tokens shown on either side.
    """
    from persona_lens.analysis.logit_lens import logit_lens
    from persona_lens.vectors import load_vectors

    if subject.opening.remote:
        raise PersonaLensError(REMOTE.format("lens"))
    loaded = load_vectors(vectors)
    chosen = layer_numbers(layers, loaded.model.n_layers)
    trait = loaded.trait_definition
    opened, chat = subject.open()
    prompts = [chat.encode(None, question) for question in trait.evaluation_questions[:PROMPTS]]
    found = logit_lens(opened, loaded, chosen, prompts, top=top, reduction=reduction)
    deliver(found.to_json(), lambda: _show_lens(found), subject.as_json)


def attribute_command(
    subject: options.Subject,
    vectors: options.Vectors,
    prompt: str,
    layer: options.OneLayer = None,
    response: str | None = None,
    system: options.System = None,
    top: int = 12,
    heads: bool = False,
    reduction: options.Reduction = "response_mean",
) -> None:
    """Split the last token's projection on a vector into what each attention and MLP wrote.

    Example: `persona-lens vectors attribute smollm2-135m runs/optimistic-smollm2-135m --layer 18 --prompt "Will it
    rain?"`

    Args:
        prompt: What a user says.
        response: A response to it, to go on with.
        top: Parts shown.
        heads: Split attentions into heads, where that is exact.
    """
    from persona_lens.analysis.attribution import attribute
    from persona_lens.vectors import load_vectors

    if subject.opening.remote:
        raise PersonaLensError(REMOTE.format("attribution"))
    loaded = load_vectors(vectors)
    at = loaded.tuned_choice().layer if layer is None else layer
    loaded.vector(at, reduction)  # before a model is loaded for nothing
    opened, chat = subject.open()
    ids = [*chat.encode(system, prompt), *(chat.encode_answer(response) if response else [])]
    found = attribute(opened, loaded, at, ids, reduction=reduction, heads=heads)
    summary = {"trait": loaded.trait, "reduction": reduction, **found.to_json()}
    deliver(summary, lambda: _show_attribution(found, opened, loaded.trait, top), subject.as_json)


def _show_lens(found: LogitLens) -> None:
    show_rows(
        f"What the {found.reduction} vectors of {found.trait} do to logits (norm held at {found.scale:.3g})",
        found.layers,
        {
            "layer": lambda each: each.layer,
            "promoted": lambda each: " ".join(repr(token.text) for token in each.promoted),
            "suppressed": lambda each: " ".join(repr(token.text) for token in each.suppressed),
            "strongest": lambda each: f"{each.promoted[0].shift:+.2f}, {each.suppressed[0].shift:+.2f}",
            "random": lambda each: f"±{each.random_most:.2f} (up to {each.random_limit:.2f})",
        },
    )


def _show_attribution(found: Attribution, backend: Backend, trait: str, top: int) -> None:
    token = str(backend.tokenizer.decode([found.ids[-1]]))
    total = float(found.projection[-1])
    show_rows(
        f"Projection of {token!r} on {trait} after layer {found.layer}: {total:+.3f}",
        found.strongest(count=top),
        {
            "written by": str,
            "projection": (lambda each: float(each.values[-1]), "+.3f"),
            "share": lambda each: f"{100 * float(each.values[-1]) / total:+.0f}%" if total else None,
        },
    )
    if found.heads:
        strongest = sorted(found.heads, key=lambda each: -abs(float(each.values[-1])))[:top]
        print_table("Heads", ("head", "projection"), [(str(h), f"{float(h.values[-1]):+.3f}") for h in strongest])
    say(
        f"all {len(found.parts)} parts sum to it but for {float(found.remainder[-1]):+.2g}, which is rounding in "
        f"{backend.info.dtype}"
    )
