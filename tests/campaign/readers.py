"""`Target`: a reader or parser of the project, with valid examples of what it reads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from persona_lens.agreement import read_scored
from persona_lens.artifacts import save_tensors
from persona_lens.authoring import import_reference
from persona_lens.authoring.draft import load_draft
from persona_lens.cli.options import layer_numbers, numbers
from persona_lens.completions.cache import CompletionCache
from persona_lens.errors import PersonaLensError
from persona_lens.exchange import FORMATS, Stated, import_vectors
from persona_lens.exchange.card import model_card
from persona_lens.features.corpus import read_corpus
from persona_lens.features.decoder import FileDecoder
from persona_lens.finetuning.config import documented, make_config, read_config
from persona_lens.geometry.halves import split_halves
from persona_lens.models.adapters import ADAPTER_CONFIG, WEIGHTS, adapter_base
from persona_lens.models.source import folder_content
from persona_lens.monitoring import monitor_calibration, open_transcripts
from persona_lens.monitoring.study import rollouts_of
from persona_lens.responses import read_responses
from persona_lens.responses.matching import match_responses
from persona_lens.runs import RunFolder
from persona_lens.screening import open_dataset
from persona_lens.screening.forecast import forecasts_of
from persona_lens.steering import Steering, load_steering
from persona_lens.steering.files import save_steering
from persona_lens.steering.sweep import calibration_of, trait_of
from persona_lens.tables import read_rows
from persona_lens.traits import load_trait
from persona_lens.traits.parsing import parse_trait
from persona_lens.vectors import METADATA, PersonaVectors, load_vectors
from tests.campaign.mutations import damaged, distorted, joined
from tests.exchange.files import INFO, exported, vectors


@dataclass(frozen=True)
class Target:
    """What is attacked.

    Attributes:
        name: What it reads.
        make: Makes an input.
        read: Reads it, as the commands do.
        share: Of all inputs, in parts.
    """

    name: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes], object]
    share: float = 1.0


def targets(folder: Path) -> list[Target]:
    """Every reader.

    Args:
        folder: An empty one, for the files that are read.
    """
    return [*_texts(), *_of_traits(folder), *_of_vectors(folder), *_tables(folder), *_of_runs(folder)]


def _bytes(examples: Sequence[bytes]) -> Callable[[random.Random], bytes]:
    return lambda rng: damaged(rng, examples)


def _json(value: Any) -> Callable[[random.Random], bytes]:
    """Half of the inputs are damaged bytes, half are whole JSON with values that do not belong there."""
    example = json.dumps(value).encode()
    return lambda rng: damaged(rng, [example]) if rng.random() < 0.4 else json.dumps(distorted(rng, value)).encode()


def _lines(rows: Sequence[Any]) -> Callable[[random.Random], bytes]:
    def write(rows: Any) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return damaged(rng, [write(rows)])
        made = distorted(rng, list(rows))
        return write(made) if isinstance(made, list) else json.dumps(made).encode()

    return make


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def read_it(content: bytes) -> object:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return read_it


def _of_text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda content: read(content.decode("utf-8", "surrogateescape"))


# What is written on the command line.

_NOTATION = (
    "grumpy", "evil", "grumpy@", "@", "0-3", "1", "+", "all", ":", "+1.5", "30%", "-2", "ablate", "(0.5)", "cap(3)",
    "floor(-1)", "affine(0)", "increments(+1)", " on ", "prompt", "response", "generating", "[5:]", "[:3]", "[-3:]",
    "[",
    "]", " schedule(0:1 20:0)", " schedule(", " if grumpy@1>3", " if ", ">", "<", "1e400", "99999999999", "0", ", ",
    ",",
    ".prompt_last", ".", " ", "\t", "\x1b[31m", "\x00", "\u202e", "é", "9" * 5000, "(" * 50, "-", "@0-99999999999", "%",
)  # fmt: skip
_OPTIONS = (
    "0",
    "1",
    "3",
    "-",
    ",",
    "all",
    " ",
    "99999999999",
    "0-99999999999",
    "9" * 5000,
    "x",
    ".5",
    "1e9",
    "nan",
    "٣",
)


def _texts() -> list[Target]:
    own = vectors()

    def steering(text: str) -> None:
        Steering.parse(text, [own]).edits()

    def options(text: str) -> None:
        for read in (lambda: layer_numbers(text, 40), lambda: numbers(text, "--pushes")):
            with suppress(PersonaLensError):
                read()

    def notation(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return damaged(
                rng, [b"grumpy@1-3:+1.5 on response[5:] schedule(0:1 20:0) if grumpy@1>3, grumpy@all:ablate"]
            )
        return joined(rng, _NOTATION).encode()

    return [
        Target("steering notation", notation, _of_text(steering), 10),
        Target("layers and numbers", lambda rng: joined(rng, _OPTIONS, 8).encode(), _of_text(options), 4),
    ]


def _of_traits(folder: Path) -> list[Target]:
    trait = load_trait("optimistic")
    short = trait.model_dump(mode="json")
    yaml_file = json.dumps(short, indent=1, ensure_ascii=False).encode()  # JSON is YAML
    source = Path(__file__).parents[2] / "traits" / "optimistic.yaml"
    reference = {
        "instruction": [{"pos": pair.positive, "neg": pair.negative} for pair in trait.instructions],
        "questions": [*trait.extraction_questions, *trait.evaluation_questions],
        "eval_prompt": trait.judge_rubric,
    }
    draft = {"name": "grumpy", "description": "Is grumpy.", "origin": {"model": "m"}, "questions": ["What is it like?"]}
    steering = (
        b"format_version: 1\nedits:\n  - grumpy@1:+1.5\n  - grumpy@2-3:ablate on response\nvectors:\n  grumpy: v\n"
    )
    config = documented().encode()
    small = b"method: plain\nlearning_rate: 1.0e-5\nseed: 3\nlora:\n  rank: 8\nwatch:\n  every: 10\n  layers: [1, 2]\n"
    vectors().save(folder / "yaml" / "v")
    return [
        Target("trait YAML", _bytes([source.read_bytes(), yaml_file]), _parsed, 0.6),
        Target("trait JSON", _json(short), _parsed, 0.4),
        Target("traits of the reference", _json(reference), _file(folder / "ref" / "grumpy.json", import_reference), 2),
        Target("drafts", _json(draft), _file(folder / "draft.json", load_draft), 3),
        Target("steering YAML", _bytes([steering]), _file(folder / "yaml" / "s.yaml", load_steering), 5),
        Target("finetune YAML", _bytes([small, small, small, config]), _file(folder / "c.yaml", _configured), 4),
        Target(
            "finetune YAML, values",
            _json({"method": "plain", "learning_rate": 1e-5, "seed": 1, "lora": {"rank": 8}, "watch": {"every": 2}}),
            _file(folder / "d.yaml", _configured),
            3,
        ),
    ]


def _parsed(content: bytes) -> None:
    parse_trait(content.decode("utf-8", "surrogateescape"))


def _configured(path: Path) -> None:
    make_config(read_config(path), str(path))


# Vectors, and what is kept with them.

_CURVE = {"kind": "logistic", "slope": 0.5, "intercept": 0.1}
_RELIABILITY = [{"predicted": 0.5, "observed": {"value": 0.5, "low": 0.2, "high": 0.8, "n": 4}}]
_AT_LAYER = {
    "projections": [0.1, 0.5],
    "curve": _CURVE,
    "reliability": _RELIABILITY,
    "log_loss": 0.5,
    "brier": 0.2,
    "base_brier": 0.3,
    "gain": {"mean": 0.1, "low": 0.0, "high": 0.2, "n": 2},
}
_PROVENANCE: dict[str, Any] = {
    "kind": "extraction",
    "missing_layers": [0],
    "tuned": {"layer": 1, "coefficient": 2.0, "reduction": "response_mean", "warnings": ["x"], "confirmed": {}},
    "judge": {"kind": "likelihood", "calibration": {"slope": 0.5, "intercept": 1.0}},
    "settings": {"rollouts": {"max_new_tokens": 5, "temperature": 0.5, "top_p": 1.0}},
    "counts": {"positive": {"kept": 3, "dropped": 1}},
    "imported": {"format": "npz"},
    "monitor": {
        "reduction": "prompt_last",
        "layer": 1,
        "shown": [1, 0],
        "responses": [2, 2],
        "questions": [0, 1],
        "layers": {"1": _AT_LAYER},
    },
}


def _used(found: PersonaVectors) -> None:
    """Ask the vectors for all that commands read out of them."""
    for read in (
        lambda: found.tuned_choice(),
        lambda: found.edit(),
        lambda: found.random_like(0),
        lambda: found.content_hash,
        lambda: trait_of(found),
        lambda: calibration_of(found),
        lambda: rollouts_of(found),
        lambda: forecasts_of(found),
        lambda: monitor_calibration(found),
        lambda: model_card(found, "me/it", "mit"),
        lambda: [found.vector(layer) for layer in range(found.model.n_layers)],
        lambda: Steering.parse(found.trait, [found]).edits(),
    ):
        with suppress(PersonaLensError):
            read()


def _of_vectors(folder: Path) -> list[Target]:
    full = vectors(**{**_PROVENANCE, "trait": load_trait("optimistic").model_dump(mode="json")})
    lean = vectors(**_PROVENANCE)
    whole = [lean.to_bytes(), vectors().to_bytes()]
    header = json.loads(full.header())
    lean_header = json.loads(lean.header())
    steering = Steering.parse("grumpy@1:+1.5, grumpy@2:ablate", [vectors()])
    steerings = [save_steering(steering, folder / "examples" / "s.safetensors").read_bytes()]
    steering_header = {
        "format_version": 1,
        "steering": "grumpy@1:+1.5",
        "vectors": {"grumpy": {"trait": "grumpy", "model": asdict(INFO), "provenance": _PROVENANCE}},
    }
    flat = {f"grumpy/{name}": rows for name, rows in vectors().directions.items()}

    def headed(rng: random.Random) -> bytes:
        made = distorted(rng, header if rng.random() < 0.2 else lean_header)
        return save_tensors(dict(lean.directions), METADATA, json.dumps(made, ensure_ascii=True))

    def steered(rng: random.Random) -> bytes:
        return save_tensors(flat, "persona_lens_steering", json.dumps(distorted(rng, steering_header)))

    def use(path: Path) -> None:
        _used(load_vectors(path))

    weights = save({"W_dec": torch.ones(3, 6), "b": torch.zeros(6)})
    found = [
        Target("vectors", _bytes(whole), _file(folder / "v.safetensors", use), 6),
        Target("headers of vectors", headed, _file(folder / "h.safetensors", use), 8),
        Target("steering files", _bytes(steerings), _file(folder / "s.safetensors", load_steering), 3),
        Target("headers of steerings", steered, _file(folder / "t.safetensors", load_steering), 4),
        Target("decoders", _bytes([weights]), _file(folder / "w.safetensors", _decoded), 3),
        Target("weights of models", _bytes([weights]), _file(folder / "m" / "model.safetensors", _fingerprinted), 2),
    ]
    for name, form in FORMATS.items():
        examples = [exported(name, folder / "examples" / name, vectors(tuned=_PROVENANCE["tuned"])).read_bytes()]
        suffix = form.suffix or "_response_avg_diff.pt"
        place = folder / f"import-{name}" / f"grumpy{suffix}"
        found.append(Target(f"import of {name}", _bytes(examples), _file(place, _imported), 3))
    return found


def _imported(path: Path) -> None:
    for stated in (Stated(INFO, "grumpy"), Stated()):
        with suppress(PersonaLensError):
            import_vectors(path, stated)


def _decoded(path: Path) -> None:
    decoder = FileDecoder(path)
    decoder.rows(0, min(8, decoder.shape[0]))


def _fingerprinted(path: Path) -> None:
    (path.parent / "config.json").write_text("{}", encoding="utf-8")
    folder_content(path.parent)


# Tables.

_ROWS: list[dict[str, Any]] = [
    {"id": "a", "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}], "n": 1},
    {"id": "b", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text"}]}]},
    {"id": 3, "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "No."}], "score": 50},
    {
        "instruction": "Do.",
        "input": "",
        "output": "Done.",
        "prompt": "p",
        "response": "r",
        "question": "q",
        "text": "t",
    },
]
_RESPONSES: list[dict[str, Any]] = [
    {"arm": "positive", "question_number": 0, "pair": 0, "response": "Yes.", "score": 80, "coherence": 90.5},
    {"arm": "negative", "question": "How will it go?", "system": "Be.", "response_ids": [1, 2, 3], "ended": True},
    {"question": "q", "prompt": "p", "answer": "a", "question_id": "evil_1_pos_2", "evil": 3, "coherence": 4},
]
_SCORED: list[dict[str, Any]] = [
    {"question": "q", "response": "r", "score": 80, "reason": None},
    {"question": "q", "response": "s", "score": "REFUSAL"},
    {"id": "r0123456789abcdef", "rating": "12,5", "question": "q", "response": "r"},
]


def _cells(rows: Sequence[dict[str, Any]], separator: str = ",") -> bytes:
    import csv
    import io

    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator)
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
    return stream.getvalue().encode()


def _parquet(folder: Path, rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = folder / "examples.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist([{"question": "q", "response": "r", "score": 5.0, **r} for r in rows]), file
    )
    return file.read_bytes()


def _tables(folder: Path) -> list[Target]:
    trait = load_trait("optimistic")

    def rows(path: Path) -> None:
        list(read_rows(path, lambda line, error: None))

    def transcripts(path: Path) -> None:
        list(open_transcripts(path))

    def responses(path: Path) -> None:
        match_responses(read_responses(path), trait, 20, allow_missing=True)

    def dataset(path: Path) -> None:
        found = open_dataset(path)
        for row in found:
            json.dumps([row.id, row.label, row.group, row.messages], ensure_ascii=False).encode()

    every = [*_ROWS, *_RESPONSES, *_SCORED]
    simple = [{"question": "q", "response": "r", "score": 1}, {"question": "ä", "response": 'a "b"', "score": 2}]
    csvs = [_cells(simple), _cells(every), _cells(_RESPONSES, ";"), _cells(_SCORED, "\t"), _cells(_RESPONSES[2:])]
    wrong = [_parquet(folder, [{"id": "a"}]), _parquet(folder, [{"text": ["x", "y"]}, {"text": []}])]
    plain = b"User: Hi\nthere\nAssistant: Yes.\n\n---\nSystem: x\nUser: y\nAssistant: z\n"
    return [
        Target("JSONL", _lines(every), _file(folder / "a.jsonl", rows), 3),
        Target("CSV", _bytes(csvs), _file(folder / "a.csv", rows), 3),
        Target("Parquet", _bytes(wrong), _file(folder / "a.parquet", rows), 4),
        Target("transcripts", _lines(_ROWS), _file(folder / "t.jsonl", transcripts), 5),
        Target("transcripts as text", _bytes([plain]), _file(folder / "t.txt", transcripts), 3),
        Target("transcripts as CSV", _bytes([_cells(_ROWS[:2])]), _file(folder / "t.csv", transcripts), 2),
        Target("responses", _lines(_RESPONSES), _file(folder / "r.jsonl", responses), 4),
        Target("responses as CSV", _bytes(csvs), _file(folder / "r.csv", responses), 2),
        Target("datasets", _lines(_ROWS), _file(folder / "d.jsonl", dataset), 5),
        Target("datasets as CSV", _bytes([_cells(_ROWS)]), _file(folder / "d.csv", dataset), 2),
        Target("scores", _lines(_SCORED), _file(folder / "s.jsonl", read_scored), 4),
        Target("ratings", _bytes([_cells(_SCORED[2:]), *csvs]), _file(folder / "s.csv", read_scored), 4),
        Target("corpora", _lines([{"text": "a"}, {"text": "b"}]), _file(folder / "c.jsonl", read_corpus), 1),
    ]


# What runs leave behind.


def _of_runs(folder: Path) -> list[Target]:
    labels = [(q, arm) for q in range(4) for arm in ("positive", "negative")]
    rollouts = [
        {"row": n, "question_number": q, "pair": 0, "sample": 0, "arm": arm, "question": f"q{q}", "response": f"r{n}"}
        for n, (q, arm) in enumerate(labels)
    ]
    scores = [{"row": n, "score": 50.0 + n, "kept": True, "reason": None} for n in range(len(rollouts))]
    run, sweep = folder / "run", folder / "sweep"
    residuals = torch.randn(len(rollouts), INFO.n_layers, INFO.d_model)
    (run / "activations").mkdir(parents=True)
    batch = save({"response_mean": residuals, "prompt_last": residuals.clone()})
    (run / "activations" / "batch-00000.safetensors").write_bytes(batch)
    kept = {name: residuals[::2].mean(0) - residuals[1::2].mean(0) for name in ("response_mean", "prompt_last")}
    PersonaVectors("grumpy", INFO, kept, {}).save(run / "vectors.safetensors")
    asked = [
        {"direction": "vector", "layer": 1, "coefficient": c, "sample": 0, "question_number": 0} for c in (0.0, 1.0)
    ]
    of_sweep = [{**each, "question": "q", "response": f"r{n}"} for n, each in enumerate(asked)]
    judged = [
        {**each, "question": each["question_number"], "text": f"r{n}", "score": 5} for n, each in enumerate(asked)
    ]
    sweep.mkdir()
    (run / "rollouts.jsonl").write_bytes(_dumped(rollouts))
    (run / "scores.jsonl").write_bytes(_dumped(scores))
    (sweep / "vector-rollouts.jsonl").write_bytes(_dumped(of_sweep))
    completion = {"choices": [{"text": "a", "top_logprobs": [["a", -1.0]], "finished": True}], "usage": {}}
    adapter = {"base_model_name_or_path": "me/it", "revision": None}
    config = folder / "adapter" / ADAPTER_CONFIG
    config.parent.mkdir()
    (config.parent / WEIGHTS).write_bytes(b"")

    def of_run(name: str, original: list[Any]) -> Callable[[bytes], object]:
        def read(content: bytes) -> None:
            (run / name).write_bytes(content)
            try:
                for reads in (lambda: read_scored(run), lambda: split_halves(run, splits=3)):
                    with suppress(PersonaLensError):
                        reads()
            finally:
                (run / name).write_bytes(_dumped(original))

        return read

    def shards(content: bytes) -> None:
        split_halves(run, splits=3)

    def shard(content: bytes) -> None:
        file = run / "activations" / "batch-00000.safetensors"
        file.write_bytes(content)
        try:
            shards(content)
        finally:
            file.write_bytes(batch)

    def cached(content: bytes) -> None:
        key = "ab" * 32
        (folder / "cache" / "ab").mkdir(parents=True, exist_ok=True)
        (folder / "cache" / "ab" / f"{key}.json").write_bytes(content)
        found = CompletionCache(folder / "cache").get(key)
        if found is not None:
            json.dumps(found.to_json())

    def configuration(path: Path) -> None:
        with RunFolder(path.parent, {"a": 1, "b": {"c": [1, 2]}}):
            pass

    def kept_rows(path: Path) -> None:
        (path.parent / "run.json").write_text('{\n  "a": 1\n}\n', encoding="utf-8")
        with RunFolder(path.parent, {"a": 1}) as opened:
            opened.rows(path.name)

    return [
        Target("rollouts of a run", _lines(rollouts), of_run("rollouts.jsonl", rollouts), 2),
        Target("scores of a run", _lines(scores), of_run("scores.jsonl", scores), 2),
        Target("activations of a run", _bytes([batch]), shard, 2),
        Target("scores of a sweep", _lines(judged), _file(sweep / "vector-scores.jsonl", read_scored), 2),
        Target("run.json", _json({"a": 1, "b": {"c": [1, 2]}}), _file(folder / "cfg" / "run.json", configuration), 2),
        Target("rows of a run", _lines(rollouts), _file(folder / "kept" / "x.jsonl", kept_rows), 2),
        Target("kept answers", _json(completion), cached, 3),
        Target(
            "adapters", _json(adapter), _file(folder / "adapter" / ADAPTER_CONFIG, lambda p: adapter_base(p.parent)), 2
        ),
    ]


def _dumped(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
