"""Next-token log-probabilities under a vector: ours, llama.cpp's, and how far their shifts agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from persona_lens import load_trait, wrap_model
from persona_lens.backend import Backend, Edit
from persona_lens.models.chat import chat_format
from tests.programs.environment import run_program

TRAITS = ("optimistic", "impolite", "sycophantic", "humorous", "apathetic")
LIKELY = 100


@dataclass(frozen=True)
class Shifts:
    """How far two programs' shifts of log-probabilities agree.

    Attributes:
        everywhere: Pearson's r over all prompts and the whole vocabulary.
        likely: The same over each prompt's most likely tokens.
        lowest: The lowest r of a single prompt, over the vocabulary.
        slope: Ours on theirs: 1 where they are equally strong.
        largest: Largest difference, nats.
        prompts: How many.
    """

    everywhere: float
    likely: float
    lowest: float
    slope: float
    largest: float
    prompts: int


def compare_shifts(ours: NDArray[Any], theirs: NDArray[Any], likelihood: NDArray[Any]) -> Shifts:
    """Compare shifts, each [prompts, vocabulary]; ``likelihood`` says which tokens are likely."""
    top = np.argsort(-likelihood, axis=1)[:, :LIKELY]
    mine, yours = np.take_along_axis(ours, top, 1), np.take_along_axis(theirs, top, 1)
    singles = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(ours, theirs, strict=True)]
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    return Shifts(
        everywhere=float(np.corrcoef(a, b)[0, 1]),
        likely=float(np.corrcoef(mine.ravel(), yours.ravel())[0, 1]),
        lowest=min(singles),
        slope=float((a * b).sum() / (b * b).sum()),
        largest=float(np.abs(a - b).max()),
        prompts=len(ours),
    )


def prompts(backend: Backend, count: int) -> list[list[int]]:
    """Questions of the built-in traits in the model's chat format, as token ids."""
    chat = chat_format(backend)
    asked = [
        question
        for trait in map(load_trait, TRAITS)
        for question in (*trait.extraction_questions, *trait.evaluation_questions)
    ]
    assert len(asked) >= count
    return [list(chat.encode(None, question)) for question in asked[:count]]


def ours(model: Any, tokenizer: Any, asked: Sequence[Sequence[int]], edits: Sequence[Edit] = ()) -> NDArray[Any]:
    """Our log-probabilities of what follows each prompt: float32 [prompts, vocabulary]."""
    backend, rows = wrap_model(model, tokenizer), []
    with torch.no_grad(), backend.editing(edits):
        for prompt in asked:
            logits = model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
            rows.append(logits.float().log_softmax(-1).numpy())
    return np.stack(rows)


def theirs(folder: Path, model: Path, asked: Sequence[Sequence[int]], **task: Any) -> NDArray[Any]:
    """llama.cpp's."""
    out = folder / "logprobs.npy"
    run_program("llama_cpp", {"model": str(model), "prompts": [list(p) for p in asked], "out": str(out), **task})
    found: NDArray[Any] = np.load(out, allow_pickle=False)
    return found


def unquantised(model: Path, out: Path) -> Path:
    """A copy of a GGUF model with all of its weights in float32, so that both programs have the same."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
