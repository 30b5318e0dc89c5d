"""Every notebook runs from top to bottom, and is kept with its outputs.

`make notebooks` runs them and saves what they say; `python -m tests.test_notebooks NAME...` does it for some.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
MOST_BYTES = 400_000
KEEP = "PERSONA_LENS_KEEP_NOTEBOOKS"  # set, what tests run in its own size is kept with its outputs
REMOTE = ("05_remote.ipynb",)  # run in tests/ndif, where there is a server
# Text of a cell -> what is run in its place: sizes only, and none that a notebook's own checks rest on.
SMALLER = {
    "ExtractionSettings(questions=6,": "ExtractionSettings(questions=2,",
    "ExtractionSettings(questions=10,": "ExtractionSettings(questions=4,",
    "RolloutSettings(max_new_tokens=24": "RolloutSettings(max_new_tokens=8",
    "RolloutSettings(max_new_tokens=32,": "RolloutSettings(max_new_tokens=12,",
    "RolloutSettings(24": "RolloutSettings(8",
    "max_new_tokens=40)": "max_new_tokens=8)",
    "max_new_tokens=32)": "max_new_tokens=8)",
    "max_new_tokens=30)": "max_new_tokens=8)",
    "rows[:96]": "rows[:36]",
    "rows[96:]": "rows[132:]",
    "Level.STRONG)][:24]": "Level.STRONG)][:8]",
    '"batch_size": 8,': '"batch_size": 2,',
    "questions=(0, 1, 2, 3)": "questions=(0, 1)",
    "random_features=3, coefficient=4, questions=3,": "random_features=1, coefficient=4, questions=2,",
    "questions=4, samples=1,": "questions=2, samples=1,",
}


def read(path: Path) -> Any:
    library: Any = nbformat  # its functions carry no types
    return library.read(path, as_version=4)


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["01_quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_kept_with_its_outputs(path: Path) -> None:
    """As a run from top to bottom left them, light, and without what only one machine has."""
    notebook, text = read(path), path.read_text(encoding="utf-8")
    assert [cell.cell_type for cell in notebook.cells[:2]] == ["markdown", "markdown"]
    assert all(word in notebook.cells[1].source for word in ("pip install", "make wheel", "Colab", "GPU"))
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert len(text) < MOST_BYTES
    assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|var|opt)/", text)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("size", ["smaller", pytest.param("as it is", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.name not in REMOTE], ids=lambda path: path.name)
def test_it_runs(path: Path, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, as a reader who has installed the package would run it."""
    assert_runs(path, tmp_path, monkeypatch, SMALLER if size == "smaller" else {})


@pytest.mark.parametrize("shown", SMALLER)
def test_every_substitution_matches(shown: str) -> None:
    assert any(shown in cell.source for path in NOTEBOOKS for cell in read(path).cells)


def assert_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smaller: Mapping[str, str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(path)
    for cell in notebook.cells:
        for shown, run in smaller.items():
            cell.source = cell.source.replace(shown, run)
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    execute(notebook, workplace)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "nothing was drawn"
    assert list(workplace.iterdir()) == [], "it leaves files behind"
    if os.environ.get(KEEP) and not smaller:
        keep(notebook, path)


def execute(notebook: Any, workplace: Path) -> None:
    """Run it in a kernel of its own; raises CellExecutionError, with the traceback."""
    resources = {"metadata": {"path": str(workplace)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()


def keep(notebook: Any, path: Path) -> None:
    """Save what it said, but for progress, the times that a kernel notes, and frames around a server that has ended."""
    library: Any = nbformat  # its functions carry no types
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "<iframe" in output.get("data", {}).get("text/html", ""):
                    del output["data"]["text/html"]
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
    library.write(notebook, path)


if __name__ == "__main__":
    for each in NOTEBOOKS:
        if each.name not in REMOTE and (each.name in sys.argv[1:] or len(sys.argv) == 1):
            ran = read(each)
            with TemporaryDirectory() as folder:
                execute(ran, Path(folder))
            keep(ran, each)
