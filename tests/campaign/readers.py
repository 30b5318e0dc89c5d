"""Every reader and parser of the project, with valid examples of what it reads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from persona_lens.analysis.dissection.examples import read_corpus
from persona_lens.analysis.dissection.features import FileDecoder
from persona_lens.cli.settings import layer_numbers, numbers
from persona_lens.core.documents import save_tensors
from persona_lens.core.errors import PersonaLensError
from persona_lens.data.datasets import open_dataset
from persona_lens.data.tables import all_rows
from persona_lens.data.transcripts import open_transcripts
from persona_lens.extraction.external import match_responses
from persona_lens.extraction.responses import read_responses
from persona_lens.finetuning.config import documented, make_config, read_config
from persona_lens.judging.agreement import read_scored
from persona_lens.models.source import folder_content
from persona_lens.monitoring import monitor_calibration
from persona_lens.steering import Steering, load_steering
from persona_lens.traits import load_default, load_trait
from persona_lens.traits.generate import Draft, RoleDraft, import_reference
from persona_lens.traits.parsing import parse, parse_trait
from persona_lens.traits.role import ROLES
from persona_lens.vectors import METADATA, PersonaVectors, load_vectors
from persona_lens.vectors.formats import FORMATS, Stated, import_vectors
from persona_lens.vectors.hub import model_card
from tests.campaign.attacked import Target, from_bytes, from_json, from_rows, in_file
from tests.campaign.folders import of_runs
from tests.campaign.mutations import damaged, distorted, joined
from tests.vectors.formats.files import INFO, exported, vectors


def targets(folder: Path) -> list[Target]:
    """Every reader.

    Args:
        folder: An empty one, for the files that are read.
    """
    return [*_texts(), *_of_traits(folder), *_of_vectors(folder), *_tables(folder), *of_runs(folder)]


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
        for read in (lambda: layer_numbers(text, 40), lambda: numbers(text, "--strengths")):
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
    roles = Path(__file__).parents[2] / "roles"
    pirate, assistant = (roles / name for name in ("pirate.yaml", "shared/assistant.yaml"))
    default = folder / "default.yaml"
    role = {"name": "host", "description": "Keeps an inn.", "origin": {"model": "m"}, "system_prompts": ["You are it."]}
    steering = (
        b"format_version: 1\nedits:\n  - grumpy@1:+1.5\n  - grumpy@2-3:ablate on response\nvectors:\n  grumpy: v\n"
    )
    config = documented().encode()
    small = b"method: plain\nlearning_rate: 1.0e-5\nseed: 3\nlora:\n  rank: 8\nwatch:\n  every: 10\n  layers: [1, 2]\n"
    vectors().save(folder / "yaml" / "v")
    return [
        Target("trait YAML", from_bytes([source.read_bytes(), yaml_file]), _parsed, 0.6),
        Target("trait JSON", from_json(short), _parsed, 0.4),
        Target("role YAML", from_bytes([pirate.read_bytes()]), _role, 2),
        Target("default Assistant", from_bytes([assistant.read_bytes()]), in_file(default, load_default), 1),
        Target("drafts of roles", from_json(role), in_file(folder / "role.json", RoleDraft.load), 1),
        Target(
            "traits of the reference",
            from_json(reference),
            in_file(folder / "ref" / "grumpy.json", import_reference),
            2,
        ),
        Target("drafts", from_json(draft), in_file(folder / "draft.json", Draft.load), 3),
        Target("steering YAML", from_bytes([steering]), in_file(folder / "yaml" / "s.yaml", load_steering), 5),
        Target("finetune YAML", from_bytes([small, small, small, config]), in_file(folder / "c.yaml", _configured), 4),
        Target(
            "finetune YAML, values",
            from_json(
                {"method": "plain", "learning_rate": 1e-5, "seed": 1, "lora": {"rank": 8}, "watch": {"every": 2}}
            ),
            in_file(folder / "d.yaml", _configured),
            3,
        ),
    ]


def _parsed(content: bytes) -> None:
    parse_trait(content.decode("utf-8", "surrogateescape"))


def _role(content: bytes) -> None:
    parse(ROLES, content.decode("utf-8", "surrogateescape"), "<text>")


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
        lambda: found.trait_definition,
        lambda: found.calibration,
        lambda: found.rollouts,
        lambda: found.forecasts,
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
    steerings = [steering.save(folder / "examples" / "s.safetensors").read_bytes()]
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
        Target("vectors", from_bytes(whole), in_file(folder / "v.safetensors", use), 6),
        Target("headers of vectors", headed, in_file(folder / "h.safetensors", use), 8),
        Target("steering files", from_bytes(steerings), in_file(folder / "s.safetensors", load_steering), 3),
        Target("headers of steerings", steered, in_file(folder / "t.safetensors", load_steering), 4),
        Target("decoders", from_bytes([weights]), in_file(folder / "w.safetensors", _decoded), 3),
        Target(
            "weights of models", from_bytes([weights]), in_file(folder / "m" / "model.safetensors", _fingerprinted), 2
        ),
    ]
    for name, form in FORMATS.items():
        examples = [exported(name, folder / "examples" / name, vectors(tuned=_PROVENANCE["tuned"])).read_bytes()]
        suffix = form.suffix or "_response_avg_diff.pt"
        place = folder / f"import-{name}" / f"grumpy{suffix}"
        found.append(Target(f"import of {name}", from_bytes(examples), in_file(place, _imported), 3))
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
        list(all_rows(path))

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
        Target("JSONL", from_rows(every), in_file(folder / "a.jsonl", rows), 3),
        Target("CSV", from_bytes(csvs), in_file(folder / "a.csv", rows), 3),
        Target("Parquet", from_bytes(wrong), in_file(folder / "a.parquet", rows), 4),
        Target("transcripts", from_rows(_ROWS), in_file(folder / "t.jsonl", transcripts), 5),
        Target("transcripts as text", from_bytes([plain]), in_file(folder / "t.txt", transcripts), 3),
        Target("transcripts as CSV", from_bytes([_cells(_ROWS[:2])]), in_file(folder / "t.csv", transcripts), 2),
        Target("responses", from_rows(_RESPONSES), in_file(folder / "r.jsonl", responses), 4),
        Target("responses as CSV", from_bytes(csvs), in_file(folder / "r.csv", responses), 2),
        Target("datasets", from_rows(_ROWS), in_file(folder / "d.jsonl", dataset), 5),
        Target("datasets as CSV", from_bytes([_cells(_ROWS)]), in_file(folder / "d.csv", dataset), 2),
        Target("scores", from_rows(_SCORED), in_file(folder / "s.jsonl", read_scored), 4),
        Target("ratings", from_bytes([_cells(_SCORED[2:]), *csvs]), in_file(folder / "s.csv", read_scored), 4),
        Target("corpora", from_rows([{"text": "a"}, {"text": "b"}]), in_file(folder / "c.jsonl", read_corpus), 1),
    ]
