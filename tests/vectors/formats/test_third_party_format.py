"""A format of another package: one `Form`, named by an entry point, is recognised, read and written as ours are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from persona_lens.vectors.formats import FORMS, FormatError, Stated, export_vectors, import_vectors
from tests.vectors.formats.files import vectors

THEIRS = """
import json
import torch
from persona_lens.vectors.formats.form import Exported, Form, assemble

def read(file, content, stated):
    rows = {int(layer): torch.tensor(row) for layer, row in json.loads(file.read_text()).items()}
    return assemble(file, "lines", {"response_mean": rows}, stated)

def write(vectors, chosen):
    rows = {layer: row.tolist() for layer, row in chosen.of(vectors).items()}
    return Exported({f"{vectors.trait}.lines": json.dumps(rows).encode()})

FORM = Form("lines", "their program", ".lines", "file", lambda file, stated: file.suffix == ".lines", read, write)
"""


@pytest.fixture
def planted(plant: Any) -> None:
    plant(FORMS.group, THEIRS, lines="FORM", broken="read")


@pytest.mark.usefixtures("planted")
def test_it_is_written_recognised_and_read(tmp_path: Path) -> None:
    given: Any = vectors()
    (file,), _ = export_vectors(given, "lines", tmp_path / "made.lines")
    found = import_vectors(file, Stated(given.model, given.trait)).vectors
    torch.testing.assert_close(found[1], given[1])
    assert found.provenance["imported"]["format"] == "lines"
    with pytest.raises(FormatError, match=r"a file of lines ends in \.lines"):
        export_vectors(given, "lines", tmp_path / "made.txt")


@pytest.mark.usefixtures("planted")
def test_a_broken_one_is_said_and_hides_nothing() -> None:
    with pytest.raises(
        FormatError, match=r"format broken cannot be loaded: its entry point .* is a function, not a Form"
    ):
        export_vectors(vectors(), "broken")
    with pytest.raises(FormatError, match=r"there is no format 'rows'; there are .*npz .*lines \(their program\)"):
        export_vectors(vectors(), "rows")
