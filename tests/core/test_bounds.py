"""Files and texts from outside: what is in them is bounded before anything is made of it, and no parser falls over."""

from __future__ import annotations

import io
import json
import pickle
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from persona_lens.backend import Positions, Schedule, Span
from persona_lens.cli import app
from persona_lens.cli.settings import layer_numbers
from persona_lens.core.documents import DocumentError, parse_json, parse_yaml, save_tensors
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import shown
from persona_lens.finetuning.config import make_config, read_config
from persona_lens.runs import RunFolder
from persona_lens.steering import Steering, load_steering
from persona_lens.vectors import METADATA, load_vectors
from persona_lens.vectors.formats import Stated, import_vectors
from tests.campaign import fuzz
from tests.vectors.formats.files import INFO, vectors

BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
MISHAPS = (
    "2001-99-99",
    "0x_",
    "seed: 0x_",
    "seed: 2001-99-99",
    "!!int ''",
    "!!timestamp x",
    '"\\UFFFFFFFF"',
    "[" * 3000,
    "a: " + "{b: " * 3000,
    "- " * 3000,
    "seed: " + "9" * 5000,
    "seed: 1e999",
    "? [a]\n: b",
    "&a [*a]",
    BOMB,
    "\x00",
    "a: \ud800",
)


@pytest.mark.parametrize("text", MISHAPS, ids=lambda text: ascii(text[:12]))
def test_yaml_and_json_of_any_kind_are_read_or_refused_in_short(text: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    for file in (tmp_path / "c.yaml", tmp_path / "run.json"):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    reads: tuple[Callable[[], object], ...] = (
        lambda: make_config(read_config(tmp_path / "c.yaml")),
        lambda: load_steering(tmp_path / "c.yaml", {}),
        lambda: parse_json(text),
        lambda: RunFolder(tmp_path, {"a": 1}).__enter__(),
    )
    for read in reads:
        with pytest.raises(PersonaLensError) as caught:
            read()
        assert len(str(caught.value)) < 2000
    assert time.monotonic() - begun < 5


def test_what_yaml_is_for_still_works() -> None:
    text = "a: 2001-01-01\nb: 0x1f\nc: [1, 2.5, .inf, yes, null, 'x']\nd: {e: 1e-5, f: 1.0e-5}"
    found = parse_yaml(text)
    assert found == {
        "a": "2001-01-01",
        "b": 31,
        "c": [1, 2.5, float("inf"), True, None, "x"],
        "d": {"e": "1e-5", "f": 1e-5},
    }
    with pytest.raises(DocumentError, match="too long"):
        parse_yaml("a" * 10**6)


def test_a_value_in_a_message_is_short_however_large() -> None:
    bomb: Any = ["x"]
    for _ in range(60):
        bomb = [bomb] * 9
    assert len(shown(bomb)) <= 80
    assert len(shown(10**5000)) <= 80
    assert len(shown({"a" * 10**6: "b" * 10**6})) <= 80


@pytest.mark.parametrize(
    "text",
    [
        "grumpy@0-99999999999:+1",
        "grumpy@0-999999999:+1",
        "grumpy@1:+1 on response[1000000000000000000000000000000:]",
        "grumpy@1:+1 on prompt[-" + "9" * 5000 + ":]",
        "grumpy@1:+1 schedule(0:1 99999999999999999999:0)",
        "grumpy@1:+1 schedule(0:1 2:1e999)",
        "grumpy@1:+1e999",
        "grumpy@1:+1 if grumpy@1>1e999",
        "grumpy@all:+1, " * 10_000 + "grumpy@1:+1",
        "(" * 10_000,
    ],
    ids=lambda text: text[8:30],
)
def test_a_line_of_notation_takes_no_memory(text: str) -> None:
    own = vectors()
    tracemalloc.start()
    with pytest.raises(PersonaLensError) as caught:
        Steering.parse(text, [own])
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert len(str(caught.value)) < 1000


def test_so_it_is_in_python_and_in_options() -> None:
    for make in (
        lambda: Span(Positions.RESPONSE, 10**30),
        lambda: Schedule(((0, 1.0), (10**30, 0.0))),
        lambda: layer_numbers("0-99999999999", 5),
        lambda: layer_numbers("9" * 5000, 5),
    ):
        with pytest.raises(PersonaLensError) as caught:
            make()
        assert len(str(caught.value)) < 300
    assert layer_numbers("3, 0-1,1", 5) == [0, 1, 3]
    for seed in (2**63, 2**64, -1):
        result = CliRunner().invoke(app, ["generate", "smollm2-135m", "v", "Hi", "--seed", str(seed)])
        assert result.exit_code == 2, result.exception
        assert "--seed" in result.output


class Big:
    """Takes as much memory as it likes when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (10**11,)


def npz_of(file: Path, header: dict[str, Any], shape: tuple[int, int], packed: int = zipfile.ZIP_STORED) -> Path:
    text = io.BytesIO()
    np.save(text, np.array(json.dumps(header)))
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "w", packed) as archive:
        archive.writestr("persona_lens.npy", text.getvalue())
        archive.writestr("response_mean.npy", array.getvalue() + bytes(1000))
    return file


def test_files_cannot_claim_memory(tmp_path: Path) -> None:
    header = json.loads(vectors().header())
    wide = {**header, "model": {**header["model"], "n_layers": 100_000, "d_model": 100_000}}
    large = {**header, "model": {**header["model"], "n_layers": 2**13, "d_model": 2**13}}
    files = [
        npz_of(tmp_path / "wide.npz", wide, (100_000, 100_000)),
        npz_of(tmp_path / "large.npz", large, (2**13, 2**13)),
        npz_of(tmp_path / "packed.npz", header, (4, 6), zipfile.ZIP_LZMA),
        tmp_path / "big.pt",
        tmp_path / "rows.pt",
    ]
    stream = io.BytesIO()
    torch.save({"axis": Big()}, stream, pickle_module=pickle)
    files[3].write_bytes(stream.getvalue())
    torch.save(torch.ones(1).expand(2**40, 1), files[4])
    tracemalloc.start()
    for file in files:
        for stated in (Stated(INFO, "t"), Stated(None, "t")):
            with pytest.raises(PersonaLensError):
                import_vectors(file, stated)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize(
    "tuned",
    ["x", 1, [1, 2], {"layer": 1}, {"layer": "1", "coefficient": 1, "reduction": "r"},
     {"layer": True, "coefficient": 1, "reduction": "r"}, {"layer": 1, "coefficient": None, "reduction": "r"},
     {"layer": 10**18, "coefficient": 10**400, "reduction": []}],
    ids=str,
)  # fmt: skip
def test_a_malformed_choice_in_a_header_is_damage(tuned: Any, tmp_path: Path) -> None:
    own = vectors()
    header = json.loads(own.header())
    header["provenance"]["tuned"] = tuned
    (tmp_path / "v").write_bytes(save_tensors(own.directions, METADATA, json.dumps(header)))
    with pytest.raises(PersonaLensError, match="damaged"):
        load_vectors(tmp_path / "v")


@pytest.mark.parametrize("value", ["x", 1, [[]], {"trait": 1}, {"slope": "x"}, {"rollouts": [1]}])
def test_what_vectors_carry_may_be_anything(value: Any) -> None:
    own = vectors(trait=value, judge={"calibration": value}, settings=value, shift_forecasts=value, monitor=value)
    for read in ("trait_definition", "calibration", "forecasts", "rollouts", "monitor"):
        with suppress(PersonaLensError):
            getattr(own, read)


def test_a_few_inputs_of_every_kind_leave_no_traceback() -> None:
    """The whole of it is `make campaign`."""
    counts = fuzz.attack(seed=1, size=0.005)
    assert not counts.failures
    assert counts.total > 400
