"""``persona-lens dissect``: the features of a sparse autoencoder that a vector is made of."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_lens.cli import judges, options
from persona_lens.cli.display import say, say_json
from persona_lens.cli.grouping import grouped
from persona_lens.cli.sweep import ReductionOption, Vectors

if TYPE_CHECKING:
    from persona_lens.analysis.dissection import Dissection


@grouped
def dissect(
    model: options.Model,
    vectors: Vectors,
    sae: Annotated[
        str,
        typer.Option(
            "--sae",
            metavar="SAE",
            help="A folder that SAELens saved, or RELEASE/ID of a public one; its layer is the one dissected.",
            show_default=False,
        ),
    ],
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            metavar="FILE",
            help="Texts to look for features in: .txt, .jsonl, .csv or .parquet, such as a run's rollouts.jsonl.",
            show_default=False,
        ),
    ] = None,
    max_texts: Annotated[int, typer.Option("--max-texts", help="Texts of the corpus that are read.")] = 500,
    show: Annotated[int, typer.Option("--show", help="Features shown at either end.")] = 20,
    pursuit: Annotated[int, typer.Option("--pursuit", help="Features of the sparse reconstruction.")] = 64,
    steered: Annotated[
        int, typer.Option("--steered", help="How many of the top features to steer alone; 0 steers nothing.")
    ] = 5,
    random_features: Annotated[
        int, typer.Option("--random-features", help="Random features steered beside them.")
    ] = 10,
    coefficient: Annotated[
        float | None,
        typer.Option(
            "--coefficient",
            help="Every step is as long as this multiple of the vector.",
            show_default="what was tuned at this layer",
        ),
    ] = None,
    questions: Annotated[int, typer.Option(help="How many of the held-out questions to ask.")] = 20,
    samples: Annotated[int, typer.Option(help="Responses for each question and feature.")] = 1,
    reduction: ReductionOption = "response_mean",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Run folder; kept and resumed.", show_default="runs/dissect-TRAIT-MODEL"),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 48,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    dry_run: options.DryRun = False,
    judge: judges.JudgeName = "likelihood",
    allow_other_model: Annotated[
        bool, typer.Option("--allow-other-model", help="Accept an autoencoder of a model with another name.")
    ] = False,
    as_json: options.AsJson = False,
    *,
    opening: options.ModelOptions,
    judging: judges.JudgeOptions,
) -> None:
    """Take a vector apart into the features of a sparse autoencoder, and steer the top ones alone.

    Needs SAELens: `pip install 'persona-lens[sae]'`. Random directions stand beside cosines and reconstruction, random
    features beside the steered ones.

    Example: `persona-lens dissect smollm2-135m runs/optimistic-smollm2-135m --sae sae-18 --coefficient 4 --corpus
    runs/optimistic-smollm2-135m/rollouts.jsonl`
    """
    from persona_lens import __version__
    from persona_lens.analysis.dissection import DissectSettings, dissection_work
    from persona_lens.analysis.dissection import dissect as run_dissection
    from persona_lens.analysis.examples import read_corpus
    from persona_lens.analysis.features import load_features
    from persona_lens.cli.display import showing_progress
    from persona_lens.reports.dissection import render_dissection
    from persona_lens.runs.rollouts import RolloutSettings
    from persona_lens.vectors import load_vectors

    loaded, features = load_vectors(vectors), load_features(sae)
    features.check(loaded, allow_other_model=allow_other_model)
    texts = read_corpus(corpus, limit=max_texts) if corpus else []
    settings = DissectSettings(
        show=show,
        pursuit=pursuit,
        steered=steered,
        random_features=random_features,
        coefficient=coefficient,
        questions=questions,
        samples=samples,
        reduction=reduction,
        seed=seed,
        rollouts=RolloutSettings(max_new_tokens, temperature, batch_size=batch_size),
    )
    opened = opening.open(model, offline=dry_run)
    chat = opening.chat(opened)
    asked = loaded.trait_definition if steered else None
    scoring = judging.open(judge, asked, opened, chat, opening.dtype, opening.device) if asked else None
    work = partial(dissection_work, opened, loaded, features, settings, chat, scoring)
    if options.planned(work, opening, dry_run, as_json):
        return
    folder = out or options.run_folder(f"dissect-{loaded.trait}", loaded.model.model)
    with judges.saying_spending(scoring), showing_progress() as progress:
        found = run_dissection(
            opened,
            loaded,
            features,
            settings,
            corpus=texts,
            folder=folder,
            trait=asked,
            judge=scoring,
            chat=chat,
            allow_other_model=allow_other_model,
            progress=progress,
        )
    options.say_traffic(opened)
    options.write_report(folder / options.REPORT, render_dissection(found.summary, __version__))
    if as_json:
        say_json({"folder": str(folder), **found.summary})
    else:
        _show(found, folder)


def _show(found: Dissection, folder: Path) -> None:
    from persona_lens.cli.display import print_table

    summary = found.summary
    places = {each["feature"]: each for each in summary["corpus"]["features"]} if summary["corpus"] else {}
    reached = max(summary["ranking"]["random_top"])
    print_table(
        f"Features most like the vector of {summary['trait']} at layer {summary['layer']} "
        f"(random directions reach a cosine of {reached:.2f})",
        ("feature", "cosine", "most active on"),
        [
            (str(each["feature"]), f"{each['cosine']:+.3f}", _place(places.get(each["feature"])))
            for each in summary["ranking"]["top"]
        ],
    )
    shares = summary["pursuit"]["shares"]
    null = {each["features"]: each["shares"] for each in summary["pursuit"]["random"]}
    print_table(
        "Share of the vector's squared length that the best features carry together",
        ("features", "vector", "random directions"),
        [
            (str(k), f"{100 * shares[k - 1]:.1f}%", f"{100 * sum(of) / len(of):.1f}%")
            for k, of in null.items()
            if k <= len(shares)
        ],
    )
    if summary["steering"]:
        _show_effects(summary["steering"])
    say(f"report: {folder / options.REPORT}")


def _show_effects(steering: dict[str, Any]) -> None:
    from persona_lens.cli.display import interval_text, print_table

    rows = []
    for name, each in steering["effects"].items():
        if each is None:
            rows.append((name, "-", "-", "-", ""))
            continue
        change, random = each["change"], each["feature"] in steering["random"]
        beyond = "-" if each["beyond"] is None else f"{each['beyond']} of {each['random_features']}"
        verdict = "" if random else "stands out" if each["stands_out"] else "clear" if change["clear"] else "not clear"
        title = f"random {name}" if random else name
        rows.append(
            (
                title.replace("_", " "),
                interval_text(change["vector"]),
                interval_text(change["difference"]),
                beyond,
                verdict,
            )
        )
    print_table(
        f"Change of the trait score, each steered alone at {steering['coefficient']:+g} [95% interval]",
        ("steered", "change", "minus random features", "further than", ""),
        rows,
    )


def _place(found: dict[str, Any] | None) -> str:

    if found is None:
        return "-"
    if not found["examples"]:
        return "nothing in this corpus"
    example = found["examples"][0]
    return f"{example['before'][-30:]}«{example['token']}»{example['after'][:20]}".replace("\n", " ")
