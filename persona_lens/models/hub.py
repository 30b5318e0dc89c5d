"""The Hugging Face hub: the commit a model is at, and what its errors mean for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from persona_lens.core.errors import ModelError
from persona_lens.models.embedded import DEFAULT_MODEL
from persona_lens.models.source import ModelSource

__all__ = ["hub_error", "pinned"]

_COMMIT = re.compile("[0-9a-f]{40}")


def pinned(source: ModelSource) -> ModelSource:
    """Tie a hub model to the commit its revision stands for now.

    Weights, configuration and tokenizer are then of one commit even if the repository changes in between, and
    the commit is the model's identity. Local models are returned as they are, and so is a pinned one. Of an adapter the
    base is pinned.

    Args:
        source: The source.

    Returns:
        The source with ``content`` set.

    Raises:
        ModelError: The hub cannot be reached or does not give the model out; the message says what to do.
    """
    if source.base is not None:
        return replace(source, base=pinned(source.base))
    if source.content is not None or source.is_local:
        return source
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return replace(source, content=source.revision)
    try:
        commit = _current_commit(source)
    except ModelError:
        raise
    except Exception as error:  # the hub's client raises errors of half a dozen libraries
        raise hub_error(error, source) from error
    return replace(source, revision=commit, content=commit)


def _current_commit(source: ModelSource) -> str:
    import huggingface_hub
    from huggingface_hub import errors

    refusals = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    url = huggingface_hub.hf_hub_url(source.location, "config.json", revision=source.revision)
    try:
        # One question, answered or not: a download would retry for half a minute before it says "no network".
        answer = huggingface_hub.get_hf_file_metadata(url, timeout=15)
    except refusals:
        raise
    except Exception:  # noqa: BLE001 - out of reach in one of many ways: the cache is what is left
        cached = huggingface_hub.hf_hub_download(
            source.location, "config.json", revision=source.revision, local_files_only=True
        )
        return Path(cached).parent.name  # .../snapshots/<commit>/config.json
    if answer.commit_hash is None:
        raise ModelError(f"what answers at {url} is not a Hugging Face hub; check HF_ENDPOINT and the proxy")
    return answer.commit_hash


def hub_error(error: BaseException, source: ModelSource) -> ModelError:
    """Say in one sentence why the hub did not give a model, and what to do.

    Args:
        error: What its client, or transformers, raised.
        source: The model asked for.

    Returns:
        The error to raise.
    """
    from huggingface_hub import errors

    name = source.location
    chain = list(_chain(error))
    texts = " ".join(str(link) for link in chain)

    def has(*types: type[BaseException]) -> bool:
        return any(isinstance(link, types) for link in chain)

    if has(errors.GatedRepoError):
        return ModelError(f"{name} is gated: ask for access at https://huggingface.co/{name}, then run `hf auth login`")
    if has(errors.RevisionNotFoundError):
        return ModelError(f"{name} has no revision {source.revision!r}; check its branches and tags, or leave it out")
    if has(errors.RepositoryNotFoundError):
        return ModelError(
            f"{name!r} is neither a folder here nor a model on the hub; check the spelling, or if it is "
            "private run `hf auth login`"
        )
    if has(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return ModelError(
            f"{name} is not in this machine's cache and the hub cannot be reached (or HF_HUB_OFFLINE is "
            "set): connect once to download it, give a local folder, or use the embedded model "
            f"{DEFAULT_MODEL!r}"
        )
    if has(errors.EntryNotFoundError):
        return ModelError(f"{name} has no config.json on the hub, so it is not a transformers model")
    if has(errors.HFValidationError):
        return ModelError(f"{name!r} is not a possible hub id; it is written owner/name")
    if "safetensors" in texts:
        return ModelError(
            f"{name} has no safetensors weights, and pickled ones can run code when they are opened; if you "
            "trust it, convert it once with https://huggingface.co/spaces/safetensors/convert, or use "
            "another model"
        )
    return ModelError(f"{name} could not be had from the hub: {str(error).splitlines()[0] if str(error) else error!r}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
