"""Steerings in files: one that carries its vectors and can be shared, or a few lines of YAML that name them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from persona_lens.backend import ModelInfo
from persona_lens.steering.steering import Steering, SteeringError
from persona_lens.vectors import PersonaVectors, load_vectors

FORMAT_VERSION = 1
METADATA = "persona_lens_steering"
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


def save_steering(steering: Steering, path: Path | str) -> Path:
    """Write a steering with its vectors into one safetensors file, whose bytes depend on the content alone.

    Raises:
        SteeringError: If the file exists and holds something else.
    """
    target, content = Path(path), _to_bytes(steering)
    if target.exists():
        if target.is_dir() or target.read_bytes() != content:
            raise SteeringError(f"{target} exists and holds something else; choose another name or remove it")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_bytes(content)
    part.replace(target)
    return target


def is_steering_file(text: str) -> bool:
    """Whether a text names a file to load a steering from, rather than being one."""
    return text.endswith((*YAML_SUFFIXES, ".safetensors"))


def load_steering(path: Path | str, vectors: Mapping[str, PersonaVectors] | None = None) -> Steering:
    """Read a steering that `save_steering` wrote, or one written by hand in YAML. Nothing is unpickled.

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


def _to_bytes(steering: Steering) -> bytes:
    tensors, headers = {}, {}
    for name, each in sorted(steering.vectors.items()):
        reductions = sorted(each.directions)
        tensors.update({f"{name}/{reduction}": each.directions[reduction].contiguous() for reduction in reductions})
        headers[name] = {
            "trait": each.trait,
            "model": {field: getattr(each.model, field) for field in ModelInfo.__dataclass_fields__},
            "provenance": dict(each.provenance),
        }
    header = {"format_version": FORMAT_VERSION, "steering": str(steering), "vectors": headers}
    # One metadata entry: safetensors writes several in no fixed order.
    return save(tensors, {METADATA: json.dumps(header, sort_keys=True, ensure_ascii=False, allow_nan=False)})


def _load_safetensors(file: Path) -> Steering:
    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(METADATA)
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except (SafetensorError, OSError) as error:
        raise SteeringError(f"{file} is not a safetensors file, or is damaged: {error}") from error
    if text is None:
        raise SteeringError(
            f"{file} holds tensors but no steering: its header has no {METADATA!r} entry; vectors are named beside a "
            "steering, not instead of one"
        )
    try:
        header = json.loads(text)
        if header["format_version"] != FORMAT_VERSION:
            raise SteeringError(
                f"{file} has format version {header['format_version']}, this version of persona-lens reads "
                f"{FORMAT_VERSION}; use the persona-lens that wrote it"
            )
        vectors = {name: _vectors(name, found, tensors) for name, found in header["vectors"].items()}
        return Steering.parse(header["steering"], vectors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteeringError(f"{file} is damaged: its header cannot be read ({error})") from error


def _vectors(name: str, found: dict[str, Any], tensors: Mapping[str, Any]) -> PersonaVectors:
    own = {key.partition("/")[2]: value for key, value in tensors.items() if key.partition("/")[0] == name}
    return PersonaVectors(found["trait"], ModelInfo(**found["model"]), own, found["provenance"])


def _load_yaml(file: Path, vectors: Mapping[str, PersonaVectors]) -> Steering:
    try:
        document = SteeringDocument.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SteeringError(f"{file} cannot be read as YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise SteeringError(
            f"{file}: {place}: {first['msg']}; a steering has format_version: 1, edits: [optimistic@18:+1.5] and, "
            "where they are not given beside it, vectors: {optimistic: FOLDER}"
        ) from None
    named = {name: load_vectors(file.parent / place) for name, place in document.vectors.items()}
    return Steering.parse(", ".join(document.edits), {**vectors, **named})
