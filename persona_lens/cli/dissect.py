"""``persona-lens dissect``: the features of a sparse autoencoder that a vector is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import cell, interval_text, print_table, show_rows
from persona_lens.cli.runner import Experiment, Run, Session
from persona_lens.cli.settings import Fields, Given, Option

if TYPE_CHECKING:
    from persona_lens.analysis.dissection import Dissection, DissectSettings


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

    Needs SAELens: `pip install 'persona-lens[sae]'`. Random directions stand beside cosines and reconstruction, random
    features beside the steered ones.

    Example: `persona-lens dissect smollm2-135m runs/optimistic-smollm2-135m --sae sae-18 --coefficient 4 --corpus
    runs/optimistic-smollm2-135m/rollouts.jsonl`

    Args:
        sae: A folder that SAELens saved, or RELEASE/ID of a public one; its layer is the one dissected.
        corpus: Texts to look for features in: .txt, .jsonl, .csv or .parquet, such as a run's rollouts.jsonl.
        max_texts: Texts of the corpus that are read.
    """
    from persona_lens import __version__
    from persona_lens.analysis.dissection import dissect as run_dissection
    from persona_lens.analysis.dissection import dissection_work
    from persona_lens.analysis.examples import read_corpus
    from persona_lens.analysis.features import load_features
    from persona_lens.reports.dissection import render_dissection
    from persona_lens.vectors import load_vectors

    loaded, features = load_vectors(vectors), load_features(sae)
    features.check(loaded, allow_other_model=allow_other_model)
    texts = read_corpus(corpus, limit=max_texts) if corpus else []
    settings: DissectSettings = given.make()
    asked = loaded.trait_definition if settings.steered else None
    experiment = Experiment(
        lambda at: run_dissection(
            at.backend,
            loaded,
            features,
            settings,
            corpus=texts,
            folder=at.folder,
            trait=asked,
            judge=at.judge,
            chat=at.chat,
            allow_other_model=allow_other_model,
            progress=at.shown,
        ),
        _show,
        lambda at: dissection_work(at.backend, loaded, features, settings, at.chat, at.judge),
        traits=asked,
        name=f"dissect-{loaded.trait}",
        model=loaded.model.model,
        page=lambda found: render_dissection(found.summary, __version__),
    )
    run.carry_out(experiment)


def _show(found: Dissection, _: Session) -> None:
    summary = found.summary
    places = {each["feature"]: each for each in summary["corpus"]["features"]} if summary["corpus"] else {}
    reached = max(summary["ranking"]["random_top"])
    show_rows(
        f"Features most like the vector of {summary['trait']} at layer {summary['layer']} "
        f"(random directions reach a cosine of {reached:.2f})",
        summary["ranking"]["top"],
        {
            "feature": lambda each: each["feature"],
            "cosine": (lambda each: each["cosine"], "+.3f"),
            "most active on": lambda each: _place(places.get(each["feature"])),
        },
    )
    shares = summary["pursuit"]["shares"]
    show_rows(
        "Share of the vector's squared length that the best features carry together",
        [each for each in summary["pursuit"]["random"] if each["features"] <= len(shares)],
        {
            "features": lambda each: each["features"],
            "vector": lambda each: f"{100 * shares[each['features'] - 1]:.1f}%",
            "random directions": lambda each: f"{100 * sum(each['shares']) / len(each['shares']):.1f}%",
        },
    )
    if summary["steering"]:
        _show_effects(summary["steering"])


def _show_effects(steering: dict[str, Any]) -> None:
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
    return title, interval_text(change["vector"]), interval_text(change["difference"]), cell(beyond), verdict


def _place(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    if not found["examples"]:
        return "nothing in this corpus"
    example = found["examples"][0]
    return f"{example['before'][-30:]}«{example['token']}»{example['after'][:20]}".replace("\n", " ")
