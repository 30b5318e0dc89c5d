"""``persona-lens dissect``, ``vectors lens``, ``vectors attribute`` and ``steer capability``: vectors taken apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import Column, cell, print_table, say, show_rows, showing_progress
from persona_lens.cli.options.steerings import LayerOptions, SteeringOptions, candidates
from persona_lens.cli.runner import Job, Run, Session, deliver, show_work
from persona_lens.cli.settings import Fields, Given, Option, layer_numbers
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_text

if TYPE_CHECKING:
    from persona_lens.analysis.dissection import Dissection


REMOTE = (
    "the weights of a model on a server cannot be read, so there is no {} of it; leave out --remote to open the model "
    "on this machine"
)


def lens_command(
    subject: Annotated[options.Subject, options.Here],
    vectors: options.Vectors,
    layers: options.Layers = "all",
    top: int = 10,
    reduction: options.Reduction = "",
) -> None:
    """Show which tokens vectors promote and suppress through the final norm and the unembedding.

    The numbers are what adding the raw vector once to the last residual does to each logit, with the scale of the norm
    held at its mean over prompts of the trait's questions. Blocks in between are left out.

    Example: `persona-lens vectors lens smollm2-135m runs/optimistic-smollm2-135m --layers 12-24`

    Args:
        top: Tokens shown on either side.
    """
    from persona_lens.analysis.logit_lens import lens

    if subject.opening.remote:
        raise PersonaLensError(REMOTE.format("lens"))
    loaded = options.open_vectors(vectors)
    chosen = layer_numbers(layers, loaded.model.n_layers)
    opened, _ = subject.open()
    found = lens(opened, loaded, chosen, top=top, reduction=reduction)
    columns: Mapping[str, Column[Any]] = {
        "layer": "layer",
        "promoted": lambda each: " ".join(repr(token.text) for token in each.promoted),
        "suppressed": lambda each: " ".join(repr(token.text) for token in each.suppressed),
        "strongest": lambda each: f"{each.promoted[0].shift:+.2f}, {each.suppressed[0].shift:+.2f}",
        "random": lambda each: f"±{each.random_most:.2f} (up to {each.random_limit:.2f})",
    }
    title = f"What the {found.reduction} vectors of {loaded.trait} do to logits (norm held at {found.scale:.3g})"
    deliver(found.to_json(), lambda: show_rows(title, found.layers, columns), subject.as_json)


def attribute_command(
    subject: Annotated[options.Subject, options.Here],
    vectors: options.Vectors,
    prompt: str,
    layer: Annotated[int | None, Option("Layer of the vector, counted from 0.", shown="the tuned one")] = None,
    response: str | None = None,
    system: options.System = None,
    top: int = 12,
    heads: bool = False,
    reduction: options.Reduction = "",
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

    if subject.opening.remote:
        raise PersonaLensError(REMOTE.format("attribution"))
    loaded = options.open_vectors(vectors)
    at = loaded.tuned_choice().layer if layer is None else layer
    loaded.vector(at, reduction)  # before a model is loaded for nothing
    opened, chat = subject.open()
    ids = [*chat.encode(system, prompt), *(chat.encode_answer(response) if response else [])]
    reduction = reduction or loaded.default_reduction
    found = attribute(opened, loaded, at, ids, reduction=reduction, heads=heads)
    total = float(found.projection[-1])

    def show() -> None:
        token = str(opened.tokenizer.decode([found.ids[-1]]))
        show_rows(
            f"Projection of {token!r} on {loaded.trait} after layer {at}: {total:+.3f}",
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
            f"{opened.info.dtype}"
        )

    deliver({"trait": loaded.trait, "reduction": reduction, **found.to_json()}, show, subject.as_json)


def dissect(
    run: Annotated[Run, Fields(out=Option(shown="runs/dissect-TRAIT-MODEL"))],
    vectors: options.Vectors,
    sae: Annotated[str, Option(metavar="SAE")],
    given: Annotated[Given, Fields("persona_lens.analysis.dissection:DissectSettings")],
    corpus: Annotated[Path | None, Option(metavar="FILE")] = None,
    max_texts: int = 500,
    allow_other_model: Annotated[bool, Option("Accept an autoencoder of a model with another name.")] = False,
) -> None:
    """Take a vector apart into the features of a sparse autoencoder, and steer the top ones alone.

    Needs SAELens, by the extra `sae`. Random directions stand beside cosines and reconstruction, random
    features beside the steered ones.

    Example: `persona-lens dissect smollm2-135m runs/optimistic-smollm2-135m --sae sae-18 --coefficient 4 --corpus
    runs/optimistic-smollm2-135m/rollouts.jsonl`

    Args:
        sae: A folder that SAELens saved, or RELEASE/ID of a public one; its layer is the one dissected.
        corpus: Texts to look for features in: .txt, .jsonl, .csv or .parquet, such as a run's rollouts.jsonl.
        max_texts: Texts of the corpus that are read.
    """
    from persona_lens.analysis.dissection import dissect as run_dissection
    from persona_lens.analysis.dissection import dissection_work
    from persona_lens.analysis.dissection.examples import read_corpus
    from persona_lens.analysis.dissection.features import load_features

    loaded, features = options.open_vectors(vectors), load_features(sae)
    features.check(loaded, allow_other_model=allow_other_model)
    texts = read_corpus(corpus, limit=max_texts) if corpus else []
    settings = given.make()
    asked = loaded.trait_definition if settings.steered else None
    own: dict[str, Any] = {"corpus": texts, "trait": asked, "allow_other_model": allow_other_model}
    job = Job(
        lambda at: run_dissection(at.backend, loaded, features, settings, **own, **at.given),
        _show,
        lambda at: dissection_work(at.backend, loaded, features, settings, **at.asked),
        name=f"dissect-{loaded.trait}",
        traits=asked,
        model=loaded.model.model,
    )
    run.carry_out(job)


def _show(found: Dissection, _: Session) -> None:
    summary = found.summary
    places = {each["feature"]: each for each in summary["corpus"]["features"]} if summary["corpus"] else {}
    reached = max(summary["ranking"]["random_top"])
    show_rows(
        f"Features most like the vector of {summary['trait']} at layer {summary['layer']} "
        f"(random directions reach a cosine of {reached:.2f})",
        summary["ranking"]["top"],
        {
            "feature": "feature",
            "cosine": ("cosine", "+.3f"),
            "most active on": lambda each: _place(places.get(each["feature"])),
        },
    )
    shares = summary["pursuit"]["shares"]
    show_rows(
        "Share of the vector's squared length that the best features carry together",
        [each for each in summary["pursuit"]["random"] if each["features"] <= len(shares)],
        {
            "features": "features",
            "vector": lambda each: f"{100 * shares[each['features'] - 1]:.1f}%",
            "random directions": lambda each: f"{100 * sum(each['shares']) / len(each['shares']):.1f}%",
        },
    )
    steering = summary["steering"]
    if steering:
        print_table(
            f"Change of the trait score, each steered alone at {steering['coefficient']:+g} [95% interval]",
            ("steered", "change", "minus random features", "further than", ""),
            [_effect_row(name, each, steering["random"]) for name, each in steering["effects"].items()],
        )


def _effect_row(name: str, effect: dict[str, Any] | None, null: Any) -> tuple[str, ...]:
    if effect is None:
        return name, "-", "-", "-", ""
    change, random = effect["change"], effect["feature"] in null
    beyond = None if effect["beyond"] is None else f"{effect['beyond']} of {effect['random_features']}"
    verdict = "" if random else "stands out" if effect["stands_out"] else "clear" if change["clear"] else "not clear"
    title = (f"random {name}" if random else name).replace("_", " ")
    return title, cell(change["vector"]), cell(change["difference"]), cell(beyond), verdict


def _place(found: dict[str, Any] | None) -> str | None:
    if found is None:
        return None
    if not found["examples"]:
        return "nothing in this corpus"
    example = found["examples"][0]
    return f"{example['before'][-30:]}«{example['token']}»{example['after'][:20]}".replace("\n", " ")


BASICS = "persona_lens_basics, which needs no hub"


def capability_command(
    subject: options.Subject,
    vectors: options.Vectors,
    written: SteeringOptions,
    one_layer: LayerOptions,
    task: Annotated[list[str] | None, Option(metavar="TASK", shown=BASICS)] = None,
    include_path: Annotated[list[Path] | None, Option(metavar="DIR")] = None,
    limit: float | None = None,
    shots: int | None = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    out: Annotated[Path | None, Option("Also write every figure here, as JSON.", metavar="FILE")] = None,
    dry_run: options.DryRun = False,
    allow_other_model: options.AllowOtherModel = False,
) -> None:
    """Measure what the model can do, unsteered and steered, on tasks of lm-evaluation-harness.

    Needs lm-evaluation-harness, by the extra `lm-eval`. Changes are taken question by question, with 95% intervals.

    Example: `persona-lens steer capability smollm2-135m runs/optimistic-smollm2-135m --layer 18 --coefficients=1,2`

    Args:
        task: A task of lm-evaluation-harness (`mmlu`, `arc_easy`, ...) or its YAML file. Repeatable.
        include_path: A folder of further task files. Repeatable.
        limit: Samples of a task at most, or a share below 1.
        shots: Solved examples before each question.
    """
    from persona_lens.analysis.capability import capability_changes, capability_changes_work

    shown = candidates(options.open_vectors(vectors), written, one_layer)
    arms = {each.title: each.steering for each in shown if each.steering is not None}
    opened = subject.opening.open(subject.model, offline=dry_run)
    for steering in arms.values() if not allow_other_model else ():
        steering.check_model(opened)
    asked: dict[str, Any] = {
        "tasks": task,
        "include_path": include_path or None,
        "limit": int(limit) if limit is not None and limit.is_integer() else limit,
        "num_fewshot": shots,
        "batch_size": batch_size,
        "seed": seed,
    }
    if dry_run:
        show_work(capability_changes_work(opened, arms, **asked), subject.as_json)
        return
    with showing_progress() as progress:
        found = capability_changes(opened, arms, **asked, progress=progress)
    figures = {"model": opened.info.model, "changes": [change.to_json() for change in found]}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(figures, indent=2) + "\n")
    columns: Mapping[str, Column[Any]] = {
        "task": "task",
        "metric": "metric",
        "steering": "arm",
        "value": ("value", ".3f"),
        "change": (lambda each: each.change or "", "+.3f"),
        "random": (lambda each: each.random or "", "+.3f"),
    }
    title = "Capability, and its change against the unsteered model [95% interval]"
    deliver(figures, lambda: show_rows(title, found, columns), subject.as_json)
