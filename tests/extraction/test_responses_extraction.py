"""Extraction from responses of another program: the vectors are those that generating them would have given."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from persona_lens import PersonaLensError
from persona_lens.backend import Backend, Read
from persona_lens.cli import app
from persona_lens.core.progress import Progress, no_progress
from persona_lens.extraction import Extraction, ExtractionSettings, extract, extraction_work, plan_requests
from persona_lens.extraction.external import ExternalScores, external_rollouts
from persona_lens.extraction.means import ExtractionError, arm_means
from persona_lens.judging import Exchange, Judgement
from persona_lens.models.chat import chat_format
from persona_lens.runs import RunError
from persona_lens.runs.rollouts import ReadRollouts, Rollouts
from persona_lens.runs.settings import RolloutSettings
from persona_lens.traits import load_trait
from persona_lens.vectors import load_vectors
from tests.backends.fixtures import ADAPTERS, FEW_ARCHITECTURES, backend_of
from tests.tiny import tiny_model, tiny_tokenizer

TRAIT = load_trait("optimistic")
SETTINGS = ExtractionSettings(questions=4, paired=False, rollouts=RolloutSettings(max_new_tokens=24, batch_size=8))
Row = dict[str, Any]


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """As `tiny_tokenizer`, with one control token: random models say any token, and control tokens are refused."""
    tokenizer = tiny_tokenizer()
    make: Any = PreTrainedTokenizerFast
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["added_tokens"] = []
    plain: PreTrainedTokenizerFast = make(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(core)),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        padding_side="left",
    )
    plain.add_tokens([AddedToken("<|im_start|>", special=False), AddedToken("<|endoftext|>", special=False)])
    plain.chat_template = tokenizer.chat_template
    assert plain.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    return plain


@cache
def backend_with(adapter: str, architecture: str) -> Backend:
    return backend_of(adapter, tiny_model(architecture), plain_tokenizer())


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Extraction, list[Row]]:
    """An extraction by generation, and the rows that it saved, each with its score."""
    out = tmp_path_factory.mktemp("runs") / "generated"
    found = extract(backend_with("transformers", "llama"), TRAIT, out, settings=SETTINGS)
    scores = [json.loads(line)["score"] for line in (out / "scores.jsonl").read_text().splitlines()]
    by_labels = {tuple(r.request.labels.values()): score for r, score in zip(found.rollouts, scores, strict=True)}
    rows = rows_of(out)
    for row in rows:
        row["score"] = by_labels[row["arm"], row["question_number"], row["pair"], row["sample"]]
    return found, rows


def rows_of(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().split("\n") if line]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], Path]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}


def assert_same(found: Extraction, wanted: Extraction) -> None:
    assert found.vectors.directions.keys() == wanted.vectors.directions.keys() != set()
    for name, want in wanted.vectors.directions.items():
        got = found.vectors.directions[name]
        assert float((got - want).norm() / want.norm()) < 1e-4, name


def read(path: Path | list[Path], backend: Backend, folder: Path | None = None, **more: Any) -> Extraction:
    settings = more.pop("settings", SETTINGS)
    return extract(backend, TRAIT, folder, settings=settings, responses=path, **more)


# The vectors


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", FEW_ARCHITECTURES)
def test_what_is_read_is_what_generation_reads(adapter: str, architecture: str, tmp_path: Path) -> None:
    """Over every backend, without a judge and a filter."""
    backend = backend_with(adapter, architecture)
    chat, settings = chat_format(backend), replace(SETTINGS, questions=2)
    requests = plan_requests(TRAIT, settings)
    making = Rollouts(backend, chat, requests, settings.rollouts, reads=Read.means())
    made = making.run()
    path = write_jsonl(tmp_path / "rows.jsonl", [rollout.to_row() for rollout in made])
    reading = ReadRollouts(
        backend,
        external_rollouts(backend, chat, TRAIT, path, questions=2),
        settings.rollouts,
        reads=Read.means(),
    )
    assert [replace(r, request=replace(r.request, seed=0)) for r in made] == reading.run()
    everything = [True] * len(requests)
    wanted = arm_means(requests, everything, making.reductions).difference()
    found = arm_means(reading.requests, everything, reading.reductions).difference()
    assert wanted.keys() == found.keys() == {"response_mean", "prompt_mean", "prompt_last"}
    for name, want in wanted.items():
        assert float((found[name] - want).norm() / want.norm()) < 1e-4, name


def test_an_extraction_gives_the_vectors_of_generation(generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    """From the file that it saved itself, judged anew."""
    wanted, rows = generated
    saved = [{name: value for name, value in row.items() if name != "score"} for row in rows]
    found = read(write_jsonl(tmp_path / "rows.jsonl", saved), backend_with("transformers", "llama"), tmp_path / "read")
    assert_same(found, wanted)
    assert 0 < sum(bool(rollout.ended) for rollout in found.rollouts) < len(rows)
    assert found.summary["counts"] == wanted.summary["counts"]
    assert found.summary["judge"]["judge"] == "likelihood"
    assert found.summary["judge"]["calibration"] == pytest.approx(wanted.summary["judge"]["calibration"], rel=1e-3)
    by_labels = {tuple(r.request.labels.values()): r for r in wanted.rollouts}
    for row in rows_of(tmp_path / "read"):
        same = by_labels[row["arm"], row["question_number"], row["pair"], row["sample"]].to_row()
        assert "seed" not in row
        assert {**row, "seed": same["seed"]} == {**same, "row": row["row"], "check": row["check"]}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("columns", ["ids", "numbers", "prompt"])
def test_every_kind_of_file_gives_the_same(
    kind: str, columns: str, generated: tuple[Extraction, list[Row]], tmp_path: Path
) -> None:
    wanted, rows = generated
    backend = backend_with("transformers", "llama")
    chat = chat_format(backend)
    kept: dict[str, Callable[[Row], Row]] = {
        "ids": lambda r: {name: r[name] for name in ("arm", "question", "system", "response_ids", "score")},
        "numbers": lambda r: {
            **{name: r[name] for name in ("arm", "question_number", "pair", "sample", "response", "score")},
            # As vLLM gives them, with the token that ended the turn.
            "response_ids": [*r["response_ids"], *([2] if r["ended"] else [])],
        },
        "prompt": lambda r: {
            **{name: r[name] for name in ("arm", "question", "pair", "response_ids", "ended", "score")},
            "prompt_ids": chat.encode(r["system"], r["question"]),
            "prompt": chat.rendered_text(r["system"], r["question"]),
        },
    }
    chosen = [kept[columns](row) for row in rows[::-1]]  # in another order
    found = read(WRITERS[kind](tmp_path / f"rows.{kind}", chosen), backend)
    assert_same(found, wanted)
    if columns != "ids":
        assert [bool(r.ended) for r in found.rollouts] == [r.ended for r in wanted.rollouts]


def text_rows(rows: Sequence[Row]) -> list[Row]:
    """The same rows with responses of plain text, which a random model does not write."""
    return [
        {
            "arm": row["arm"],
            "question": row["question"],
            "pair": row["pair"],
            "score": row["score"],
            "response": "".join(chr(32 + token % 90) for token in row["response_ids"]),
        }
        for row in rows
    ]


@pytest.mark.parametrize("kind", WRITERS)
def test_text_gives_the_same_as_its_ids(kind: str, generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    backend = backend_with("transformers", "llama")
    chat = chat_format(backend)
    texts = text_rows(generated[1])
    ids = [{**row, "response_ids": chat.encode_answer(row["response"])} for row in texts]
    found = read(WRITERS[kind](tmp_path / f"texts.{kind}", texts), backend)
    wanted = read(write_jsonl(tmp_path / "ids.jsonl", ids), backend)
    assert_same(found, wanted)
    assert [r.response for r in found.rollouts] == [r.response for r in wanted.rollouts]
    assert {r.ended for r in found.rollouts} == {None}


def test_more_samples_are_counted_as_they_come(generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    """Every response twice changes no mean."""
    wanted, rows = generated
    twice = [{name: value for name, value in row.items() if name != "sample"} for row in rows for _ in range(2)]
    found = read(write_jsonl(tmp_path / "rows.jsonl", twice), backend_with("transformers", "llama"))
    assert [r.request.labels["sample"] for r in found.rollouts[:6]] == [0, 0, 1, 1, 0, 0]
    assert len(found.rollouts) == 2 * len(rows)
    assert set(found.vectors.directions) == set(wanted.vectors.directions)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_empty_responses_are_rows_without_a_score(
    adapter: str, generated: tuple[Extraction, list[Row]], tmp_path: Path
) -> None:
    rows = [{**row, "score": 90.0 if row["arm"] == "positive" else 10.0} for row in text_rows(generated[1])]
    for row in rows[:4]:
        row["response"] = ""
    found = read(write_csv(tmp_path / "rows.csv", rows), backend_with(adapter, "llama"))
    counts = found.summary["counts"]
    assert counts["positive"]["no_score"] + counts["negative"]["no_score"] == 4
    assert found.summary["responses"] == len(rows)
    assert all(bool(d.isfinite().all()) for d in found.vectors.directions.values())


# Scores


def test_scores_of_the_file_replace_the_judge(generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    rows = [{**row, "score": 90 if row["arm"] == "positive" else 10, "coherence": 80} for row in generated[1]]
    next(row for row in rows if row["arm"] == "positive")["score"] = None  # a refusal
    incoherent = [row for row in rows if row["arm"] == "negative"][:3]
    incoherent[0]["coherence"], incoherent[1]["coherence"], incoherent[2]["score"] = 20, None, 70
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    backend = backend_with("transformers", "llama")
    found = read(path, backend, tmp_path / "run")
    assert isinstance(found.judge, ExternalScores)
    digest = external_rollouts(backend, chat_format(backend), TRAIT, path, questions=4).digests[0]
    assert found.summary["judge"] == {"judge": "given", "file_sha256": [digest]}
    assert found.summary["counts"] == {
        "positive": {"kept": 19, "failed_threshold": 0, "incoherent": 0, "lost_twin": 0, "no_score": 1},
        "negative": {"kept": 17, "failed_threshold": 1, "incoherent": 2, "lost_twin": 0, "no_score": 0},
    }
    assert not (tmp_path / "run" / "evidence.jsonl").exists()
    scores = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert {(row["score"], row["reason"]) for row in scores} == {
        (90.0, None),
        (10.0, None),
        (70.0, None),
        (None, "no score was given"),
    }
    assert {row["coherence"] for row in scores} == {80.0, 20.0, None}
    loaded = load_vectors(tmp_path / "run")
    assert loaded.provenance["judge"]["judge"] == "given"


def test_coherence_of_the_file_is_filtered_as_a_judges_own_is(
    generated: tuple[Extraction, list[Row]], tmp_path: Path
) -> None:
    """The same scores from a judge and from the file keep the same responses, whatever the threshold."""
    rows = [
        {**row, "score": (90 if row["arm"] == "positive" else 10) if i % 7 else 50, "coherence": i * 37 % 101}
        for i, row in enumerate(generated[1])
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    backend = backend_with("transformers", "llama")
    given = external_rollouts(backend, chat_format(backend), TRAIT, path, questions=4)
    assert given.scores is not None
    for coherence in (0.0, 40.0):
        settings = replace(SETTINGS, coherence=coherence, paired=True)
        by_file = read(path, backend, settings=settings)
        by_judge = read(path, backend, settings=settings, judge=Saying(given.scores.judgements))
        assert by_file.summary["counts"] == by_judge.summary["counts"]
        incoherent = sum(counts["incoherent"] for counts in by_file.summary["counts"].values())
        failed = sum(counts["failed_threshold"] for counts in by_file.summary["counts"].values())
        assert (incoherent > 0) == (coherence > 0)
        assert failed > 0


@dataclass(frozen=True)
class Saying:
    """A judge that says what it was told to, in order."""

    judgements: tuple[Judgement, ...]
    concurrency = 1

    def describe(self) -> dict[str, Any]:
        return {"judge": "saying"}

    def pieces(self, exchanges: Sequence[Exchange]) -> list[list[int]]:
        return [list(range(len(exchanges)))]

    def judge(self, exchanges: Sequence[Exchange], progress: Progress = no_progress) -> list[Judgement]:
        return list(self.judgements)


def test_scores_in_some_rows_only_are_not_used(generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "score"} for row in generated[1]]
    rows[0]["score"] = 3.0
    with pytest.warns(UserWarning, match="1 of 40 responses come with a score column, so the scores in the file are"):
        found = read(write_jsonl(tmp_path / "rows.jsonl", rows), backend_with("transformers", "llama"))
    assert found.summary["judge"]["judge"] == "likelihood"


# What is missing, and what is kept


def test_missing_responses_stop_it_or_are_said(generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    rows = [{**row, "score": 90 if row["arm"] == "positive" else 10} for row in generated[1]]
    gone = next(
        i for i, row in enumerate(rows) if (row["arm"], row["question_number"], row["pair"]) == ("negative", 1, 2)
    )
    del rows[gone]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    backend = backend_with("transformers", "llama")
    message = (
        r"of 40 responses \(4 questions, 5 pairs, 1 samples, two arms\) 1 of the negative arm are missing, first the "
        r"negative arm's sample 0 of question 1 under pair 2\. .*--allow-missing"
    )
    with pytest.raises(ExtractionError, match=message):
        read(path, backend, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    paired = replace(SETTINGS, paired=True)
    with pytest.warns(UserWarning, match="the extraction goes on without them"):
        found = read(path, backend, tmp_path / "run", allow_missing=True, settings=paired)
    # The twin of the one that is missing does not count by itself.
    assert found.summary["counts"]["positive"]["lost_twin"] == 1
    assert found.summary["responses"] == 39


def test_questions_that_are_not_used_are_left_out(generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", generated[1])
    with pytest.warns(UserWarning, match="20 responses belong to questions that are not used"):
        found = read(path, backend_with("transformers", "llama"), settings=replace(SETTINGS, questions=2))
    assert found.summary["responses"] == 20


def test_a_run_is_known_by_the_content_of_its_files(generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    backend, out = backend_with("transformers", "llama"), tmp_path / "run"
    path = write_jsonl(tmp_path / "rows.jsonl", generated[1])
    first = read(path, backend, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    config = json.loads((out / "run.json").read_text())
    assert str(tmp_path) not in (out / "run.json").read_text()
    assert config["settings"]["rollouts"] == {"batch_size": 8, "batch_tokens": 32768}
    assert not {"samples", "temperature", "max_new_tokens"} & config["settings"].keys()
    moved = Path(shutil.move(path, tmp_path / "elsewhere.jsonl"))
    # The settings of sampling mean nothing, so that others make no other run.
    greedy = replace(SETTINGS, samples=1, rollouts=RolloutSettings(max_new_tokens=3, temperature=0.0, batch_size=8))
    assert_same(read(moved, backend, out, settings=greedy), first)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    other = write_jsonl(tmp_path / "other.jsonl", generated[1][::-1])
    with pytest.raises(RunError, match=r"responses\.file_sha256"):
        read(other, backend, out)


def test_the_plan_of_the_work_is_what_runs(generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    backend = backend_with("transformers", "llama")
    chat = chat_format(backend)
    saved = [{name: value for name, value in row.items() if name != "score"} for row in generated[1]]
    given = external_rollouts(backend, chat, TRAIT, write_jsonl(tmp_path / "rows.jsonl", saved), questions=4)
    reading, judging = extraction_work(backend, TRAIT, SETTINGS, chat, given=given)
    assert (reading.label, reading.rows) == ("reading", 40)
    assert reading.tokens == sum(
        len(p) + len(r.response_ids) for p, r in zip(given.prompts, given.rollouts, strict=True)
    )
    assert judging.rows == 5 * 40  # both instructions of two pairs, and none
    scored = write_jsonl(tmp_path / "scored.jsonl", [{**row, "score": 1} for row in generated[1]])
    given = external_rollouts(backend, chat, TRAIT, scored, questions=4)
    assert [work.label for work in extraction_work(backend, TRAIT, SETTINGS, chat, given=given)] == ["reading"]


def test_prompts_stand_together_where_the_backend_shares_them(
    generated: tuple[Extraction, list[Row]], tmp_path: Path
) -> None:
    backend = backend_with("transformers", "llama")
    assert backend.shares_prompts
    rows = [{name: value for name, value in row.items() if name != "sample"} for row in generated[1] for _ in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = external_rollouts(backend, chat_format(backend), TRAIT, path, questions=4)
    reading = ReadRollouts(backend, given, RolloutSettings(batch_size=8), reads=Read.means())
    assert sorted(index for batch in reading.batches for index in batch) == list(range(160))
    assert [len({given.prompts[i] for i in batch}) for batch in reading.batches] == [2] * 20
    small = ReadRollouts(backend, given, RolloutSettings(batch_size=8, batch_tokens=100), reads=Read.means())
    assert len(small.batches) > 20


# The command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    plain_tokenizer().save_pretrained(folder)
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in arguments])


def extraction(model: Path, out: Path, *more: str | Path) -> Result:
    return run(
        "extract", model, "optimistic", "--out", out, "--questions", "4", "--unpaired", "--dtype", "float32", *more
    )


def test_the_command_reads_them(model: Path, generated: tuple[Extraction, list[Row]], tmp_path: Path) -> None:
    rows = [{**row, "score": 90 if row["arm"] == "positive" else 10} for row in generated[1]]
    arms = [
        write_parquet(tmp_path / f"{a}.parquet", [r for r in rows if r["arm"] == a]) for a in ("positive", "negative")
    ]
    files = [word for path in arms for word in ("--responses", path)]
    planned = extraction(model, tmp_path / "run", *files, "--dry-run", "--json")
    assert json.loads(planned.stdout)["work"][0]["rows"] == 40, planned.output
    assert not (tmp_path / "run").exists()
    result = extraction(model, tmp_path / "run", *files, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["judge"]["judge"] == "given"
    assert "note: scores are those of the file; no judge runs" in result.stderr
    assert torch.isfinite(load_vectors(tmp_path / "run").directions["response_mean"]).all()
    again = extraction(model, tmp_path / "run", *files)
    assert again.exit_code == 0
    assert "optimistic in" in again.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--samples", "2", "--temperature", "1.0"), "--samples, --temperature: with --responses nothing is generated"),
        (("--max-new-tokens", "48"), "--max-new-tokens: with --responses"),  # though it is the default
        (("--top-p", "0.5"), "--top-p: with --responses"),
    ],
)
def test_options_of_sampling_are_refused(model: Path, options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = extraction(model, tmp_path / "run", "--responses", tmp_path / "none.csv", *options)
    assert isinstance(result.exception, PersonaLensError)
    assert said in str(result.exception)


def test_allow_missing_alone_is_refused(model: Path, tmp_path: Path) -> None:
    result = extraction(model, tmp_path / "run", "--allow-missing")
    assert isinstance(result.exception, PersonaLensError)
    assert "name it with --responses" in str(result.exception)
