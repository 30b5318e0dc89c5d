"""`screen`: its numbers against those worked out by hand, its files, its resuming."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from persona_lens import wrap_model
from persona_lens.backend import Read, ReadKind, Sampling, TokenBatch
from persona_lens.backend.parts import Part
from persona_lens.core.errors import PersonaLensError
from persona_lens.data.datasets import open_dataset
from persona_lens.models import ChatFormat
from persona_lens.monitoring import Gauge, Panel
from persona_lens.reports.screening import told
from persona_lens.runs import RunFolder
from persona_lens.runs.rollouts import row_seed
from persona_lens.screening import (
    Band,
    BaseResponses,
    Counted,
    Flagging,
    Quantity,
    Screening,
    ScreeningError,
    ScreeningSettings,
    Turns,
    fit_forecast,
    screen,
    screening_work,
    with_forecasts,
)
from persona_lens.screening.rows import SCORES
from persona_lens.vectors import PersonaVectors
from tests.families import FAMILIES
from tests.screening import made
from tests.screening.made import jsonl, pairs, panel
from tests.thinking import ASKED, NEW, thinking_model
from tests.tiny import with_template

SMALL = ScreeningSettings(look_ahead=8, batch_tokens=300, max_new_tokens=6)
GENERATED = replace(SMALL, base=BaseResponses.GENERATE)


def run(folder: Path, data: Any, settings: ScreeningSettings = SMALL, **given: Any) -> Screening:
    datasets = data if isinstance(data, list) else [open_dataset(data)]
    return screen(made.backend(), datasets, panel(), settings, folder=folder, **given)


def table(folder: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pq.read_table(folder / "results.parquet").to_pydict()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def projections(ids: list[int], start: int, stop: int) -> np.ndarray[Any, Any]:
    """Mean projections of some tokens of a text, one for each gauge, from the whole activations."""
    read = Read(ReadKind.ACTIVATIONS)
    whole = made.backend().forward(TokenBatch.of([ids]), (), [read]).reads["activations"][0]
    return np.array(
        [float(whole[g.layer, start:stop].mean(dim=0) @ (g.direction / g.direction.norm())) for g in panel().gauges]
    )


def test_values_are_projections_of_means_over_the_tokens_of_the_answer(tmp_path: Path) -> None:
    rows = pairs(20)
    run(tmp_path / "run", jsonl(tmp_path / "rows.jsonl", rows), GENERATED)
    found = table(tmp_path / "run")
    assert found["id"] == [row["id"] for row in rows]
    assert found["row"] == list(range(20))
    for number in (0, 7, 19):
        prompt = made.chat().encode(None, rows[number]["prompt"])
        response = made.chat().encode_answer(rows[number]["response"])
        raw = projections([*prompt, *response], len(prompt), len(prompt) + len(response))
        before = projections(prompt, len(prompt) - 1, len(prompt))
        (own,) = made.backend().generate([prompt], Sampling(6)).responses
        base = projections([*prompt, *own], len(prompt), len(prompt) + len(own))
        for place, gauge in enumerate(map(str, panel().gauges)):
            for name, expected in (
                ("raw", raw), ("prompt", before), ("base", base), ("difference", raw - base),
                ("prompt_difference", raw - before),
            ):  # fmt: skip
                assert found[f"{gauge}.{name}"][number] == pytest.approx(expected[place], abs=2e-4)


TALK = [
    {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes, please."},
    {"role": "user", "content": "Milk?"}, {"role": "assistant", "content": "No."},
]  # fmt: skip


def test_all_turns_are_the_mean_over_all_their_tokens(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}])
    run(tmp_path / "all", path, replace(SMALL, turns=Turns.ALL))
    run(tmp_path / "last", path)
    ids = made.chat().encode_messages(TALK, add_generation_prompt=False)
    spans, befores = [], []
    for place in (1, 3):
        prompt = made.chat().encode_messages(TALK[:place])
        answer = made.chat().encode_answer(TALK[place]["content"])
        spans.append((len(prompt), len(prompt) + len(answer)))
        befores.append(projections(prompt, len(prompt) - 1, len(prompt)))
    means = [projections(ids, *span) for span in spans]
    sizes = [stop - start for start, stop in spans]
    for folder, expected, before in (
        ("all", np.average(means, axis=0, weights=sizes), np.mean(befores, axis=0)),
        ("last", means[1], befores[1]),
    ):
        found = table(tmp_path / folder)
        assert found["tokens"] == [sum(sizes) if folder == "all" else sizes[1]]
        for place, gauge in enumerate(map(str, panel().gauges)):
            assert found[f"{gauge}.raw"][0] == pytest.approx(expected[place], abs=2e-4)
            assert found[f"{gauge}.prompt"][0] == pytest.approx(before[place], abs=2e-4)


THOUGHT = "<think>Do they like tea?</think>\n\n"


@pytest.mark.parametrize("part", ["answer", "thinking"])
def test_answers_and_the_thinking_before_them_can_be_screened_apart(part: str, tmp_path: Path) -> None:
    """As text of other models has it, for a model that knows no such marks."""
    rows = [{"prompt": "Tea?", "response": f"{THOUGHT}Yes, please."}, {"prompt": "Milk?", "response": "No."}]
    rows.append({"prompt": "Sugar?", "response": "<think>Hm. Hm."})
    settings = replace(SMALL, part=Counted(part))
    done = run(tmp_path / "run", jsonl(tmp_path / "rows.jsonl", rows), settings)
    found = table(tmp_path / "run")
    prompt = made.chat().encode(None, "Tea?")
    ids = [*prompt, *made.chat().encode_answer(rows[0]["response"])]
    opened, closed = len(prompt) + len("<think>"), len(prompt) + len("<think>Do they like tea?")
    span = (opened, closed) if part == "thinking" else (closed + len("</think>"), len(ids))
    for place, gauge in enumerate(map(str, panel().gauges)):
        assert found[f"{gauge}.raw"][0] == pytest.approx(projections(ids, *span)[place], abs=2e-4)
    assert found["tokens"][0] == span[1] - span[0]
    (bad,) = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    what = "holds no thinking" if part == "thinking" else "holds no answer to it"
    assert what in bad["problem"]
    assert bad["line"] == (2 if part == "thinking" else 3)
    assert done.summary["settings"]["part"] == part
    assert "part" not in SMALL.to_json()


def test_base_responses_to_several_prompts_weigh_as_many_tokens_as_count(tmp_path: Path) -> None:
    backend = wrap_model(thinking_model(), FAMILIES["qwq"].tokenizer())
    vectors = PersonaVectors("kind", backend.info, {"response_mean": made.vectors("kind", 1).rows()})
    chat, own = ChatFormat.from_tokenizer(backend.tokenizer), Panel((Gauge(vectors, 1),))
    talk = [{"role": "user", "content": ASKED}, *TALK[1:]]
    settings = replace(GENERATED, max_new_tokens=NEW, turns=Turns.ALL, part=Counted.ANSWER)
    data = [open_dataset(jsonl(tmp_path / "rows.jsonl", [{"messages": talk}]))]
    screen(backend, data, own, settings, folder=tmp_path / "run")
    prompts = [chat.encode_messages(talk[:place]) for place in (1, 3)]
    found = backend.generate(prompts, Sampling(NEW), (), [Read(ReadKind.ANSWER_MEAN)])
    parts = [chat.parts.of_response(*each) for each in zip(prompts, found.responses, strict=True)]
    counts = [each.count(Part.ANSWER) for each in parts]
    assert 0 < counts[0] < len(found.responses[0])
    unit = own.gauges[0].direction / own.gauges[0].direction.norm()
    values = [float(means[1] @ unit) if n else 0.0 for means, n in zip(found.reads["answer_mean"], counts, strict=True)]
    wanted = np.average(values, weights=counts)
    assert table(tmp_path / "run")["kind@1.base"][0] == pytest.approx(wanted, abs=2e-4)
    units = map(json.loads, (tmp_path / "run" / SCORES).read_text().splitlines())
    saved = [entry["tokens"] for unit in units if unit["kind"] == "base" for entry in unit["rows"]]
    assert sorted(saved) == sorted(counts)


def test_base_responses_that_come_to_no_answer_are_said(tmp_path: Path) -> None:
    backend = wrap_model(thinking_model(), FAMILIES["qwq"].tokenizer())
    vectors = PersonaVectors("kind", backend.info, {"response_mean": made.vectors("kind", 1).rows()})
    talk = [{"role": "user", "content": ASKED}, TALK[1]]
    data = [open_dataset(jsonl(tmp_path / "rows.jsonl", [{"messages": talk}]))]
    said = {}
    for tokens in (1, NEW):
        settings = replace(GENERATED, max_new_tokens=tokens, part=Counted.ANSWER)
        done = screen(backend, data, Panel((Gauge(vectors, 1),)), settings, folder=tmp_path / f"run-{tokens}")
        said[tokens] = [line for line in told(done.summary) if "have no difference" in line]
    assert said[NEW] == []
    (line,) = said[1]
    assert "rows.jsonl: 1 of 1 rows have no difference: base responses hold no answer within --max-new-tokens" in line


def test_a_model_that_never_thinks_gives_no_base_responses_with_thinking(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pairs(2))
    settings = replace(GENERATED, part=Counted.THINKING)
    with pytest.raises(ScreeningError, match="base responses of this model hold no thinking"):
        run(tmp_path / "run", path, settings)
    with pytest.raises(ScreeningError, match="base responses of this model hold no thinking"):
        screening_work(made.backend(), [open_dataset(path)], panel(), settings)


def test_base_responses_of_a_model_without_thinking_are_all_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pairs(6))
    run(tmp_path / "all", path, GENERATED)
    run(tmp_path / "answer", path, replace(GENERATED, part=Counted.ANSWER))
    assert table(tmp_path / "all") == table(tmp_path / "answer")


def test_a_template_that_changes_earlier_turns_gives_each_answer_its_own_text(tmp_path: Path) -> None:
    from persona_lens.models import ChatFormat

    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}(cut){% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = ChatFormat.from_tokenizer(with_template(made.backend().tokenizer, forgetful))
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": TALK}])
    run(tmp_path / "run", path, replace(SMALL, turns=Turns.ALL), chat=chat)
    prompts = [chat.encode_messages(TALK[:place]) for place in (1, 3)]
    answers = [chat.encode_answer(TALK[place]["content"]) for place in (1, 3)]
    means = [projections([*p, *a], len(p), len(p) + len(a)) for p, a in zip(prompts, answers, strict=True)]
    expected = np.average(means, axis=0, weights=list(map(len, answers)))
    assert table(tmp_path / "run")["kind@1.raw"][0] == pytest.approx(expected[0], abs=2e-4)


def test_supplied_base_responses_give_the_difference_that_generated_ones_give(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*pairs(12), {"id": "bad", "prompt": "x"}])
    run(tmp_path / "made", path, GENERATED)
    base = tmp_path / "made" / "base" / "rows.jsonl"
    assert len(base.read_text().splitlines()) == 13
    supplied = [open_dataset(path, base=base)]
    run(tmp_path / "given", supplied, replace(SMALL, base=BaseResponses.SUPPLIED))
    one, other = table(tmp_path / "made"), table(tmp_path / "given")
    texts = [json.loads(line)["response"] for line in base.read_text().splitlines()]
    compared = 0
    for number, text in enumerate(texts[:12]):
        # A byte that is no character is replaced in the text, and so has other tokens.
        if text and "\ufffd" not in text and other["kind@1.base"][number] is not None:
            compared += 1
            assert other["kind@1.base"][number] == pytest.approx(one["kind@1.base"][number], abs=2e-3)
    assert compared or all("\ufffd" in text or not text for text in texts)


def test_several_base_responses_are_drawn_and_averaged(tmp_path: Path) -> None:
    rows = pairs(12)
    path = jsonl(tmp_path / "rows.jsonl", rows)
    settings = replace(GENERATED, base_samples=3, temperature=0.9, max_new_tokens=4)
    done = run(tmp_path / "made", path, settings)
    run(tmp_path / "other", path, replace(settings, look_ahead=5, batch_size=4))
    found, other = table(tmp_path / "made"), table(tmp_path / "other")
    for number, row in enumerate(rows):
        prompt = made.chat().encode(None, row["prompt"])
        seeds = tuple(row_seed(0, "base response", sample, *prompt) for sample in range(3))
        drawn = made.backend().generate([prompt] * 3, Sampling(4, 0.9, seeds=seeds)).responses
        bases = [projections([*prompt, *ids], len(prompt), len(prompt) + len(ids)) for ids in drawn if ids]
        for place, gauge in enumerate(map(str, panel().gauges)):
            expected = np.mean(bases, axis=0)[place]
            assert found[f"{gauge}.base"][number] == pytest.approx(expected, abs=2e-4)
            assert other[f"{gauge}.base"][number] == pytest.approx(expected, abs=2e-4)
    lines = [json.loads(line) for line in (tmp_path / "made" / "base" / "rows.jsonl").read_text().splitlines()]
    assert all(len(line["responses"]) == 3 for line in lines)
    assert any(len(set(line["responses"])) > 1 for line in lines)
    planned = screening_work(made.backend(), [open_dataset(path)], panel(), settings)
    assert planned[1].rows == 3 * len({row["prompt"] for row in rows})
    assert sum(work.tokens for work in planned) >= done.tokens


def test_supplied_base_responses_may_be_several_and_count_alike(tmp_path: Path) -> None:
    rows = pairs(3)
    said = [["good tea", "rain or sun or rain"], ["odd"], ["", "later"]]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    base = jsonl(tmp_path / "base.jsonl", [{"responses": each} for each in said])
    run(tmp_path / "run", [open_dataset(path, base=base)], replace(SMALL, base=BaseResponses.SUPPLIED))
    found = table(tmp_path / "run")
    for number, (row, texts) in enumerate(zip(rows, said, strict=True)):
        prompt = made.chat().encode(None, row["prompt"])
        answers = [made.chat().encode_answer(text) for text in texts if text]
        means = [projections([*prompt, *ids], len(prompt), len(prompt) + len(ids)) for ids in answers]
        assert found["kind@1.base"][number] == pytest.approx(np.mean(means, axis=0)[0], abs=2e-4)


def test_a_random_share_of_base_responses_estimates_the_mean(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pairs(60))
    whole = run(tmp_path / "whole", path, GENERATED).summary["datasets"][0]["means"]["kind@1"]["difference"]
    part = run(tmp_path / "part", path, replace(GENERATED, base_share=0.5)).summary["datasets"][0]
    found = part["means"]["kind@1"]["difference"]
    assert (whole["n"], part["means"]["kind@1"]["raw"]["n"]) == (60, 60)
    assert 18 <= found["n"] <= 42
    assert found["low"] < whole["mean"] < found["high"]
    assert found["high"] - found["low"] > whole["high"] - whole["low"]


def test_bad_rows_are_rejected_by_line_and_the_rest_is_done(tmp_path: Path) -> None:
    good = [json.dumps(row).encode() for row in pairs(9)]
    bad = {
        2: b"{oh",
        4: b'{"prompt": "x"}',
        5: b'{"prompt": "x", "response": ""}',
        8: b'{"prompt": "\xff", "response": "y"}',
        10: json.dumps({"prompt": "x", "response": "tea " * 50_000}).encode(),
        11: b'{"prompt": "x", "response": "\\ud800"}',
        12: b'{"prompt": [{"role": "tool", "content": "x"}], "response": "y"}',
    }
    rows = iter(good)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join((bad[line] if line in bad else next(rows)) + b"\n" for line in range(1, 17)))
    done = run(tmp_path / "run", path)
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [each["line"] for each in rejects] == list(bad)
    said = [
        "not JSON",
        "has no response",
        "the response is empty",
        "not UTF-8",
        "tokens, and 512 are the most",
        "half",
        "tools",
    ]
    for each, part in zip(rejects, said, strict=True):
        assert f"rows.jsonl:{each['line']}: " in each["problem"]
        assert part in each["problem"]
    assert table(tmp_path / "run")["id"] == [row["id"] for row in pairs(9)]
    (counts,) = done.summary["datasets"]
    assert (counts["rows"], counts["rejected"], counts["call_tools"]) == (16, 7, 1)


class PowerCutError(Exception):
    """The power is cut."""


def test_stopped_anywhere_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*pairs(30), {"oh": 1}, *pairs(9, 3)])
    clean = [open_dataset(jsonl(tmp_path / "clean.jsonl", pairs(11, 4)))]
    settings = replace(GENERATED, base_share=0.6)
    given: dict[str, Any] = {"reference": clean, "flagging": Flagging(Quantity.RAW, 0.2), "judges": None}
    run(tmp_path / "whole", path, settings, **given)
    expected = contents(tmp_path / "whole")
    write, chance = RunFolder.append, random.Random(2)

    def tearing(folder: RunFolder, name: str, rows: Any) -> None:
        if chance.random() < 0.2:
            line = json.dumps(next(iter(rows))).encode()
            with (folder.path / name).open("ab") as stream:
                stream.write(line[: chance.randrange(len(line))])
            raise PowerCutError
        write(folder, name, rows)

    monkeypatch.setattr(RunFolder, "append", tearing)
    stops = 0
    while True:
        try:
            run(tmp_path / "torn", path, settings, **given)
        except PowerCutError:
            stops += 1
        else:
            break
    assert stops >= 3
    assert contents(tmp_path / "torn") == expected


def test_a_finished_run_is_not_scored_again_and_another_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pairs(9))
    first = run(tmp_path / "run", path)
    again = run(tmp_path / "run", path)
    assert (first.scored, again.scored, again.tokens) == (9, 0, 0)
    assert again.summary == first.summary
    jsonl(path, pairs(9, 5))
    with pytest.raises(PersonaLensError, match="holds a run with another configuration"):
        run(tmp_path / "run", path)


def records(kind: str, folder: Path) -> Path:
    rows = pairs(40)
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        lines = ["id,prompt,response", *(f'{r["id"]},"{r["prompt"]}\n\nreally?",{r["response"]}' for r in rows)]
        path.write_text(
            "\ufeff" + "\r\n".join(lines[:3]) + "\r\n\n" + "\n".join(lines[3:]), encoding="utf-8", newline=""
        )
    else:
        path.write_text("\n" + "\n\n".join('  {"extra": 1.50, ' + json.dumps(row)[1:] for row in rows))
    return path


def ids_of(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        yield from pq.read_table(path).to_pydict()["id"]
    else:
        yield from (row.id for row in open_dataset(path, form="prompt-response"))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_dataset_is_split_in_its_own_format_and_order(kind: str, tmp_path: Path) -> None:
    path = records(kind, tmp_path)
    clean = [open_dataset(jsonl(tmp_path / "clean.jsonl", pairs(40, 1)))]
    run(tmp_path / "run", path, reference=clean, flagging=Flagging(false_positive_rate=0.2))
    found = table(tmp_path / "run")
    screened = [n for n, reference in enumerate(found["reference"]) if not reference]
    names = {part: tmp_path / "run" / "split" / f"rows-{part}.{kind}" for part in ("kept", "flagged", "undecided")}
    for part, file in names.items():
        expected = [found["id"][n] for n in screened if found["decision"][n] == part]
        assert expected, "every part has rows, or nothing is shown"
        assert list(ids_of(file)) == expected
    if kind == "jsonl":
        together = [line for file in names.values() for line in file.read_bytes().splitlines()]
        assert sorted(together) == sorted(line for line in path.read_bytes().splitlines() if line)
    if kind == "csv":
        parts = [file.read_bytes() for file in names.values()]
        assert {piece.splitlines()[0] for piece in parts} == {b"\xef\xbb\xbfid,prompt,response"}
        whole = path.read_bytes()
        for piece in parts:  # each record stands there as it was, line ends too
            for record in piece.partition(b"\n")[2].split(b"row-0-")[1:]:
                assert b"row-0-" + record.rstrip(b"\r\n") in whole
    if kind == "parquet":
        assert pq.read_schema(names["kept"]) == pq.read_schema(path)


@pytest.mark.parametrize("saved", [True, False])
def test_datasets_of_the_library_are_split_too(saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if saved:
        datasets.Dataset.from_list(pairs(20)).save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        jsonl(tmp_path / "data" / "train.jsonl", pairs(20))
    clean = [open_dataset(jsonl(tmp_path / "clean.jsonl", pairs(40, 1)))]
    run(
        tmp_path / "run",
        tmp_path / "data",
        reference=clean,
        flagging=Flagging(false_positive_rate=0.2, undecided=Band.NONE),
    )
    found = table(tmp_path / "run")
    for part in ("kept", "flagged"):
        place = tmp_path / "run" / "split" / f"data-train-{part}"
        own = datasets.load_from_disk(str(place))["id"] if saved else ids_of(place.with_suffix(".parquet"))
        assert list(own) == [
            i for i, d, r in zip(found["id"], found["decision"], found["reference"], strict=True) if d == part and not r
        ]


def test_extremes_labels_groups_and_opinions(tmp_path: Path) -> None:
    labels = ["normal", "strong"]
    path = jsonl(tmp_path / "rows.jsonl", pairs(30, level=labels, topic=["a", "b", "c"]))
    clean = [open_dataset(jsonl(tmp_path / "clean.jsonl", pairs(30, 1)))]
    done = run(
        tmp_path / "run",
        [open_dataset(path, label="level", by="topic")],
        reference=clean,
        flagging=Flagging(false_positive_rate=0.2, undecided=Band.NONE, top_k=3, random_directions=4),
        judges={"kind": made.LengthJudge()},
    )
    summary, found = done.summary, table(tmp_path / "run")
    mine = [n for n, reference in enumerate(found["reference"]) if not reference]
    values = {found["id"][n]: found["kind@1.raw"][n] for n in mine}
    ranked = sorted(values, key=lambda each: -values[each])
    assert [each["id"] for each in summary["extremes"]["kind@1"]["top"]] == ranked[:3]
    assert [each["id"] for each in summary["extremes"]["kind@1"]["bottom"]] == ranked[:-4:-1]
    assert summary["extremes"]["kind@1"]["top"][0]["response"] == next(
        row["response"] for row in pairs(30) if row["id"] == ranked[0]
    )
    groups = summary["datasets"][0]["groups"]
    assert {name: each["rows"] for name, each in groups.items()} == {"a": 10, "b": 10, "c": 10}
    assert np.mean([each["means"]["kind@1"]["raw"]["mean"] for each in groups.values()]) == pytest.approx(
        summary["datasets"][0]["means"]["kind@1"]["raw"]["mean"]
    )
    entry = summary["labels"]["labels"]["strong"]["raw"]["kind@1"]
    up, down = (
        [v for v, r in zip(values.values(), pairs(30, level=labels), strict=True) if r["level"] == x]
        for x in labels[::-1]
    )
    assert entry["auc"] == pytest.approx(np.mean([[(a > b) + (a == b) / 2 for b in down] for a in up]))
    assert len(entry["random"]) == 4
    flagged = [n for n in mine if found["kind@1.raw"][n] > summary["thresholds"][0]["value"]]
    assert summary["datasets"][0]["flagged"]["kind@1"] == len(flagged) == summary["opinions"]["kind"]["judged"]
    assert {n for n in range(len(found["id"])) if found["judge.kind"][n] is not None} == set(flagged)
    assert sum(sum(counts) for counts in summary["histograms"]["kind@1"]["counts"]) == 60


def test_a_forecast_that_the_vectors_carry_is_made(tmp_path: Path) -> None:
    forecast = fit_forecast("kind", 1, [-1, 0, 1, 2], [-9, 0, 11, 20], quantity=Quantity.RAW, source="four models")
    own = Panel((Gauge(with_forecasts(made.vectors("kind", 1), [forecast]), 1), Gauge(made.vectors("odd", 2), 0)))
    data = [open_dataset(jsonl(tmp_path / "rows.jsonl", pairs(9)))]
    summary = screen(made.backend(), data, own, SMALL, folder=tmp_path / "run").summary["datasets"][0]
    assert list(summary["forecasts"]) == ["kind@1"]
    expected = forecast.predict(summary["means"]["kind@1"]["raw"]["mean"])
    assert summary["forecasts"]["kind@1"]["shift"] == pytest.approx(expected.shift)


def test_a_dry_run_counts_and_runs_nothing(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [*pairs(20), {"x": 1}])
    reading, base = screening_work(made.backend(), [open_dataset(path)], panel(), GENERATED)
    done = run(tmp_path / "run", path, GENERATED)
    assert (reading.rows, base.rows) == (20, len({row["prompt"] for row in pairs(20)}))
    assert base.tokens >= done.tokens - reading.tokens > 0


def test_rows_do_not_depend_on_who_is_screened_beside_them(tmp_path: Path) -> None:
    """Several datasets and several traits in one run give what each gives by itself."""
    paths = [jsonl(tmp_path / f"{n}.jsonl", pairs(12, n)) for n in range(2)]
    run(tmp_path / "both", [open_dataset(path) for path in paths])
    both = table(tmp_path / "both")
    alone = screen(
        made.backend(), [open_dataset(paths[1])], Panel(panel().gauges[1:2]), SMALL, folder=tmp_path / "alone"
    )
    assert alone.scored == 12
    np.testing.assert_allclose(both["odd@0.raw"][12:], table(tmp_path / "alone")["odd@0.raw"], atol=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"settings": {"base_share": 0.5}}, "asks for base responses"),
        ({"settings": {"base_samples": 2, "temperature": 1.0}}, "for base responses that are generated"),
        ({"settings": {"base": BaseResponses.GENERATE, "base_samples": 2}}, "set a temperature for several"),
        ({"settings": {"base": BaseResponses.GENERATE, "base_samples": 0}}, "base_samples must be at least 1, got 0"),
        ({"settings": {"base": BaseResponses.GENERATE, "temperature": -1.0}}, r"0 \(greedy\) or more, got -1"),
        ({"settings": {"base_share": 0.0}}, "above 0 and at most 1"),
        ({"settings": {"base": BaseResponses.SUPPLIED, "turns": Turns.ALL}}, "take turns 'last' with them"),
        ({"settings": {"look_ahead": 0}}, "look_ahead must be at least 1"),
        ({"settings": {"base": BaseResponses.SUPPLIED}}, "has no base responses, though they are to be supplied"),
        ({"flagging": {"score": Quantity.DIFFERENCE}}, "not every row gets one"),
        ({"flagging": {"false_positive_rate": 2.0}}, "above 0 and below 1"),
        ({"flagging": {"top_k": -1}}, "top_k must be 0 or more"),
        ({"judges": {"kind": made.LengthJudge()}}, "nothing is flagged without a reference set"),
    ],
)
def test_what_cannot_be_screened(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pairs(3))
    with pytest.raises(ScreeningError, match=said):
        run(
            tmp_path / "run",
            path,
            replace(SMALL, **given.get("settings", {})),
            flagging=Flagging(**given.get("flagging", {})),
            judges=given.get("judges"),
        )
    assert not (tmp_path / "run").exists()


def test_a_column_of_texts_is_no_column_of_labels(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", pairs(21, level=[f"label {n}" for n in range(21)]))
    with pytest.raises(ScreeningError, match=r"more than 20 different values, such as 'label 20'"):
        run(tmp_path / "run", [open_dataset(path, label="level")], flagging=Flagging(random_directions=0))


def test_without_pyarrow_results_are_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_lens.screening import rows as module

    monkeypatch.setattr(module, "has_pyarrow", lambda: False)
    run(tmp_path / "run", jsonl(tmp_path / "rows.jsonl", pairs(3)))
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [row["id"] for row in pairs(3)]


def test_no_logits_are_computed_and_no_layer_beyond_the_deepest(tmp_path: Path) -> None:
    model: Any = made.backend().module  # type: ignore[attr-defined]
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("head", model.lm_head), ("last", model.model.layers[2]), ("read", model.model.layers[1]))
    ]
    try:
        run(tmp_path / "run", jsonl(tmp_path / "rows.jsonl", pairs(5)))
    finally:
        for handle in handles:
            handle.remove()
    assert set(ran) <= {"read"}
    assert torch.is_grad_enabled()
