"""Steerings in files: one that carries its vectors and can be shared, or a few lines of YAML that name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_lens.backend import ModelInfo
from persona_lens.core.documents import DocumentError, read_artifact, read_yaml
from persona_lens.core.text import in_short
from persona_lens.steering.steering import FORMAT_VERSION, METADATA, Steering, SteeringError
from persona_lens.vectors import PersonaVectors, load_vectors

YAML_SUFFIXES = (".yaml", ".yml")


class SteeringDocument(BaseModel):
    """A steering as YAML.

    Attributes:
        format_version: 1.
        edits: Terms as `parse_terms` reads them, one or more to an entry.
        vectors: Files or run folders of vectors by the names that the terms use, relative to the document.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format_version: int = Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)
    edits: list[str] = Field(min_length=1)
    vectors: dict[str, str] = Field(default_factory=dict)


def is_steering_file(text: str) -> bool:
    """Whether a text names a file to load a steering from, rather than being one."""
    return text.endswith((*YAML_SUFFIXES, ".safetensors"))


def load_steering(path: Path | str, vectors: Mapping[str, PersonaVectors] | None = None) -> Steering:
    """Read a steering that `Steering.save` wrote, or one written by hand in YAML. Nothing is unpickled.

    Args:
        path: The file; ``.yaml`` or ``.yml`` is YAML, anything else safetensors.
        vectors: More vectors that a YAML file may name.

    Raises:
        SteeringError: If there is no such file, or it is damaged or of another format.
        NotationError: If a term is not written as terms are.
        VectorsError: If vectors that a YAML file names cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise SteeringError(f"there is no steering file {file}")
    if file.suffix in YAML_SUFFIXES:
        return _load_yaml(file, vectors or {})
    return _load_safetensors(file)


def _load_safetensors(file: Path) -> Steering:
    stranger = "holds tensors but no steering (vectors are named beside a steering, not instead of one)"
    found = read_artifact(file, METADATA, FORMAT_VERSION, stranger=stranger, failed=SteeringError)
    try:
        headers = found.header["vectors"].items()
        vectors = {name: _vectors(name, header, found.tensors) for name, header in headers}
        text = found.header["steering"]
        if not isinstance(text, str):
            raise TypeError("steering is a text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteeringError(f"the header of {file} is damaged: {in_short(repr(error), 200)}") from error
    return Steering.parse(text, vectors)


def _vectors(name: str, found: dict[str, Any], tensors: Mapping[str, Any]) -> PersonaVectors:
    own = {key.partition("/")[2]: value for key, value in tensors.items() if key.partition("/")[0] == name}
    if not isinstance(found["trait"], str) or not isinstance(found["provenance"], dict):
        raise TypeError("trait is a text and provenance a mapping")
    return PersonaVectors(found["trait"], ModelInfo.from_json(found["model"]), own, found["provenance"])


def _load_yaml(file: Path, vectors: Mapping[str, PersonaVectors]) -> Steering:
    try:
        document = SteeringDocument.model_validate(read_yaml(file))
    except DocumentError as error:
        raise SteeringError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = in_short(".".join(map(str, first["loc"]))) or "the document"
        raise SteeringError(
            f"{file}: {place}: {first['msg']}; a steering has format_version: 1, edits: [optimistic@18:+1.5] and, "
            "where they are not given beside it, vectors: {optimistic: FOLDER}"
        ) from None
    named = {name: load_vectors(file.parent / place) for name, place in document.vectors.items()}
    return Steering.parse(", ".join(document.edits), {**vectors, **named})
