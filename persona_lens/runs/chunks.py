"""`Pieces`: the parts of a long run, saved as they come, several at a time if wanted; and shards of tensors.

Every row that is saved carries its number in the run's plan and a checksum over itself and what it is for. So a row is
known by what it says, not by where it stands: rows that moved are put back, those that are gone are made again, and one
that is damaged, doubled or of something else is an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from persona_lens.core.documents import header_text, save_tensors
from persona_lens.core.threads import in_threads
from persona_lens.runs.folder import RunError, RunFolder

KIND = "persona_lens_batch"
ADVICE = "remove it, and the same command makes it again"


def pack_shard(tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> bytes:
    """The bytes of a shard.

    Args:
        tensors: By name.
        identity: JSON values that tell the batch from all others.
    """
    return save_tensors(tensors, KIND, header_text({**identity, "sha256": _checksum(tensors)}))


def load_shard(file: Path, identity: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `pack_shard` packed with that identity.

    Raises:
        RunError: If the file is missing or damaged, or of another batch.
    """
    header, tensors = open_shard(file)
    if header != json.loads(json.dumps(identity)):
        raise RunError(f"{file} is of another batch; {ADVICE}")
    return tensors


def open_shard(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `pack_shard` packed: the identity of the batch, and the tensors.

    Raises:
        RunError: If the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(KIND, "null"))
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} is missing or damaged ({error}); {ADVICE}") from error
    if not isinstance(header, dict) or header.pop("sha256", None) != _checksum(tensors):
        raise RunError(f"{file} is damaged; {ADVICE}")
    return header, tensors


def shard_layer(file: Path, name: str, layer: int) -> Tensor:
    """One layer of what a shard holds under a name, [rows, …]; the rest of it is not read, nor its checksum taken.

    Raises:
        RunError: If the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            found: Tensor = opened.get_slice(name)[:, layer]
    except (SafetensorError, OSError, ValueError, IndexError) as error:
        raise RunError(f"{file} is missing or damaged ({error}); {ADVICE}") from error
    return found


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes())
    return whole.hexdigest()


Row = Mapping[str, Any]
ROW, CHECK = "row", "check"


def signed(row: Row, purpose: str) -> dict[str, Any]:
    """A row with a checksum over itself and what it is for."""
    return {**row, CHECK: _digest(row, purpose)}


def is_signed(row: Row, purpose: str) -> bool:
    """Whether a row is what `signed` made for that purpose."""
    return row.get(CHECK) == _digest({name: value for name, value in row.items() if name != CHECK}, purpose)


def _digest(row: Row, purpose: str) -> str:
    text = json.dumps([row, purpose], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Pieces:
    """Pieces of a run's rows, which go into one JSONL file.

    While the work lasts the file is in the order in which pieces were done; once all are, in that of the plan, so that
    the finished folder is the same in whatever order they came.

    Args:
        folder: Where to save; None keeps everything in memory.
        name: The JSONL file.
        cut: Numbers of the rows of each piece; every number from 0 on once.
        purposes: What each row is for, by its number, in any words that tell it from others.
        whole: Says of a piece whose rows are there whether all that belongs to them is too.
        form: Reads a row, with a KeyError, TypeError or ValueError where it is of another form, as another version of
            this program may have written it.

    Raises:
        RunError: If a line of the file is damaged, or there twice, or not what this run wrote.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        name: str,
        cut: Sequence[Sequence[int]],
        purposes: Sequence[str],
        whole: Callable[[int], bool] = lambda piece: True,
        form: Callable[[Row], object] = lambda row: None,
    ) -> None:
        self._folder = folder
        self._name = name
        self._cut = [tuple(piece) for piece in cut]
        self._purposes = purposes
        self._form = form
        self._rows: dict[int, dict[str, Any]] = {}  # in the order of the file
        if folder is not None:
            self._load(folder, whole)

    @property
    def done(self) -> int:
        """Rows done so far."""
        return len(self._rows)

    def run(
        self, work: Callable[[int], list[Row]], *, at_once: int = 1, report: Callable[[int], None] = lambda done: None
    ) -> list[Row]:
        """Do what is not done yet.

        Args:
            work: Does a piece and returns its rows; called from other threads if several run at once.
            at_once: How many pieces run at the same time.
            report: Told the number of rows done, at the start and after each piece.

        Returns:
            All rows, in the order of the plan, with their numbers as ``row``.

        Raises:
            Exception: The first that ``work`` raised; what was running then is still finished and saved.
        """
        report(self.done)
        missing = [number for number, piece in enumerate(self._cut) if not self._rows.keys() >= set(piece)]
        for number, rows in in_threads(work, missing, at_once):
            self._save(number, rows)
            report(self.done)
        order = range(len(self._purposes))
        if self._folder is not None and list(self._rows) != list(order):
            self._rows = {number: self._rows[number] for number in order}
            self._folder.write_lines(self._name, self._rows.values(), replace=True)
        return [{name: value for name, value in self._rows[number].items() if name != CHECK} for number in order]

    def _load(self, folder: RunFolder, whole: Callable[[int], bool]) -> None:
        found: dict[int, dict[str, Any]] = {}
        for line, row in folder.each_line(self._name):
            number = row.get(ROW)
            if type(number) is not int or not 0 <= number < len(self._purposes) or number in found:
                raise folder.damaged(self._name, line)
            if not (is_signed(row, self._purposes[number]) and self._is_formed(row)):
                raise folder.damaged(self._name, line)
            found[number] = row
        kept = {
            number
            for place, piece in enumerate(self._cut)
            if found.keys() >= set(piece) and whole(place)
            for number in piece
        }
        self._rows = {number: row for number, row in found.items() if number in kept}
        if len(self._rows) < len(found):
            folder.write_lines(self._name, self._rows.values(), replace=True)

    def _is_formed(self, row: Row) -> bool:
        try:
            self._form(row)
        except (KeyError, TypeError, ValueError, OverflowError):
            return False
        return True

    def _save(self, number: int, rows: list[Row]) -> None:
        made = {
            row: signed({ROW: row, **json.loads(json.dumps(made))}, self._purposes[row])
            for row, made in zip(self._cut[number], rows, strict=True)
        }
        self._rows.update(made)
        if self._folder is not None:
            self._folder.append(self._name, made.values())
