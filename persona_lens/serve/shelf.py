"""`Shelf`: the vectors that a server has at hand, those that clients bring among them, and steerings stored by name."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from persona_lens.backend import Backend
from persona_lens.core.documents import DocumentError, read_json
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import write_text
from persona_lens.core.text import in_short
from persona_lens.monitoring import Gauge
from persona_lens.steering import Steering
from persona_lens.vectors import PersonaVectors, VectorsError, load_vectors

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
MOST_UPLOADS, MOST_PRESETS = 32, 256
LONGEST_EDITS = 2000


class ShelfError(PersonaLensError):
    """What cannot be put on the shelf, or is not on it."""


class Shelf:
    """Vectors by name, and presets. Safe to use from several threads.

    Args:
        backend: The model that all of it is for.
        vectors: Those that stay; they go by the names of their traits.
        layers: Where each trait is read; None for where each was tuned.
        presets: A file that presets are read from and kept in; None keeps them as long as this lives.
        allow_other_model: Take vectors of another model.

    Raises:
        ShelfError: If two vectors share a name, or the presets cannot be read.
        VectorsError: If vectors belong to another model, or none says where to read a trait.
    """

    def __init__(
        self,
        backend: Backend,
        vectors: Sequence[PersonaVectors],
        layers: Sequence[int] | None = None,
        presets: Path | None = None,
        *,
        allow_other_model: bool = False,
    ) -> None:
        self._backend, self._layers, self._allow = backend, layers, allow_other_model
        self._lock = threading.Lock()
        self._own: dict[str, PersonaVectors] = {}
        self._brought: dict[str, PersonaVectors] = {}
        for each in vectors:
            if each.trait in self._own:
                raise ShelfError(f"two vectors are of the trait {each.trait!r}; give one")
            self._check(each)
            self._own[each.trait] = each
        self._file = presets
        self._presets: dict[str, str] = {}
        if presets is not None and presets.exists():
            self._presets = self._read(presets)

    @property
    def vectors(self) -> dict[str, PersonaVectors]:
        """All vectors by name."""
        with self._lock:
            return {**self._own, **self._brought}

    @property
    def brought(self) -> tuple[str, ...]:
        """Names of those that clients brought."""
        with self._lock:
            return tuple(self._brought)

    @property
    def presets(self) -> dict[str, str]:
        """Steerings by name, in their notation."""
        with self._lock:
            return dict(self._presets)

    def gauges(self, names: Sequence[str] | None = None) -> list[Gauge]:
        """Where traits are read.

        Args:
            names: Such as ``evil@20``, or ``evil`` for the layers that the shelf reads; None for every trait there.

        Raises:
            ShelfError: If there is no such trait.
            VectorsError: If there is no such layer.
        """
        found: dict[str, Gauge] = {}
        for name in self.vectors if names is None else names:
            trait, at, layer = name.partition("@")
            if at and not layer.isdecimal():
                raise ShelfError(f"what is watched is written evil or evil@20; got {in_short(name)!r}")
            for gauge in self._gauges_of(trait, int(layer[:9]) if at else None):
                found[str(gauge)] = gauge
        return list(found.values())

    def _gauges_of(self, trait: str, layer: int | None) -> list[Gauge]:
        vectors = self.vectors.get(trait)
        if vectors is None:
            raise ShelfError(
                f"there is no trait {in_short(trait)!r} here; there are {', '.join(self.vectors) or 'none'}"
            )
        chosen = [layer] if layer is not None else self._layers if self._layers is not None else [None]
        return [Gauge.of(vectors, each) for each in chosen]

    def steering(self, edits: str) -> Steering | None:
        """A steering from its notation or a preset's name; None for nothing.

        Raises:
            NotationError: If it is not written as steerings are.
            SteeringError: If it names vectors that are not there.
        """
        text = self.presets.get(edits.strip(), edits).strip()
        if len(text) > LONGEST_EDITS:
            raise ShelfError(f"a steering has at most {LONGEST_EDITS} characters")
        return Steering.parse(text, self.vectors) if text else None

    def bring(self, name: str, content: bytes) -> PersonaVectors:
        """Add vectors that a client sent, a file as `PersonaVectors.save` writes it.

        Raises:
            ShelfError: If the name is taken or no name, there are too many, or the file is none.
            VectorsError: If they belong to another model.
        """
        self._check_name(name)
        with TemporaryDirectory(prefix="persona-lens-") as folder:
            file = Path(folder) / "vectors.safetensors"
            file.write_bytes(content)
            try:
                loaded = load_vectors(file)
            except VectorsError as error:
                raise ShelfError(str(error).replace(str(file), "what was sent")) from None
        self._check(loaded)
        with self._lock:
            if name in self._own or name in self._brought:
                raise ShelfError(f"there are vectors named {name!r} already; remove them first, or take another name")
            if len(self._brought) >= MOST_UPLOADS:
                raise ShelfError(f"{MOST_UPLOADS} vectors were brought already; remove one first")
            renamed = replace(loaded, trait=name)
            self._brought[name] = renamed
        return renamed

    def remove(self, name: str) -> None:
        """Remove vectors that a client brought.

        Raises:
            ShelfError: If there are none of that name, or they were there from the start.
        """
        with self._lock:
            if name in self._own:
                raise ShelfError(f"the vectors {name!r} were given when the server was started, and stay")
            if self._brought.pop(name, None) is None:
                raise ShelfError(f"there are no vectors named {in_short(name)!r}")

    def keep_preset(self, name: str, edits: str) -> str:
        """Store a steering by name; its canonical notation.

        Raises:
            ShelfError: If the name is none, there are too many, or nothing is steered.
            PersonaLensError: As `steering`, or if the file cannot be written.
        """
        self._check_name(name)
        steering = Steering.parse(edits, self.vectors) if len(edits) <= LONGEST_EDITS and edits.strip() else None
        if steering is None:
            raise ShelfError(f"a preset is a steering of 1 to {LONGEST_EDITS} characters, such as optimistic@18:+1.5")
        with self._lock:
            if name not in self._presets and len(self._presets) >= MOST_PRESETS:
                raise ShelfError(f"there are {MOST_PRESETS} presets already; remove one first")
            self._save({**self._presets, name: str(steering)})
        return str(steering)

    def drop_preset(self, name: str) -> None:
        """Forget a preset.

        Raises:
            ShelfError: If there is none of that name.
        """
        with self._lock:
            if name not in self._presets:
                raise ShelfError(f"there is no preset named {in_short(name)!r}")
            self._save({key: value for key, value in self._presets.items() if key != name})

    def _save(self, presets: dict[str, str]) -> None:
        if self._file is not None:
            write_text(self._file, json.dumps(presets, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        self._presets = presets

    def _read(self, file: Path) -> dict[str, str]:
        try:
            found: Any = read_json(file)
        except DocumentError as error:
            raise ShelfError(str(error)) from error
        whole = isinstance(found, Mapping) and all(
            NAME.fullmatch(str(name)) and isinstance(edits, str) for name, edits in found.items()
        )
        if not whole:
            raise ShelfError(f"{file} holds no presets: it is to be a JSON object of names and steerings")
        return dict(found)

    def _check(self, vectors: PersonaVectors) -> None:
        if not self._allow:
            vectors.check_model(self._backend)
        for layer in self._layers if self._layers is not None else [None]:
            Gauge.of(vectors, layer)

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise ShelfError("a name begins with a letter and has up to 64 letters, digits, - and _")
