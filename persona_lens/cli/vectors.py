"""``persona-lens vectors show``: what is in vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persona_lens.cli import options
from persona_lens.cli.display import print_table, say, say_json
from persona_lens.core.text import counted, printable

if TYPE_CHECKING:
    from persona_lens.vectors import PersonaVectors


def show(vectors: options.Vectors, as_json: options.AsJson = False) -> None:
    """Show what vectors are of, where they come from, and how long they are.

    Example: `persona-lens vectors show runs/optimistic-smollm2-135m`
    """
    from persona_lens.vectors import load_vectors

    loaded = load_vectors(vectors)
    found = _content(loaded)
    if as_json:
        say_json(found)
        return
    say(printable(loaded.trait))
    for name, value in _facts(found).items():
        say(f"  {name + ':':<12}{printable(value)}")
    norms: Mapping[str, list[float]] = found["norms"]
    rows = [(str(at), *(f"{values[at]:.2f}" for values in norms.values())) for at in range(loaded.model.n_layers)]
    head = ("layer", *(name.replace("_", " ") for name in norms))
    print_table("Length at each layer, residual-stream units", head, rows)


def _content(vectors: PersonaVectors) -> dict[str, Any]:
    """What is told of vectors, as JSON values; nothing is taken for granted of what a file says of itself."""
    from dataclasses import asdict

    given = vectors.provenance
    judge = given.get("judge")
    return {
        "trait": vectors.trait,
        "content_hash": vectors.content_hash,
        "model": asdict(vectors.model),
        "norms": {name: vectors.norms(name).tolist() for name in sorted(vectors.directions)},
        "tuned": given.get("tuned"),
        "judge": judge,
        "calibrated": isinstance(judge, Mapping) and bool(judge.get("calibration")),
        "counts": given.get("counts"),
        "settings": given.get("settings"),
        "versions": given.get("versions"),
        "origin": _origin(given),
        "imported": given.get("imported"),
        "missing_layers": list(vectors.missing_layers),
    }


def _origin(given: Mapping[str, Any]) -> str:
    if "random_like" in given:
        return f"random directions of the norms of {given['random_like']}, seed {given.get('seed')}"
    if "parts" in given:
        return "a sum or difference of other vectors"
    if "scaled" in given:
        return "other vectors, scaled"
    if given.get("kind") == "imported":
        return f"imported; not known: {', '.join(map(str, given.get('not_known') or ()))}"
    return "extraction" if given.get("kind") == "extraction" else "not known"


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    model = found["model"]
    facts = {
        "model": f"{model['model']}, {counted(model['n_layers'], 'layer')} of {model['d_model']}, {model['dtype']}",
        "weights": model["weights"],
        "origin": found["origin"],
        "imported": _listed(found["imported"], ("format", "file", "file_sha256")),
        "no vector": ", ".join(map(str, found["missing_layers"])),
        "tuned": _listed(found["tuned"], ("layer", "coefficient", "reduction")) or "no layer was tuned",
        "judge": _listed(found["judge"], ("judge", "model", "server")),
        "kept": _kept(found["counts"]),
        "settings": _flat(found["settings"]),
        "versions": _flat(found["versions"]),
        "content": found["content_hash"],
    }
    if found["calibrated"]:
        facts["judge"] += ", with its calibration"
    return {name: str(value) for name, value in facts.items() if value}


def _kept(counts: Any) -> str:
    if not isinstance(counts, Mapping):
        return ""
    arms = {arm: each for arm, each in counts.items() if isinstance(each, Mapping)}
    return "; ".join(f"{arm} {each.get('kept')} of {sum(_numbers(each))}" for arm, each in sorted(arms.items()))


def _numbers(counts: Mapping[str, Any]) -> list[int]:
    return [value for value in counts.values() if isinstance(value, int)]


def _listed(given: Any, names: tuple[str, ...]) -> str:
    if not isinstance(given, Mapping):
        return ""
    values = [(name, given[name]) for name in names if isinstance(given.get(name), str | int | float)]
    return ", ".join(f"{name} {value}" if not isinstance(value, str) else value for name, value in values)


def _flat(given: Any) -> str:
    from persona_lens.reports.page import flat

    return ", ".join(f"{name} {value}" for name, value in flat(given)) if isinstance(given, Mapping) else ""
