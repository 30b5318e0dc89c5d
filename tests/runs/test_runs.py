"""A run's folder: whose it is, and what is left of it after any interruption."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_lens.runs import RunError, RunFolder, accepting_changes, differences, file_prefix

CONFIG = {"kind": "test", "settings": {"seed": 0, "layers": [1, 2]}, "note": None}
HOLD = """
import sys
from persona_lens.runs import RunFolder
with RunFolder(sys.argv[1], {"kind": "test"}):
    print("held", flush=True)
    sys.stdin.read()
"""

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


def test_the_same_configuration_goes_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", CONFIG) as run:
        run.append("rows.jsonl", [{"a": 1}])
    with RunFolder(tmp_path / "run", dict(reversed(CONFIG.items()))) as again:  # the order of keys means nothing
        assert list(again.rows("rows.jsonl")) == [{"a": 1}]


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG):
        pass
    before = (tmp_path / "run.json").read_bytes()
    other = {"kind": "test", "settings": {"seed": 1, "layers": [1, 2], "top_p": None}}
    with pytest.raises(RunError) as refused, RunFolder(tmp_path, other):
        pass
    message = str(refused.value)
    assert "settings.seed: 0 -> 1" in message
    assert "settings.top_p: (absent) -> null" in message
    assert "note: null -> (absent)" in message
    assert "layers" not in message
    assert "kind" not in message
    assert str(tmp_path) in message
    assert (tmp_path / "run.json").read_bytes() == before
    with RunFolder(tmp_path, CONFIG):  # the refusal has let go of the lock
        pass


def test_tuples_and_lists_are_the_same_configuration(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"layers": (1, 2)}):
        pass
    with RunFolder(tmp_path, {"layers": [1, 2]}):
        pass


@given(values, values)
def test_differences_are_shown_exactly_where_there_are_any(a: Any, b: Any) -> None:
    assert bool(differences(a, b)) == (a != b)
    assert differences(a, a) == []


def test_differences_name_the_place() -> None:
    stored = {"a": {"b": {"c": 1, "d": [1]}}, "e": {}}
    wanted = {"a": {"b": {"c": 2, "d": [1, 2]}}, "e": 3}
    assert differences(stored, wanted) == ["a.b.c: 1 -> 2", "a.b.d: [1] -> [1, 2]", "e: {} -> 3"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(RunError, match=r"thesis\.tex.*new or empty folder"):
        RunFolder(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_start_leaves_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "run.json.part").write_text('{"ki')
    with RunFolder(tmp_path, CONFIG):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "run.json"]


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("mine")
    with pytest.raises(RunError, match="is a file; give a folder"):
        RunFolder(file, CONFIG)
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder(file / "run", CONFIG)
    assert file.read_text() == "mine"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is working in"), RunFolder(tmp_path, {"kind": "test"}):
            pass
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path, {"kind": "test"}):  # the dead hold nothing
            pass
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path, CONFIG):
        _ = 1 / 0
    with RunFolder(tmp_path, CONFIG):
        pass


@pytest.mark.parametrize("content", [b"", b'{"kind": "te', b"\xff\xfe\x00"])
def test_a_damaged_configuration_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json is damaged; remove"), RunFolder(tmp_path, CONFIG):
        pass


def test_a_partial_line_is_cut(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as run:
        run.append("rows.jsonl", [{"n": 1}, {"n": 2}])
        with (tmp_path / "rows.jsonl").open("ab") as stream:
            stream.write(b'{"n": 3, "te')
        assert list(run.rows("rows.jsonl")) == [{"n": 1}, {"n": 2}]
        run.append("rows.jsonl", [{"n": 3}])
    assert (tmp_path / "rows.jsonl").read_bytes() == b'{"n": 1}\n{"n": 2}\n{"n": 3}\n'


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.text(max_size=6), min_size=1, max_size=3), max_size=4),
    st.integers(0, 10**6),
)
def test_any_cut_leaves_whole_rows_and_can_be_gone_on_from(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[str]], where: int
) -> None:
    """Text holds whatever looks like the end of a line somewhere."""
    folder = tmp_path_factory.mktemp("cut")
    file = folder / "rows.jsonl"
    texts = [text for batch in batches for text in batch]
    with RunFolder(folder, CONFIG) as run:
        ends = [0]
        for text in texts:
            run.append("rows.jsonl", [{"text": text}])
            ends.append(file.stat().st_size)
        whole = file.read_bytes() if texts else b""
        cut = where % (len(whole) + 1)
        if texts:
            os.truncate(file, cut)
        finished = sum(end <= cut for end in ends[1:])
        assert list(run.rows("rows.jsonl")) == [{"text": text} for text in texts[:finished]]
        run.append("rows.jsonl", [{"text": text} for text in texts[finished:]])
        assert (file.read_bytes() if texts else b"") == whole


def test_a_damaged_line_is_said(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as run:
        (tmp_path / "rows.jsonl").write_bytes(b'{"n": 1}\n{"n": \n{"n": 3}\n')
        with pytest.raises(RunError, match=r"line 2 of .*rows\.jsonl is damaged"):
            list(run.rows("rows.jsonl"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder(tmp_path, CONFIG) as run:
        run.write_lines("rows.jsonl", [{"a": 1}])
        before = (tmp_path / "rows.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunError, match=r"rows\.jsonl cannot be written: No space left on device; make room"):
                run.write_lines("rows.jsonl", [{"a": 2}], replace=True)
            with pytest.raises(RunError, match=r"rows\.jsonl cannot be written: No space left"):
                run.append("rows.jsonl", [{"a": 2}])
        assert (tmp_path / "rows.jsonl").read_bytes() == before
        run.write_lines("rows.jsonl", [{"a": 3}], replace=True)
        assert list(run.rows("rows.jsonl")) == [{"a": 3}]
    assert not list(tmp_path.glob("*.part"))


def test_what_a_run_wrote_is_not_replaced_by_something_else(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as run:
        run.write_json("summary.json", {"mean": 1.5, "model": {"device": "cuda:0"}, "command": ["a", 1]})
        before = (tmp_path / "summary.json").read_bytes()
        run.write_json(
            "summary.json", {"mean": 1.5, "model": {"device": "cuda:3"}, "command": ["b"]}, free=("command",)
        )
        run.write_json(
            "summary.json", {"mean": 1.5, "model": {"device": "cuda:0"}, "command": ["a", 2]}, free=("command",)
        )
        assert (tmp_path / "summary.json").read_bytes() == before
        with pytest.raises(RunError, match=r"summary\.json is there, and what this run gives now is something else"):
            run.write_json("summary.json", {"mean": 2.5, "model": {"device": "cuda:0"}, "command": "a"})
        assert (tmp_path / "summary.json").read_bytes() == before
        with accepting_changes():
            run.write_json("summary.json", {"mean": 2.5})
        assert run.read_json("summary.json") == {"mean": 2.5}


def versions(torch: str, device: str, seed: int = 0) -> dict[str, Any]:
    return {
        "kind": "test",
        "seed": seed,
        "model": {"device": device, "backend": f"transformers {torch}"},
        "versions": {"torch": torch},
    }


def test_what_cannot_change_a_result_binds_no_run(tmp_path: Path) -> None:
    begun = versions("2.13.0", "cuda:0")
    with RunFolder(tmp_path, begun):
        pass
    before = (tmp_path / "run.json").read_bytes()
    with RunFolder(tmp_path, versions("2.13.1+cu128", "cuda:1")) as run:
        assert run.config == begun
    assert (tmp_path / "run.json").read_bytes() == before
    with pytest.raises(RunError) as refused, RunFolder(tmp_path, versions("2.14.0", "cpu")):
        pass
    for line in ('versions.torch: "2.13.0" -> "2.14.0"', 'model.device: "cuda:0" -> "cpu"', "--accept-changes"):
        assert line in str(refused.value)


def test_other_changes_are_accepted_by_name_and_noted(tmp_path: Path) -> None:
    with RunFolder(tmp_path, versions("2.13.0", "cpu")):
        pass
    changed = versions("2.14.0", "cpu")
    noted = ['model.backend: "transformers 2.13.0" -> "transformers 2.14.0"', 'versions.torch: "2.13.0" -> "2.14.0"']
    with accepting_changes(), RunFolder(tmp_path, changed) as run:
        assert run.config == {**versions("2.13.0", "cpu"), "accepted_changes": noted}
    with RunFolder(tmp_path, changed):  # accepted once
        pass
    with pytest.raises(RunError, match="seed: 0 -> 1"), RunFolder(tmp_path, versions("2.14.0", "cpu", seed=1)):
        pass
    other = {**changed, "kind": "another"}
    with pytest.raises(RunError, match="another configuration"), accepting_changes(), RunFolder(tmp_path, other):
        pass


def test_what_is_known_late_binds_too(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as run:
        run.bind("tuned/a", {"weights": "1", "device": "cuda:0"})
        run.bind("tuned--a", {"weights": "2"})
    with RunFolder(tmp_path, CONFIG) as run:
        run.bind("tuned/a", {"weights": "1", "device": "cuda:1"})
        with pytest.raises(RunError, match=r'tuned--a\.weights: "2" -> "3"'):
            run.bind("tuned--a", {"weights": "3"})


def test_a_finished_run_can_be_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(tmp_path, CONFIG) as run:
        run.write_json("summary.json", {"a": 1})
    (tmp_path / ".lock").unlink()

    def refused(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opening(path, flags, *more, **options)

    opening = os.open
    monkeypatch.setattr(os, "open", refused)
    with RunFolder(tmp_path, CONFIG) as run:
        run.write_json("summary.json", {"a": 1})
        with pytest.raises(RunError, match=r"new\.json cannot be written: the folder .* can only be read"):
            run.write_json("new.json", {})
    with pytest.raises(RunError, match="Read-only file system; choose a place"), RunFolder(tmp_path / "new", CONFIG):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run.json", "summary.json"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine\n")
    (tmp_path / "elsewhere").mkdir()
    with RunFolder(tmp_path / "run", CONFIG) as run:
        for name in ("rows.jsonl", "summary.json"):
            (run.path / name).symlink_to(tmp_path / "precious")
        (run.path / "run.json.part").symlink_to(tmp_path / "precious")
        (run.path / "shards").symlink_to(tmp_path / "elsewhere")
        for write in (
            lambda: run.append("rows.jsonl", [{}]),
            lambda: run.write_json("summary.json", {}),
            lambda: run.write_bytes("shards/one", b""),
        ):
            with pytest.raises(RunError, match="is a symbolic link"):
                write()
        run.bind("a", 1)  # its part was a link
    assert (tmp_path / "precious").read_text() == "mine\n"
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "names", [("a/b", "a--b"), ("a/b", "a_b"), ("A", "a"), ("x" * 300, "x" * 301), ("é" * 90, "ü" * 90)]
)
def test_prefixes_made_of_names_never_meet(names: tuple[str, str]) -> None:
    made = [file_prefix(number, name, "trait") for number, name in enumerate(names)]
    assert len({each.casefold() for each in made}) == 2
    assert all(len(f"{each}judgements.jsonl.part".encode()) < 200 and "/" not in each for each in made)


def test_bytes_are_a_function_of_the_content(tmp_path: Path) -> None:
    with RunFolder(tmp_path, CONFIG) as run:
        assert run.write_json("deep/er.json", {"b": "é", "a": [0.1]}) == tmp_path / "deep" / "er.json"
        run.write_lines("rows.jsonl", [{"b": "é\u2028\n", "a": 1e-07}, {}])
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="not JSON compliant"):
                run.append("rows.jsonl", [{"value": value}])
    assert (tmp_path / "deep" / "er.json").read_bytes() == '{\n  "b": "é",\n  "a": [\n    0.1\n  ]\n}\n'.encode()
    assert (tmp_path / "rows.jsonl").read_bytes() == '{"b": "é\u2028\\n", "a": 1e-07}\n{}\n'.encode()


@pytest.fixture
def verified() -> dict[str, Any]:
    """A model's record, once it was made sure that edits act on it."""
    from dataclasses import asdict

    from persona_lens.backend.verification import verify
    from tests.backends.fixtures import backend_of
    from tests.tiny import tiny_model

    backend = backend_of("transformers", tiny_model(seed=7))
    verify(backend)
    return asdict(backend.info)


def test_that_edits_act_is_noted_and_binds_no_run(tmp_path: Path, verified: dict[str, Any]) -> None:
    config = {**CONFIG, "model": verified}
    plain = {**config, "model": {**verified, "model": "never verified"}}
    with RunFolder(tmp_path / "one", config) as run:
        assert run.config == config
        run.bind("later", 1)
    noted = (tmp_path / "one" / "run.json").read_bytes()
    assert json.loads(noted)["edits_verified"] is True
    with RunFolder(tmp_path / "one", config) as again:
        assert again.config == config
        again.bind("later", 1)
    assert (tmp_path / "one" / "run.json").read_bytes() == noted
    with RunFolder(tmp_path / "two", plain) as run:
        assert run.config == plain
    assert "edits_verified" not in json.loads((tmp_path / "two" / "run.json").read_bytes())


def test_a_run_from_before_its_model_was_verified_goes_on_and_notes_it(
    tmp_path: Path, verified: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**CONFIG, "model": verified}
    with monkeypatch.context() as before:
        before.setattr("persona_lens.backend.verification._verified", set())
        with RunFolder(tmp_path, config) as run:
            run.bind("later", 1)
            run.append("rows.jsonl", [{"a": 1}])
    assert "edits_verified" not in json.loads((tmp_path / "run.json").read_bytes())
    with RunFolder(tmp_path, config) as again:
        assert list(again.rows("rows.jsonl")) == [{"a": 1}]
        assert again.config == config
    found = json.loads((tmp_path / "run.json").read_bytes())
    assert found == {**config, "bound": {"later": 1}, "edits_verified": True}
    monkeypatch.setattr("persona_lens.backend.verification._verified", set())
    with RunFolder(tmp_path, config):  # as with --no-verify
        pass
    assert json.loads((tmp_path / "run.json").read_bytes()) == found


def test_a_run_that_is_refused_before_it_keeps_anything_leaves_the_folder_to_another(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def refused(layer: int, *rows: dict[str, Any]) -> None:
        with RunFolder(folder, {"kind": "test", "layer": layer}) as run:
            if rows:
                run.append("rows.jsonl", rows)
            raise RunError("refused")

    with pytest.raises(RunError, match="refused"):
        refused(7)
    with pytest.raises(RunError, match="refused"):
        refused(1, {"row": 0})
    with pytest.raises(RunError, match="layer: 1 -> 2"):
        refused(2)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(RunError, match="refused"):
        refused(1)  # a run that had begun before keeps its folder
    assert (folder / "run.json").exists()
