"""Edits and steerings in whatever form they are given, in notation or a file; and replies under them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from persona_lens.backend import Backend, Edit, Edits, Generation, ModelInfo, Sampling, as_edits
from persona_lens.core.documents import DocumentError, read_artifact, read_yaml
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.files import named
from persona_lens.core.text import in_short
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format
from persona_lens.models.reasoning import note_unanswered
from persona_lens.reports.result import Result
from persona_lens.steering.steering import FORMAT_VERSION, METADATA, Steering, SteeringError, rowwise
from persona_lens.traits import Trait, load_trait
from persona_lens.vectors import PersonaVectors, VectorsError, load_vectors

GivenEdits: TypeAlias = Edits | str
GivenVectors: TypeAlias = PersonaVectors | Iterable[PersonaVectors] | Mapping[str, PersonaVectors] | None
YAML_SUFFIXES = (".yaml", ".yml")


def given_edits(edits: GivenEdits, vectors: GivenVectors = None, backend: Backend | None = None) -> tuple[Edit, ...]:
    """The edits, in whatever form they are given.

    Args:
        edits: One `Edit`, several, a `Steering`, or its notation, such as ``optimistic@18:+1.5``.
        vectors: Those that a notation names.
        backend: The model that they are for, which the vectors of a steering must belong to.

    Raises:
        EditError: If they are none of these.
        NotationError: If a notation is not written so.
        SteeringError: If a notation names vectors that are not given.
        VectorsError: If the vectors belong to another model.
    """
    found = given_steering(edits, vectors)
    if isinstance(found, Steering) and backend is not None:
        found.check_model(backend)
    return as_edits(found)


def given_steering(edits: GivenEdits, vectors: GivenVectors = None) -> Steering | tuple[Edit, ...]:
    """As `given_edits`, and a steering or its notation stays a steering."""
    if not isinstance(edits, str):
        return edits if isinstance(edits, Steering) else as_edits(edits)
    if vectors is None:
        raise SteeringError(
            f"the notation {edits!r} needs the vectors that it names: give vectors=..., or "
            f"Steering.parse({edits!r}, vectors)"
        )
    return Steering.parse(edits, vectors)


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


def read_steering(text: str, vectors: Mapping[str, PersonaVectors]) -> Steering:
    """A steering as it is typed: its notation, or the .yaml or .safetensors file that it is in.

    Args:
        text: The notation, or the path.
        vectors: Those that it names, by name.

    Raises:
        NotationError: If a notation is not written so.
        PersonaLensError: If a file cannot be read; see `load_steering`.
    """
    if text.endswith((*YAML_SUFFIXES, ".safetensors")):
        return load_steering(text, vectors)
    return Steering.parse(text, vectors)


def load(path: Path | str) -> PersonaVectors | Steering | Trait | Result:
    """What a file or run folder holds: vectors, a steering, a trait, or the result of a finished run.

    Raises:
        PersonaLensError: If there is nothing there, or it is none of these.
    """
    file = Path(path)
    with named(file, SteeringError, "read"):
        folder, there = file.is_dir(), file.is_file()
    if folder:
        return Result.load(file)
    if not there:
        raise SteeringError(
            f"there is nothing at {file}; give a run folder, or a file of vectors, a steering or a trait"
        )
    if file.suffix in YAML_SUFFIXES:
        found = read_yaml(file)
        steers = isinstance(found, Mapping) and "edits" in found
        return load_steering(file) if steers else load_trait(str(file))
    try:
        return load_vectors(file)
    except VectorsError as error:
        try:
            return load_steering(file)
        except PersonaLensError:
            raise error from None


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
    stranger = "holds tensors but no steering (vectors are named beside a steering, not instead of one)"
    found = read_artifact(file, METADATA, FORMAT_VERSION, stranger=stranger, failed=SteeringError)
    try:
        header = _Header.model_validate(found.header)
        stored = {}
        for name, each in header.vectors.items():
            own = {
                key.removeprefix(f"{name}/"): rows for key, rows in found.tensors.items() if key.startswith(f"{name}/")
            }
            stored[name] = PersonaVectors(each.trait, ModelInfo.from_json(each.model), own, each.provenance)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SteeringError(f"the header of {file} is damaged: {in_short(repr(error), 200)}") from error
    return Steering.parse(header.steering, stored)


class _Vectors(BaseModel):
    trait: str
    model: dict[str, Any]
    provenance: dict[str, Any]


class _Header(BaseModel):
    steering: str
    vectors: dict[str, _Vectors]


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


def reply(
    backend: Backend,
    question: str,
    *,
    system: str | None = None,
    edits: GivenEdits = (),
    vectors: GivenVectors = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    thinking_budget: int | None = None,
    seed: int = 0,
    chat: ChatFormat | None = None,
) -> str:
    """Ask the model one question.

    Args:
        backend: The model.
        question: User message.
        system: System prompt.
        edits: Applied throughout: one `Edit`, several, a `Steering`, or its notation, such as ``optimistic@18:+1.5``.
        vectors: Those that a notation names.
        max_new_tokens: Length limit in tokens.
        temperature: 0 is greedy.
        thinking_budget: How many tokens the model may think before it has to answer; None does not limit it.
        seed: Of the sampling; of no meaning to greedy replies.
        chat: Chat format; the model's own by default.

    Returns:
        The answer as text, without reasoning and control tokens.

    Raises:
        EditError: If the edits are none, or do not fit the model.
        SteeringError: If a notation names vectors that are not given.
        VectorsError: If the vectors of a steering belong to another model.
    """
    chat = chat or chat_format(backend)
    seeds = (seed,) if temperature else None
    sampling = Sampling(max_new_tokens, temperature, seeds=seeds, thinking_budget=thinking_budget)
    generation = backend.generate([chat.encode(system, question)], sampling, given_edits(edits, vectors, backend))
    return _answers(chat, generation)[0]


def generate(
    backend: Backend,
    question: str,
    steerings: Sequence[GivenEdits | None],
    vectors: GivenVectors = None,
    *,
    system: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    thinking_budget: int | None = None,
    seed: int = 0,
    chat: ChatFormat | None = None,
    allow_other_model: bool = False,
) -> list[str]:
    """One answer under each steering, generated in one batch with the same seed.

    Args:
        backend: The model.
        question: User message.
        steerings: What the answers are given under, each as `reply` takes it; None is unsteered.
        vectors: Those that a notation names.
        system: System prompt.
        max_new_tokens: Length limit in tokens.
        temperature: 0 is greedy.
        thinking_budget: How many tokens the model may think before it has to answer; None does not limit it.
        seed: Of the sampling, the same for all.
        chat: Chat format; the model's own by default.
        allow_other_model: Steer a model that the vectors do not belong to.

    Raises:
        VectorsError: If vectors belong to another model.
    """
    chat = chat or chat_format(backend)
    rows = len(steerings)
    checked = None if allow_other_model else backend
    edits = rowwise(() if each is None else given_edits(each, vectors, checked) for each in steerings)
    seeds = (seed,) * rows if temperature else None
    sampling = Sampling(max_new_tokens, temperature, seeds=seeds, thinking_budget=thinking_budget)
    generation = backend.generate([chat.encode(system, question)] * rows, sampling, edits)
    return _answers(chat, generation)


def _answers(chat: ChatFormat, generation: Generation) -> list[str]:
    """The answers as text; and a word where there are none, which would look as if the model had nothing to say."""
    found = [chat.answer(ids) for ids in generation.responses]
    note_unanswered(chat.parts, found, generation.ended)
    return found
