"""Vectors in the formats of other programs: `import_vectors`, `export_vectors`, and the formats by name."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_lens.core.documents import write_once
from persona_lens.core.plugins import Registry
from persona_lens.vectors.formats import arrays, llama_cpp, torch_files
from persona_lens.vectors.formats.form import (
    Chosen,
    Form,
    FormatError,
    Imported,
    Stated,
    reduction_of,
)
from persona_lens.vectors.formats.llama_cpp import from_control_vector, to_control_vector
from persona_lens.vectors.formats.torch_files import from_steering_vector, to_steering_vector
from persona_lens.vectors.vectors import PersonaVectors

READERS: tuple[Form, ...] = (
    torch_files.FOLDER,
    torch_files.FILE,
    torch_files.AXIS,
    torch_files.FIELDS,
    llama_cpp.FORM,
    arrays.NPZ,
    arrays.NPY,
)
FORMATS = {form.name: form for form in READERS}
"""Those of this package by name."""

FORMS: Registry[Form] = Registry("persona_lens.formats", Form, "format", FormatError, FORMATS)
"""With those of other packages."""


def formats() -> dict[str, Form]:
    """The formats by name, those of other packages too."""
    return FORMS.usable()


def import_vectors(path: Path | str, stated: Stated | None = None) -> Imported:
    """Read vectors that another program wrote; which one, its content says. Nothing in it is run.

    Args:
        path: A file, or a folder of the reference implementation's files.
        stated: What the file does not say itself: the model, the trait, the reduction.

    Raises:
        FormatError: If it is of no known format, damaged, or does not fit the model; or if neither file nor user say
            which model and trait it is of.
        VectorsError: If what `persona_lens` wrote into it is damaged.
    """
    file, stated = Path(path), stated or Stated()
    reduction_of(stated)
    try:
        others, content = [form for name, form in FORMS.usable().items() if name not in FORMATS], None
        forms = [
            form for form in others if form.container == "file" and file.is_file() and form.recognises(file, stated)
        ]
        if not forms:
            container, content = _opened(file)
            of_it = [form for form in (*READERS, *others) if form.container == container]
            forms = [form for form in of_it if form.recognises(content, stated)]
        if not forms:
            raise FormatError(
                f"{file} is a file of torch.save, but holds nothing that is known here ({_seen(content)}); formats: "
                f"{_names()}"
            )
        return forms[0].read(file, content, stated)
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error}") from error


def _names() -> str:
    return ", ".join(FORMS.usable())


def _opened(file: Path) -> tuple[str, Any]:
    """What kind of container it is, by its first bytes, and of an archive what is in it."""
    if file.is_dir():
        if not any(file.glob("*_diff.pt")):
            raise FormatError(f"{file} is a folder without files named TRAIT_response_avg_diff.pt or the like")
        return "folder", None
    if not file.is_file():
        raise FormatError(f"{file} does not exist")
    with file.open("rb") as stream:
        head = stream.read(16)
    if head.startswith(b"GGUF"):
        return "gguf", None
    if head.startswith(b"\x93NUMPY"):
        return "npy", None
    if head.startswith(b"PK"):
        return ("npz", None) if _holds_arrays(file) else ("archive", torch_files.load_archive(file))
    if head[:1] == b"\x80":
        raise FormatError(
            f"{file} is a bare pickle, which can run code on opening, so it was not opened; write it with a current "
            "torch.save, or as NumPy"
        )
    if head[8:9] == b"{":
        raise FormatError(
            f"{file} is a safetensors file; those of this program need no import, and of others the tensors have to be "
            "saved as NumPy first"
        )
    raise FormatError(f"{file} is of no known format; formats: {_names()}")


def _holds_arrays(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FormatError(f"{file} is damaged: {error}") from error


def _seen(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dictionary of {', '.join(repr(str(key)[:20]) for key in list(content)[:5]) or 'nothing'}"
    return f"a {type(content).__name__}"


def export_vectors(
    vectors: PersonaVectors, to: str, out: Path | str | None = None, chosen: Chosen | None = None
) -> tuple[list[Path], tuple[str, ...]]:
    """Write vectors for another program.

    Args:
        vectors: The vectors.
        to: Name of the format, see `FORMS`.
        out: The file, or for formats of several files the folder; a name after the trait, here, by default.
        chosen: What of the vectors; everything by default.

    Returns:
        What was written, and what the user should be told, one sentence each.

    Raises:
        FormatError: If there is no such format, it cannot hold this, or a file exists and holds something else.
        VectorsError: If there is no such layer or reduction.
    """
    if to not in FORMS.everything():
        there = ", ".join(f"{form.name} ({form.summary})" for form in FORMS.usable().values())
        raise FormatError(f"there is no format {to!r}; there are {there}")
    form, chosen = FORMS.find(to), vectors.settled(chosen or Chosen())
    if form.whole and chosen.layers is not None:
        raise FormatError(f"files of the format {form.name} hold every layer; leave --layers out")
    made = form.write(vectors, chosen)
    place = Path() if out is None else Path(out)
    if not form.suffix:
        files = {str(place / name): content for name, content in made.files.items()}
    elif out is not None and place.suffix != form.suffix:
        raise FormatError(f"a file of {form.name} ends in {form.suffix}; got {out}")
    else:
        files = {str(out or name): content for name, content in made.files.items()}
    write_new(files)
    return [Path(name) for name in files], made.notes


def write_new(files: Mapping[str, bytes]) -> None:
    """Write files whole or not at all, and none over one that holds something else.

    Raises:
        FormatError: If one does, or cannot be written.
    """
    for name, content in files.items():
        if Path(name).exists() and (Path(name).is_dir() or Path(name).read_bytes() != content):
            raise FormatError(f"{name} exists and holds something else; choose another name (--out) or remove it")
    try:
        for name, content in files.items():
            write_once(name, content, FormatError)
    except OSError as error:
        raise FormatError(f"{error.filename or 'a file'} cannot be written: {error}") from error


__all__ = [
    "FORMATS",
    "Chosen",
    "FormatError",
    "Imported",
    "Stated",
    "export_vectors",
    "from_control_vector",
    "from_steering_vector",
    "import_vectors",
    "to_control_vector",
    "to_steering_vector",
]
