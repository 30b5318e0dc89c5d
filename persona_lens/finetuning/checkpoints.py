"""Checkpoints of a Trainer with the checksums of their files, so that a damaged one is known before it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback

from persona_lens.files import PART, named, remove, sentence, sync_folder, write_text
from persona_lens.finetuning.errors import FinetuningError
from persona_lens.notes import note

CHECKSUMS = "checksums.json"


class TrainedError(Exception):
    """The checkpoint that training goes on from is that of its last step. A Trainer would take one step more."""


class CheckedCheckpoints(TrainerCallback):
    """Writes the checksums of a checkpoint's files beside them, as its last file.

    It is the last callback: where the checkpoint's step was the last one, it ends training with `TrainedError` when
    all is as it was after that step.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint may have been loaded."""
        saved = state.stateful_callbacks.get("TrainerControl", {})
        if state.global_step and (
            saved.get("args", {}).get("should_training_stop") or state.global_step >= state.max_steps
        ):
            raise TrainedError

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint has been saved."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in sorted(folder.rglob("*")):
            sync_folder(file)
        write_text(folder / CHECKSUMS, json.dumps(_checksums(folder), indent=1) + "\n", failed=FinetuningError)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is as it was written; what is newer goes."""
    found = [each for each in folder.glob("checkpoint-*") if each.name.removeprefix("checkpoint-").isdecimal()]
    for each in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        if _is_whole(each):
            return str(each)
        if (each / CHECKSUMS).exists():  # without, it was merely interrupted
            note(f"{each} is damaged; training goes on from the checkpoint before it")
        with named(each, FinetuningError, "removed"):
            remove(each)
    return None


@contextmanager
def named_writes(folder: Path) -> Iterator[None]:
    """What libraries raise when they cannot write, as an error that names the folder."""
    try:
        yield
    except OSError as error:
        raise FinetuningError(sentence(error, error.filename or folder)) from error
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error) or "file write" in str(error):
            raise FinetuningError(f"{folder} cannot be written: {error}; make room there") from error
        raise


def _is_whole(checkpoint: Path) -> bool:
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return bool(expected) and expected == _checksums(checkpoint)


def _checksums(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != CHECKSUMS and not file.name.endswith(PART):
            with file.open("rb") as stream:
                found[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
