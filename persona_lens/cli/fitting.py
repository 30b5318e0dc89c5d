"""``persona-lens vectors fit`` and ``methods``: directions made anew by another method, and which methods there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from persona_lens.cli import options
from persona_lens.cli.display import print_plain_table, say, showing_progress
from persona_lens.cli.extraction import show_separation
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option, argument

if TYPE_CHECKING:
    from persona_lens.core.plugins import Plugin
    from persona_lens.vectors.methods import Method


def fit_command(
    run: Annotated[Path, argument("RUN", "Run folder of an extraction; it is not changed.")],
    out: Annotated[Path, Option("Folder of the vectors.safetensors; none is written over.", metavar="FOLDER")],
    method: Annotated[str, Option(metavar="NAME")] = "difference",
    without: Annotated[list[Path] | None, Option(metavar="VECTORS")] = None,
    erase: Annotated[list[Path] | None, Option(metavar="RUN")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a trait's vectors anew by another method, of what an extraction saved; no model is opened.

    **difference** of means, **length** (the same at equal length of the responses), **logistic** probe, **lda**,
    **pca** of twins, and those of other packages: `persona-lens vectors methods` says what each is. Shown is how well
    the method separates questions that it has not seen.

    Examples:
    `persona-lens vectors fit runs/optimistic-smollm2-135m --method lda --out runs/optimistic-lda`

    `persona-lens vectors fit runs/optimistic-smollm2-135m --without runs/impolite --out runs/optimistic-not-impolite`

    Args:
        method: How the direction is made.
        without: Vectors of another trait, which are projected out. Repeatable.
        erase: Extraction of another trait, whose arms are erased from the activations first (LEACE). Repeatable.
    """
    from persona_lens.vectors.fit import fit_vectors
    from persona_lens.vectors.geometry import likeness

    with showing_progress() as progress:
        found = fit_vectors(run, method, without=without or (), erase=erase or (), progress=progress)
    file = found.save(out / "vectors.safetensors")
    separation, cosines = (
        found.provenance["separation"],
        likeness(found, options.open_vectors(run)).to_json()["cosines"],
    )

    def show() -> None:
        more = {"cosine with the run's own": (lambda row: cosines[row["layer"]], "+.3f")}
        show_separation(separation, found.norms().tolist(), more)
        say(f"vectors: {file}")

    told = {"file": str(file), "content_hash": found.content_hash, "fit": found.provenance["fit"]}
    deliver({**told, "separation": separation, "cosines": cosines}, show, as_json)


def methods_command(as_json: options.AsJson = False) -> None:
    """List the methods that `vectors fit` makes directions by, those of other packages too.

    Example: `persona-lens vectors methods`
    """
    from persona_lens.vectors.methods import METHODS

    there = METHODS.everything()
    rows = [(name, each.package, _said(each)) for name, each in there.items()]
    listed = [_listed(name, each) for name, each in there.items()]
    deliver({"methods": listed}, lambda: print_plain_table(("method", "package", ""), rows), as_json)


def _said(plugin: Plugin[Method]) -> str:
    return f"cannot be loaded: {plugin.broken}" if plugin.found is None else plugin.found.summary


def _listed(name: str, plugin: Plugin[Method]) -> dict[str, Any]:
    known = plugin.found
    about = {} if known is None else {each: getattr(known, each) for each in ("summary", "source", "own_length")}
    needs = [] if known is None else list(known.requires)
    return {"name": name, "package": plugin.package, "broken": plugin.broken, **about, "requires": needs}
