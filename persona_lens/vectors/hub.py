"""Vectors on the Hugging Face hub, or in a folder laid out in the same way, and the card that stands beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lens.core.text import printable
from persona_lens.vectors.formats import write_new
from persona_lens.vectors.formats.form import FormatError, file_name
from persona_lens.vectors.provenance import kept_of_each_arm
from persona_lens.vectors.vectors import PersonaVectors, load_vectors

VECTORS = "vectors.safetensors"
CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What was put where.

    Attributes:
        place: The folder, or the address of the repository.
        commit: The commit on the hub; None in a folder.
    """

    place: str
    commit: str | None = None


def push_vectors(vectors: PersonaVectors, repo: str, *, licence: str, private: bool = False) -> Pushed:
    """Publish vectors with a card.

    Args:
        vectors: The vectors.
        repo: ``owner/name`` on the hub, or a folder, written as a path (``./name``, ``/data/name``) or existing.
        licence: The vectors' licence, as the hub writes licences.
        private: Whether a repository that has to be made is for its owner only.

    Raises:
        FormatError: If the repository holds other vectors, or the hub refuses; the message says why.
    """
    card = model_card(vectors, repo, licence)
    content = {VECTORS: vectors.to_bytes(), CARD: card.encode()}
    if _is_folder(repo):
        folder = Path(repo).expanduser()
        write_new({str(folder / name): each for name, each in content.items()})
        return Pushed(str(folder))
    _check_id(repo)
    try:
        return _push(repo, content, private)
    except FormatError:
        raise
    except Exception as error:  # the hub's client raises errors of several libraries
        raise _explained(error, repo) from error


def pull_vectors(repo: str, *, revision: str | None = None) -> PersonaVectors:
    """Get vectors that `push_vectors` published. Nothing is unpickled.

    Args:
        repo: ``owner/name`` on the hub, or a folder.
        revision: Branch, tag or commit on the hub.

    Raises:
        FormatError: If they cannot be had; the message says why.
        VectorsError: If the file is damaged, or of another version.
    """
    if _is_folder(repo):
        if revision is not None:
            raise FormatError(f"a revision ({revision!r}) belongs to the hub, and {repo} is a folder; leave it out")
        return load_vectors(Path(repo).expanduser() / VECTORS)
    _check_id(repo)
    try:
        from huggingface_hub import hf_hub_download

        return load_vectors(hf_hub_download(repo, VECTORS, revision=revision))
    except Exception as error:
        raise _explained(error, repo) from error


def _is_folder(repo: str) -> bool:
    return repo.startswith((".", "~", "/")) or os.path.isabs(repo) or Path(repo).is_dir()


def _check_id(repo: str) -> None:
    if not HUB_ID.fullmatch(repo):
        raise FormatError(f"{repo!r} is neither a folder nor a hub id; write owner/name, or a folder as ./name")


def _push(repo: str, content: dict[str, bytes], private: bool) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    head = api.model_info(repo).sha
    if api.file_exists(repo, VECTORS, revision=head):
        there = Path(hf_hub_download(repo, VECTORS, revision=head)).read_bytes()
        if there != content[VECTORS]:
            raise FormatError(
                f"{repo} holds other vectors; push to another repository, or delete {VECTORS} there first"
            )
    made: Any = api.create_commit(
        repo,
        [CommitOperationAdd(name, each) for name, each in content.items()],
        commit_message="Persona vectors",
        parent_commit=head,  # what others pushed in the meantime is not written over
    )
    return Pushed(str(url), made.oid)


def _explained(error: Exception, repo: str) -> Exception:
    from huggingface_hub import errors

    from persona_lens.core.errors import PersonaLensError

    if isinstance(error, PersonaLensError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return FormatError(f"{repo} is gated: ask for access at https://huggingface.co/{repo}, then `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return FormatError(f"{repo} has no such revision; check its branches and tags, or leave it out")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return FormatError(f"{repo} is not in this machine's cache, and the hub cannot be reached; check the network")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FormatError(f"there is no {repo} on the hub, or you may not see it; if you may, `hf auth login` first")
    if isinstance(error, errors.EntryNotFoundError):
        return FormatError(f"{repo} has no {VECTORS}: it holds no persona vectors, or another program's")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        if error.response.status_code in (401, 403):
            return FormatError(f"the hub does not let you write to {repo}: `hf auth login`, or check the owner")
        return FormatError(f"the hub refused {repo}: {error.server_message or str(error).splitlines()[0]}")
    return FormatError(f"{repo} could not be reached: {(str(error).splitlines() or [type(error).__name__])[0]}")


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
        FormatError: If that is no licence as the hub writes them.
    """
    if not LICENCE.fullmatch(licence):
        raise FormatError(f"a licence is written as on the hub, such as mit or cc-by-4.0; got {licence!r}")
    metadata: dict[str, Any] = {
        "license": licence,
        "library_name": "persona-lens",
        "tags": ["persona-vectors", "steering", "interpretability"],
    }
    if HUB_ID.fullmatch(vectors.model.model):
        metadata["base_model"] = vectors.model.model
    return card(Path(__file__).parent / "card.md.j2", metadata, _facts(vectors, repo, licence))


def card(template: Path, metadata: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """A card as Markdown, with the metadata that the hub reads in front.

    Args:
        template: What is filled in, by jinja.
        metadata: What stands in front.
        facts: What it is filled in with; texts among them are made harmless.
    """
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=False,  # Markdown, not HTML: what others wrote is made harmless by `finalize`
        undefined=StrictUndefined,
        finalize=lambda value: _harmless(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = env.get_template(template.name).render(facts)
    front = yaml.safe_dump(dict(metadata), sort_keys=False)
    return f"---\n{front}---\n\n{re.sub(chr(10) + '{3,}', chr(10) * 2, text)}"


def _harmless(text: str) -> str:
    """Text of others on one line, in which no character is Markdown or HTML."""
    line = " ".join(printable(text).split())[:SHOWN]
    return re.sub(r"([\\`*\[\]<>|#])", lambda found: f"&#{ord(found.group())};", line)


def _facts(vectors: PersonaVectors, repo: str, licence: str) -> dict[str, Any]:
    given, description = vectors.provenance, vectors.stored("trait").get("description")
    reductions = sorted(vectors.directions)
    lengths = [vectors.norms(name).tolist() for name in reductions]
    return {
        "trait": vectors.trait,
        "name": file_name(vectors.trait),
        "repo": repo,
        "licence": licence,
        "model": vectors.model,
        "reductions": reductions,
        "description": description if isinstance(description, str) else "",
        "tuned": _tuned(vectors),
        "kept": kept_of_each_arm(given.get("counts")),
        "missing": list(vectors.missing_layers),
        "norms": [[layer, *(f"{values[layer]:.2f}" for values in lengths)] for layer in range(vectors.model.n_layers)],
        "origin": _origin(given),
        "made": list(made(given)),
        "digest": vectors.content_hash.removeprefix("sha256:"),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tuned(vectors: PersonaVectors) -> dict[str, Any] | None:
    if vectors.tuned is None:
        return None
    found = vectors.stored("tuned")
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


def _origin(given: Mapping[str, Any]) -> str:
    if given.get("kind") == "extraction":
        fitted = fitted_by(given)
        how = f"made of the activations by the method {fitted}" if fitted else "the difference of the mean activations"
        return (
            "The model answered the same questions under instructions that call the trait forth and under instructions "
            f"that call forth its opposite (Chen et al., Persona Vectors, 2025); the vector is {how}."
        )
    if given.get("kind") == "imported":
        form = _mapping(given.get("imported")).get("format", "another program's")
        return f"They were imported from a file of the format {form}, which does not say how they were made."
    return "They were computed from other vectors, or how they were made is not known."


def fitted_by(given: Mapping[str, Any]) -> str:
    """How `persona_lens.vectors.fit` made vectors, by their provenance: ``lda (impolite erased)``; empty for others."""
    fit, kept_out = _mapping(given.get("fit")), []
    if not fit:
        return ""
    for name, words in (("erased", "erased"), ("without", "projected out")):
        if traits := [str(_mapping(each).get("trait")) for each in _listed(fit.get(name))]:
            kept_out.append(f"{', '.join(traits)} {words}")
    return f"{fit.get('method')} ({'; '.join(kept_out)})" if kept_out else str(fit.get("method"))


def made(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How vectors were made, as their provenance says it: names and values in words."""
    for name in ("settings", "judge", "fit", "versions", "imported", "not_known"):
        value = given.get(name)
        if value:
            yield name.replace("_", " "), _flat(value)


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(each)}" for name, each in value.items() if each not in (None, "", [], {}))
    if isinstance(value, list | tuple):
        return "; ".join(map(_flat, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
