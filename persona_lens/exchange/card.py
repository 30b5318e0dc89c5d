"""`model_card`: the page that stands beside vectors on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from persona_lens.characters import printable
from persona_lens.exchange.errors import ExchangeError
from persona_lens.exchange.form import file_name
from persona_lens.vectors import PersonaVectors

LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-]{0,39}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
SHOWN = 400  # characters of a value


def model_card(vectors: PersonaVectors, repo: str, licence: str) -> str:
    """The card as Markdown, with the metadata that the hub reads in front.

    Args:
        vectors: What is described; all figures come from their provenance.
        repo: Where they will be.
        licence: The vectors' licence as the hub writes it, such as ``mit`` or ``cc-by-4.0``.

    Raises:
        ExchangeError: If that is no licence as the hub writes them.
    """
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if not LICENCE.fullmatch(licence):
        raise ExchangeError(f"a licence is written as on the hub, such as mit or cc-by-4.0; got {licence!r}")
    metadata: dict[str, Any] = {
        "license": licence,
        "library_name": "persona-lens",
        "tags": ["persona-vectors", "steering", "interpretability"],
    }
    if HUB_ID.fullmatch(vectors.model.model):
        metadata["base_model"] = vectors.model.model
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML: what others wrote is made harmless by `finalize`
        undefined=StrictUndefined,
        finalize=lambda value: _harmless(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = env.get_template("card.md.j2").render(_facts(vectors, repo, licence))
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{re.sub(chr(10) + '{3,}', chr(10) * 2, text)}"


def _harmless(text: str) -> str:
    """Text of others on one line, in which no character is Markdown or HTML."""
    line = " ".join(printable(text).split())[:SHOWN]
    return re.sub(r"([\\`*\[\]<>|#])", lambda found: f"&#{ord(found.group())};", line)


def _facts(vectors: PersonaVectors, repo: str, licence: str) -> dict[str, Any]:
    given = vectors.provenance
    reductions = sorted(vectors.directions)
    lengths = [vectors.norms(name).tolist() for name in reductions]
    return {
        "trait": vectors.trait,
        "name": file_name(vectors.trait),
        "repo": repo,
        "licence": licence,
        "model": vectors.model,
        "reductions": reductions,
        "description": _described(given),
        "tuned": _tuned(vectors),
        "kept": _kept(given.get("counts")),
        "missing": list(vectors.missing_layers),
        "norms": [[layer, *(f"{values[layer]:.2f}" for values in lengths)] for layer in range(vectors.model.n_layers)],
        "origin": _origin(given),
        "made": list(_made(given)),
        "digest": vectors.content_hash.removeprefix("sha256:"),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _described(given: Mapping[str, Any]) -> str:
    description = _mapping(given.get("trait")).get("description")
    return description if isinstance(description, str) else ""


def _tuned(vectors: PersonaVectors) -> dict[str, Any] | None:
    if vectors.tuned is None:
        return None
    found = _mapping(vectors.provenance["tuned"])
    confirmed = _mapping(found.get("confirmed"))
    return {
        "layer": vectors.tuned.layer,
        "coefficient": f"{vectors.tuned.coefficient:g}",
        "reduction": vectors.tuned.reduction,
        "questions": found.get("confirm_questions", "some"),
        "change": _estimate(confirmed.get("change")),
        "random": _estimate(confirmed.get("random")) or "an amount that was not measured",
        "warnings": [each for each in _listed(found.get("warnings")) if isinstance(each, str)],
    }


def _estimate(value: Any) -> str:
    numbers = [_mapping(value).get(name) for name in ("mean", "low", "high")]
    if not all(isinstance(number, int | float) for number in numbers):
        return ""
    mean, low, high = (float(number or 0) for number in numbers)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _kept(counts: Any) -> str:
    arms = {arm: each for arm, each in sorted(_mapping(counts).items()) if isinstance(each, Mapping)}
    numbers = {arm: [value for value in each.values() if isinstance(value, int)] for arm, each in arms.items()}
    return "; ".join(f"{arm} {arms[arm].get('kept')} of {sum(values)}" for arm, values in numbers.items())


def _origin(given: Mapping[str, Any]) -> str:
    if given.get("kind") == "extraction":
        return (
            "The model answered the same questions under instructions that call the trait forth and under instructions "
            "that call forth its opposite; the vector is the difference of the mean activations (Chen et al., Persona "
            "Vectors, 2025)."
        )
    if given.get("kind") == "imported":
        form = _mapping(given.get("imported")).get("format", "another program's")
        return f"They were imported from a file of the format {form}, which does not say how they were made."
    return "They were computed from other vectors, or how they were made is not known."


def _made(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("settings", "judge", "versions", "imported", "not_known"):
        value = given.get(name)
        if value:
            yield name.replace("_", " "), _flat(value)


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(each)}" for name, each in value.items() if each not in (None, "", [], {}))
    if isinstance(value, list | tuple):
        return "; ".join(map(_flat, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
