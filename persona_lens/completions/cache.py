"""Completions on disk, by the content of their requests, shared between runs and processes."""

from __future__ import annotations

import json
from pathlib import Path

from persona_lens.completions.messages import Completion
from persona_lens.errors import PersonaLensError
from persona_lens.files import write_bytes
from persona_lens.folders import cache_folder


def default_cache() -> Path:
    """Where completions are kept unless something else is said."""
    return cache_folder() / "completions"


class CompletionCache:
    """A file for each answer, in folders by the first digits of its key.

    A file appears whole or not at all, so that any number of processes can share the folder, on network disks too.

    Args:
        folder: Where; `default_cache` by default.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_cache()

    def get(self, key: str) -> Completion | None:
        """The answer of that key, or None if there is none; a damaged file counts as none."""
        try:
            return Completion.from_json(json.loads(self._file(key).read_bytes()))
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        except OSError as error:
            raise PersonaLensError(f"cannot read the cache of answers in {self.folder}: {error}") from error

    def put(self, key: str, completion: Completion) -> None:
        """Keep an answer."""
        write_bytes(self._file(key), json.dumps(completion.to_json()).encode(), shared=True)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"
