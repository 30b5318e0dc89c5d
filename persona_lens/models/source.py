"""What to load: an embedded model, a folder on this machine, or a model on the Hugging Face hub."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from persona_lens.core.documents import DocumentError, read_json
from persona_lens.core.errors import ModelError, first_line
from persona_lens.core.files import named
from persona_lens.core.plugins import install_command
from persona_lens.core.progress import Progress
from persona_lens.models.embedded import DEFAULT_MODEL, EMBEDDED, ensure_embedded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter belongs to.

    Raises:
        ModelError: The folder's configuration is damaged or names no base model, or its weights are not safetensors.
    """
    file = folder / ADAPTER_CONFIG
    try:
        config = read_json(file)
    except DocumentError as error:
        raise ModelError(str(error)) from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    revision = config.get("revision") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base.strip() or not isinstance(revision, str | None):
        raise ModelError(f"{file} names no base model; write its hub id or folder under base_model_name_or_path")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}; adapters in pickled files, which can run code, are not opened")
    return base, revision


def require_peft() -> None:
    """Raise `ModelError` unless PEFT is installed."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"adapters need peft: {install_command('finetune')}")


@contextmanager
def adapter_on(model: PreTrainedModel, folder: Path) -> Iterator[PreTrainedModel]:
    """A model with an adapter on it while the context is open; afterwards it is as it was.

    Raises:
        ModelError: See `put_on`.
    """
    adapted = put_on(model, folder)
    try:
        yield adapted.get_base_model().eval()
    finally:
        taken_off(adapted)


def taken_off(adapted: Any) -> None:
    """Give the base model of a PEFT model its own layers back."""
    inner = adapted.get_base_model()
    adapted.unload()
    if hasattr(inner, "peft_config"):
        del inner.peft_config


def put_on(model: PreTrainedModel, folder: Path) -> Any:
    """A PEFT model: one with an adapter on it, not merged.

    The adapter's layers take the places of those they adapt, so that its base model is used, read and edited as any
    other.

    Args:
        model: The base model; it is changed.
        folder: The adapter.

    Raises:
        ModelError: PEFT is missing, or the adapter does not fit, or does more than to change layers.
    """
    require_peft()
    from peft import PeftConfig, PeftModel

    loader: Any = PeftModel
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        changes_layers = not PeftConfig.from_pretrained(str(folder)).is_prompt_learning
        adapted = loader.from_pretrained(model, str(folder)) if changes_layers else None
    except Exception as error:  # shapes, names and versions that do not fit fail in many ways
        raise ModelError(f"the adapter in {folder} does not fit its base model: {first_line(error)}") from error
    if adapted is None:
        raise ModelError(f"the adapter in {folder} adds tokens to the prompt; only those that change layers are opened")
    # PEFT freezes the model's own weights, and frozen ones are copied for every row that is not whole in memory, such
    # as the last tokens of texts: the whole vocabulary's, which takes six times as long as all else.
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return adapted


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
_SAMPLE = 512


@dataclass(frozen=True)
class ModelSource:
    """One model, named precisely enough to be loaded, and to be recognised again."""

    id: str
    """The name to show: an embedded model's name, a folder's own name, or a hub id."""
    location: str
    """What ``from_pretrained`` takes: an absolute path or a hub id."""
    kind: Literal["embedded", "folder", "hub", "adapter"]
    """Where the model lives; an adapter is a folder beside another model."""
    revision: str | None = None
    """Hub only: branch, tag or commit asked for; the commit itself once pinned."""
    content: str | None = None
    """What tells these weights from any others: the GGUF's SHA-256 (embedded), `folder_content` (folder,
    adapter), or the commit (hub; None until `persona_lens.models.pinned` has asked the hub)."""
    base: ModelSource | None = None
    """Adapter only: the model that it is put on."""

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine, so that loading needs no network."""
        return self.base.is_local if self.base is not None else self.kind != "hub"

    @property
    def identity(self) -> str | None:
        """The content with its kind before it, for fingerprints; None for a hub model not pinned yet.

        Paths and names are left out: a folder that was moved is still the same model.
        """
        own = None if self.content is None else f"{self.kind}:{self.content}"
        if self.base is None or own is None:
            return own
        return None if self.base.identity is None else f"{own} on {self.base.identity}"


def resolve(
    model: str, revision: str | None = None, *, progress: Progress | None = None, weights: bool = True
) -> ModelSource:
    """Find out what a model's name stands for.

    An embedded model's name wins over everything; then what exists as a folder, or is written like a path, is
    a folder; the rest is a hub id. The hub is not asked here. An embedded model is fetched if it never was. A folder
    may also hold a PEFT adapter, which stays one: it is put on its base model and never merged; or it is a run folder
    of ``persona-lens finetune``, which stands for what was trained in it.

    Args:
        model: ``smollm2-135m``, a path to a folder, or a hub id such as ``Qwen/Qwen2.5-7B-Instruct``.
        revision: Branch, tag or commit on the hub.
        progress: Told how far the download of an embedded model is.
        weights: Whether a folder must hold them; not where the model runs elsewhere.

    Returns:
        The source.

    Raises:
        ModelError: The name stands for nothing that could be loaded.
    """
    if not model.strip():
        raise ModelError(f"no model given; name one, for example {DEFAULT_MODEL!r}")
    if model in EMBEDDED:
        _refuse_revision(model, revision)
        folder = ensure_embedded(model, progress)
        return ModelSource(model, str(folder), "embedded", content=EMBEDDED[model].gguf_sha256)
    path = Path(model).expanduser()
    written_as_path = path.is_absolute() or model.startswith((".", "~")) or "\\" in model
    if written_as_path or path.exists():
        _refuse_revision(model, revision)
        return _folder_source(model, path.resolve(), weights)
    close = difflib.get_close_matches(model.lower(), EMBEDDED, n=1, cutoff=0.7)
    if close and "/" not in model:
        raise ModelError(f"there is no model {model!r}; did you mean {close[0]!r}?")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(
            f"{model!r} is neither a folder here nor a hub id (owner/name), nor one of: {', '.join(EMBEDDED)}"
        )
    return ModelSource(model, model, "hub", revision=revision)


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"a revision ({revision!r}) belongs to a hub model, and {model!r} is not one; leave it out")


def _folder_source(model: str, folder: Path, weights: bool) -> ModelSource:
    if not folder.exists():
        raise ModelError(f"there is no folder {model!r} (looked for {folder}); a hub model is written owner/name")
    if not folder.is_dir():
        raise ModelError(f"{model!r} is a file; give the folder that holds config.json and the .safetensors files")
    inner = _trained_in(folder)
    if (inner / ADAPTER_CONFIG).is_file() and not (inner / "config.json").is_file():
        return _adapter_source(model, folder.name, inner, weights)
    name, folder = folder.name, inner
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model!r} has no config.json, so it is not a model saved by save_pretrained")
    if any(folder.glob("*.safetensors")):
        return ModelSource(name, str(folder), "folder", content=folder_content(folder))
    if not weights:
        return ModelSource(name, str(folder), "folder")
    if not any(folder.glob("*.bin")):
        raise ModelError(f"{model!r} has a config.json but no .safetensors files: the weights are missing")
    raise ModelError(
        f"{model!r} has its weights only as pickled .bin files, which can run code when they are opened. If you "
        'trust them, convert them once: python -c "from transformers import AutoModelForCausalLM as M, '
        f"AutoTokenizer as T; M.from_pretrained('{model}', use_safetensors=False).save_pretrained('converted'); "
        f"T.from_pretrained('{model}').save_pretrained('converted')\", then use ./converted"
    )


def _trained_in(folder: Path) -> Path:
    """Where the model is that a finetuning run left, or the folder itself."""
    own = (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()
    trained = (folder / "adapter", folder / "model")
    return folder if own else next((each for each in trained if each.is_dir()), folder)


def _adapter_source(model: str, name: str, folder: Path, weights: bool) -> ModelSource:
    if not weights:
        raise ModelError(f"{model!r} is an adapter, which runs on this machine; a server cannot be given it")
    base, revision = adapter_base(folder)
    try:
        found = resolve(base, revision)
    except ModelError as error:
        raise ModelError(f"the base model of the adapter {model!r} is not there: {error}") from error
    if found.base is not None:
        raise ModelError(f"the base model of the adapter {model!r}, {base}, is an adapter itself; merge that one first")
    return ModelSource(name, str(folder), "adapter", content=folder_content(folder, ADAPTER_CONFIG), base=found)


def folder_content(folder: Path, config: str = "config.json") -> str:
    """Digest a model folder without reading all its weights.

    SHA-256 over, in this order: the bytes of ``config.json``; those of ``model.safetensors.index.json`` if
    there is one; then for each ``*.safetensors`` file by name: its name, its size, its header (names, shapes,
    types and offsets of the tensors), and of every tensor the first 512 bytes and 512 bytes from its middle.
    Each part is preceded by its length. The samples are there because a finetuned copy has the same names,
    sizes and headers as its origin.

    Args:
        folder: The folder.
        config: The configuration's name there.

    Returns:
        The digest in hexadecimal.

    Raises:
        ModelError: A file cannot be read, or is not a safetensors file.
    """
    digest = hashlib.sha256()
    with named(folder, ModelError, "read"):
        for part in _parts(folder, config):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _parts(folder: Path, config: str) -> Iterator[bytes]:
    yield (folder / config).read_bytes()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        yield index.read_bytes()
    for file in sorted(folder.glob("*.safetensors")):
        yield file.name.encode()
        yield str(file.stat().st_size).encode()
        yield from _weights_parts(file)


def _weights_parts(file: Path) -> Iterator[bytes]:
    try:
        with safe_open(file, framework="np"):  # which finds out whether the header is whole, and fits the file
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(length)
            yield header
            tensors: dict[str, Any] = json.loads(header)
            spans = [entry["data_offsets"] for name, entry in tensors.items() if name != "__metadata__"]
            for start, end in sorted(spans):
                for offset in (start, (start + end) // 2):
                    stream.seek(8 + length + offset)
                    yield stream.read(min(_SAMPLE, end - offset))
    except SafetensorError as error:
        where = f"{file.parent.name}{os.sep}{file.name}"
        raise ModelError(f"{where} is not a whole safetensors file; was its download cut short?") from error
