"""Vectors on the Hugging Face hub, or in a plain folder laid out in the same way: `push_vectors`, `pull_vectors`.

A repository holds ``vectors.safetensors``, whose header has everything, and ``README.md``, the card. Nothing that is
there already and differs is written over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_lens.exchange.card import HUB_ID, model_card
from persona_lens.exchange.errors import ExchangeError
from persona_lens.exchange.form import Exported
from persona_lens.exchange.registry import write_new
from persona_lens.vectors import PersonaVectors, load_vectors

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
        ExchangeError: If the repository holds other vectors, or the hub refuses; the message says why.
    """
    card = model_card(vectors, repo, licence)
    content = {VECTORS: vectors.to_bytes(), CARD: card.encode()}
    if _is_folder(repo):
        folder = Path(repo).expanduser()
        write_new(Exported({str(folder / name): each for name, each in content.items()}))
        return Pushed(str(folder))
    _check_id(repo)
    try:
        return _push(repo, content, private)
    except ExchangeError:
        raise
    except Exception as error:  # the hub's client raises errors of several libraries
        raise _explained(error, repo) from error


def pull_vectors(repo: str, *, revision: str | None = None) -> PersonaVectors:
    """Get vectors that `push_vectors` published. Nothing is unpickled.

    Args:
        repo: ``owner/name`` on the hub, or a folder.
        revision: Branch, tag or commit on the hub.

    Raises:
        ExchangeError: If they cannot be had; the message says why.
        VectorsError: If the file is damaged, or of another version.
    """
    if _is_folder(repo):
        if revision is not None:
            raise ExchangeError(f"a revision ({revision!r}) belongs to the hub, and {repo} is a folder; leave it out")
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
        raise ExchangeError(f"{repo!r} is neither a folder nor a hub id; write owner/name, or a folder as ./name")


def _push(repo: str, content: dict[str, bytes], private: bool) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download

    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    head = api.model_info(repo).sha
    if api.file_exists(repo, VECTORS, revision=head):
        there = Path(hf_hub_download(repo, VECTORS, revision=head)).read_bytes()
        if there != content[VECTORS]:
            raise ExchangeError(
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

    from persona_lens.errors import PersonaLensError

    if isinstance(error, PersonaLensError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return ExchangeError(f"{repo} is gated: ask for access at https://huggingface.co/{repo}, then `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return ExchangeError(f"{repo} has no such revision; check its branches and tags, or leave it out")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return ExchangeError(f"{repo} is not in this machine's cache, and the hub cannot be reached; check the network")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ExchangeError(f"there is no {repo} on the hub, or you may not see it; if you may, `hf auth login` first")
    if isinstance(error, errors.EntryNotFoundError):
        return ExchangeError(f"{repo} has no {VECTORS}: it holds no persona vectors, or another program's")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        if error.response.status_code in (401, 403):
            return ExchangeError(f"the hub does not let you write to {repo}: `hf auth login`, or check the owner")
        return ExchangeError(f"the hub refused {repo}: {error.server_message or str(error).splitlines()[0]}")
    return ExchangeError(f"{repo} could not be reached: {(str(error).splitlines() or [type(error).__name__])[0]}")
