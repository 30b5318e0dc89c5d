"""Two Ray workers give the same scores as one process, also if one of them dies on the way."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persona_lens import open_backend
from persona_lens.data.datasets import open_dataset
from persona_lens.monitoring import Gauge, Panel
from persona_lens.screening import (
    KnownModel,
    OpenedBy,
    RayExecutor,
    ScreeningError,
    ScreeningSettings,
    screen,
)
from persona_lens.screening import (
    executor as rays,
)
from persona_lens.screening.samples import Window
from persona_lens.vectors import PersonaVectors
from tests.screening import made
from tests.screening.made import jsonl, pairs
from tests.screening.mortal import DIED, MortalOpenedBy
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ScreeningSettings(look_ahead=8, batch_tokens=300)


def opened(folder: Path) -> tuple[Any, Panel, OpenedBy]:
    """The tiny model in a folder, as every process opens it."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    backend = open_backend("transformers", str(folder), dtype="float32", device="cpu")
    vectors = PersonaVectors("kind", backend.info, made.vectors("kind").directions)
    by = OpenedBy(str(folder), options={"dtype": "float32", "device": "cpu"})
    return backend, Panel((Gauge(vectors, 1),)), by


def test_two_workers_one_of_which_dies_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed, which the extra `ray` asks for")
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("OMP_NUM_THREADS", "1"), ("PYTHONPATH", _path())):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv(DIED, str(tmp_path / "died"))
    backend, panel, by = opened(tmp_path / "model")
    data = [open_dataset(jsonl(tmp_path / "rows.jsonl", [*pairs(70), {"x": 1}, *pairs(9, 1)]))]
    screen(backend, data, panel, SETTINGS, folder=tmp_path / "one")
    executor = RayExecutor("local", MortalOpenedBy(by.model, by.backend, by.options), workers=2, threads=1)
    known = KnownModel.of(backend)
    done = screen(known, data, panel, SETTINGS, folder=tmp_path / "two", executor=executor)
    assert (tmp_path / "died").exists()
    assert done.scored == 80
    for name in ("scores.jsonl", "results.parquet", "rejects.jsonl", "summary.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_worker_that_opens_another_model_says_so(tmp_path: Path) -> None:
    backend, panel, by = opened(tmp_path / "model")
    other = replace(backend.info, n_layers=99)
    with pytest.raises(ScreeningError, match=r"another model under the name .*n_layers: 99 and"):
        rays._Worker(by, panel, SETTINGS, 1, other).units(Window(0, 0, "rows", ()), 0)
    with pytest.raises(ScreeningError, match="open in the workers, not in this process"):
        KnownModel.of(backend).forward(None)


@pytest.mark.parametrize(("gpus", "workers", "share"), [(0, 2, 0), (2, 2, 1), (4, 2, 1), (2, 3, 0.5), (1, 3, 1 / 3)])
def test_more_workers_than_gpus_share_them(gpus: int, workers: int, share: float) -> None:
    assert rays.gpu_share(gpus, workers) == share


def _path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "backends"), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed, which the extra `ray` asks for")
    backend, panel, by = opened(tmp_path / "model")
    data = [open_dataset(jsonl(tmp_path / "rows.jsonl", pairs(3)))]
    with pytest.raises(ScreeningError, match=r"no Ray cluster answers at 'ray://127\.0\.0\.1:9'"):
        screen(backend, data, panel, SETTINGS, folder=tmp_path / "r", executor=RayExecutor("ray://127.0.0.1:9", by))


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    backend, panel, by = opened(tmp_path / "model")
    data = [open_dataset(jsonl(tmp_path / "rows.jsonl", pairs(3)))]
    with pytest.raises(ScreeningError, match=r"pip install 'ray>="):
        screen(backend, data, panel, SETTINGS, folder=tmp_path / "r", executor=RayExecutor("local", by))


def test_work_is_handed_out_in_turn_and_comes_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray itself: a stand-in that answers late."""

    class Handle:
        def __init__(self, worker: Any) -> None:
            self.worker = worker

        def remote(self, window: Any, skip: int) -> Any:
            return (self.worker, window, skip)

    class Stand:
        made = 0

        def __init__(self) -> None:
            Stand.made += 1
            self.units = Handle(Stand.made)

    class Ray:
        def is_initialized(self) -> bool:
            return True

        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 2}

        def nodes(self) -> list[str]:
            return ["a", "b"]

        def remote(self, **needs: float) -> Any:
            assert (needs["num_cpus"], needs["num_gpus"]) == (1, 0)
            return lambda cls: type("Actor", (), {"remote": staticmethod(lambda *_: Stand())})

        def get(self, waiting: Any) -> Any:
            return [waiting]

    ray = Ray()
    monkeypatch.setattr(rays, "_ray", lambda: ray)
    executor = RayExecutor("auto", OpenedBy("model"))
    scorer: Any = SimpleNamespace(panel=None, settings=None, backend=SimpleNamespace(info=None))
    jobs: Any = [(number, int(number == 3)) for number in range(7)]
    found: list[Any] = [unit for units in executor.units(scorer, jobs) for unit in units]
    assert [unit[1] for unit in found] == list(range(7))
    assert [unit[0] for unit in found] == [1, 2, 1, 2, 1, 2, 1]
    assert found[3][2] == 1
