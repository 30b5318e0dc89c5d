"""Readers of what runs leave behind, and of what is kept beside them: run folders that were written by the runs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from persona_lens.core.errors import PersonaLensError
from persona_lens.core.progress import no_progress
from persona_lens.extraction import ExtractionSettings, extract
from persona_lens.judging.agreement import read_scored
from persona_lens.models.server import CompletionCache
from persona_lens.models.source import ADAPTER_CONFIG, WEIGHTS, adapter_base
from persona_lens.runs import RunFolder
from persona_lens.runs import chunks as pieces
from persona_lens.runs.chunks import open_shard, pack_shard
from persona_lens.runs.settings import RolloutSettings
from persona_lens.steering import SweepSettings, sweep
from persona_lens.traits import load_trait
from persona_lens.vectors.fit import fit_vectors
from persona_lens.vectors.split_half import split_half_reliability
from tests.campaign.attacked import Target, from_json, from_rows, in_file
from tests.campaign.mutations import damaged, distorted
from tests.planted import PlantedBackend

SMALL = RolloutSettings(12)
SHARD = "activations/batch-00000.safetensors"


def of_runs(folder: Path) -> list[Target]:
    """Every reader of a run's folder, and of other files that runs come upon."""
    extraction, sweeping = _extraction(folder / "run"), _sweep(folder / "sweep")
    completion = {"text": "a", "top_logprobs": [["a", -1.0]], "finished": True, "usage": {}}
    adapter = {"base_model_name_or_path": "me/it", "revision": None}
    config = folder / "adapter" / ADAPTER_CONFIG
    config.parent.mkdir()
    (config.parent / WEIGHTS).write_bytes(b"")

    def cached(content: bytes) -> None:
        key = "ab" * 32
        (folder / "cache" / "ab").mkdir(parents=True, exist_ok=True)
        (folder / "cache" / "ab" / f"{key}.json").write_bytes(content)
        found = CompletionCache(folder / "cache").get(key)
        if found is not None:
            json.dumps(asdict(found))

    def configuration(path: Path) -> None:
        with RunFolder(path.parent, {"a": 1, "b": {"c": [1, 2]}}):
            pass

    return [
        *(extraction.rows(name) for name in ("rollouts.jsonl", "evidence.jsonl", "scores.jsonl")),
        extraction.whole("summary.json"),
        extraction.whole("run.json"),
        extraction.shard(SHARD),
        *(sweeping.rows(f"sweep-{name}.jsonl") for name in ("rollouts", "judgements", "scores")),
        Target("run.json", from_json({"a": 1, "b": {"c": [1, 2]}}), in_file(folder / "cfg/run.json", configuration), 2),
        Target("kept answers", from_json(completion), cached, 3),
        Target("adapters", from_json(adapter), in_file(config, lambda path: adapter_base(path.parent)), 2),
    ]


class Finished:
    """The folder of a finished run, of which one file after the other is put to the test.

    Args:
        folder: Where.
        run: The run; called again, it goes on with what is there.
        readers: What else reads the folder.
    """

    def __init__(self, folder: Path, run: Callable[[], object], *readers: Callable[[Path], object]) -> None:
        self._folder = folder
        self._readers: list[Callable[[Path], object]] = [*readers, lambda _: run()]
        with _signing() as self._purposes:
            run()
        self._files = _contents(folder)

    def rows(self, name: str) -> Target:
        """Rows, of which half are damaged, and others distorted but signed as the run signs its own."""
        rows = [json.loads(line) for line in self._files[name].splitlines()]
        plain = from_rows(rows)

        def signed(rng: random.Random) -> bytes:
            made = [distorted(rng, row) if rng.random() < 0.3 else row for row in rows]
            again = [self._signed(row, own) for row, own in zip(made, rows, strict=True)]
            return "".join(json.dumps(row) + "\n" for row in again).encode()

        return self._target(name, lambda rng: plain(rng) if rng.random() < 0.5 else signed(rng))

    def whole(self, name: str) -> Target:
        """A JSON object."""
        return self._target(name, from_json(json.loads(self._files[name])))

    def shard(self, name: str) -> Target:
        """Tensors, damaged or with a distorted header that is signed as the run signs its own."""
        content = self._files[name]
        header, tensors = open_shard(self._folder / name)

        def make(rng: random.Random) -> bytes:
            if rng.random() < 0.5:
                return damaged(rng, [content])
            kept = {each: rows[: rng.randrange(1, 9)] for each, rows in tensors.items() if rng.random() < 0.9}
            made = distorted(rng, header)
            with suppress(PersonaLensError, ValueError):  # it packs no header nested too deep or with infinity
                return pack_shard(kept or tensors, made if isinstance(made, dict) else {"rows": made})
            return pack_shard(kept or tensors, header)

        return self._target(name, make)

    def _target(self, name: str, make: Callable[[random.Random], bytes]) -> Target:
        return Target(f"{name} of a run", make, lambda content: self._read(name, content), 0.6)

    def _signed(self, row: Any, own: Mapping[str, Any]) -> Any:
        purpose = self._purposes.get(own.get(pieces.CHECK, ""))
        if purpose is None or not isinstance(row, dict):
            return row
        return pieces.signed({name: value for name, value in row.items() if name != pieces.CHECK}, purpose)

    def _read(self, name: str, content: bytes) -> None:
        """Have everything read the folder with this file in it; all of it may refuse, and nothing more."""
        (self._folder / name).write_bytes(content)
        try:
            for reader in self._readers:
                with suppress(PersonaLensError):
                    reader(self._folder)
        finally:
            for other, found in _contents(self._folder).items():
                if other not in self._files:
                    (self._folder / other).unlink()
                elif found != self._files[other]:
                    (self._folder / other).write_bytes(self._files[other])
            for other in self._files.keys() - _contents(self._folder).keys():
                (self._folder / other).write_bytes(self._files[other])


def _extraction(folder: Path) -> Finished:
    whole = load_trait("optimistic")
    trait = whole.model_copy(update={"instructions": whole.instructions[:1]})  # few rows, so that it takes no time
    backend, settings = (
        PlantedBackend(trait),
        ExtractionSettings(questions=4, paired=False, rollouts=SMALL, judge_pairs=1),
    )
    return Finished(
        folder,
        lambda: extract(backend, trait, folder, settings=settings, progress=no_progress),
        read_scored,
        lambda run: split_half_reliability(run, splits=3),
        lambda run: fit_vectors(run, "lda", progress=no_progress),
    )


def _sweep(folder: Path) -> Finished:
    from tests.campaign.targets import planted, vectors

    settings = SweepSettings((1,), (-1.0, 1.0), questions=2, random_directions=1, rollouts=SMALL)
    return Finished(
        folder, lambda: sweep(planted(), vectors(), settings, folder=folder, progress=no_progress), read_scored
    )


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@contextmanager
def _signing() -> Iterator[dict[str, str]]:
    """While it is open, what rows are signed for is written down, by their checksums."""
    found: dict[str, str] = {}
    real = pieces.signed

    def signed(row: pieces.Row, purpose: str) -> dict[str, Any]:
        made = real(row, purpose)
        found[made[pieces.CHECK]] = purpose
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "signed", signed)
        yield found
