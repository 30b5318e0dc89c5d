"""``python -m benchmarks.train_sae TEXTS... --out DIR``: a small TopK autoencoder for trying ``persona-lens dissect``.

SAELens trains it; the activations are read through a backend of this package, so that it is trained on just what
vectors are made of. It needs the extra ``sae``. TEXTS are files and folders of texts at hand:

- ``rollouts.jsonl`` of an extraction, and any table with a column of texts: responses are read behind their prompts, in
  the model's chat format, where the row says what was asked;
- ``.txt``, ``.md`` and ``.yaml`` files, by paragraph;
- ``.py`` files, of which the docstrings are taken: the packages that are installed hold millions of words of prose.

What it finds on the embedded model stands in docs/dissection.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_lens.analysis.dissection.examples import COLUMNS
from persona_lens.backend import Backend, Read, ReadKind, TokenBatch, open_backend
from persona_lens.backend.batches import forward_batches
from persona_lens.cli.display import showing_progress
from persona_lens.core.progress import Progress
from persona_lens.data.tables import all_rows
from persona_lens.models import ChatFormat
from persona_lens.models.chat import chat_format

PROSE, TABLES = (".txt", ".md", ".yaml"), (".jsonl", ".csv", ".parquet")
LEAST_WORDS = 12  # of a paragraph or docstring that is worth reading
MAX_TOKENS = 128  # of a text: docstrings of thousands of words would crowd out the others


@dataclass(frozen=True)
class Source:
    """A text, or an answer to what was asked."""

    text: str
    system: str | None = None
    question: str | None = None


def sources(paths: Sequence[Path]) -> Iterator[Source]:
    """The texts of files and folders, in a fixed order, each once."""
    seen: set[str] = set()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            for source in _read(file):
                if len(source.text.split()) >= LEAST_WORDS and source.text not in seen:
                    seen.add(source.text)
                    yield source


def _read(file: Path) -> Iterator[Source]:
    if file.suffix == ".py":
        yield from map(Source, _docstrings(file))
    elif file.suffix in PROSE:
        yield from map(Source, file.read_text(encoding="utf-8", errors="ignore").split("\n\n"))
    elif file.suffix in TABLES:
        for row in (each.values for each in all_rows(file) if each.values is not None):
            text = next((row[name] for name in COLUMNS if isinstance(row.get(name), str)), "")
            yield Source(text, row.get("system"), row.get("question"))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text.partition(">>>")[0].strip()


def encoded(source: Source, backend: Backend, chat: ChatFormat) -> list[int]:
    """Token ids of a text, behind its prompt where it has one."""
    if source.question:
        prompt = chat.encode(source.system, source.question)
        return [*prompt, *chat.encode_answer(source.text)][: MAX_TOKENS + len(prompt)]
    ids: Any = backend.tokenizer(source.text)["input_ids"]
    return list(ids)[:MAX_TOKENS]


def activations(
    backend: Backend, layer: int, texts: Sequence[Source], tokens: int, progress: Progress
) -> Float[Tensor, "tokens d_model"]:
    """The residual stream after a block, float16; the first token of each text and special tokens are left out."""
    chat, special = chat_format(backend), set(backend.tokenizer.all_special_ids)
    read = Read(ReadKind.ACTIVATIONS, (layer,))
    found, have = [], 0
    for start in range(0, len(texts), 256):
        rows = [row for text in texts[start : start + 256] if len(row := encoded(text, backend, chat)) > 1]
        for indices, result in forward_batches(backend, TokenBatch.of(rows), [read]):
            for index, h in zip(indices, result.reads[read.kind.value][:, 0], strict=True):
                row = rows[index]
                places = [place for place in range(1, len(row)) if row[place] not in special]
                found.append(h[-len(row) :][places].half())
                have += len(places)
        progress(min(have, tokens), tokens, "activations")
        if have >= tokens:
            break
    return torch.cat(found)[:tokens]


def batches(data: Float[Tensor, "tokens d_model"], size: int, seed: int) -> Iterator[Float[Tensor, "size d_model"]]:
    """Batches without end, in another order each time round."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for start in range(0, len(data) - size + 1, size):
            yield data[order[start : start + size]].float()


def train(data: Float[Tensor, "tokens d_model"], model: str, hook: str, options: argparse.Namespace) -> Any:
    """Train it; the autoencoder that comes back takes residuals as they are."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(options.seed)
    config = TopKTrainingSAEConfig(
        d_in=data.shape[1],
        d_sae=options.features,
        k=options.k,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(model_name=model, hook_name=hook),
    )
    training = SAETrainerConfig(
        total_training_samples=options.steps * options.batch,
        train_batch_size_samples=options.batch,
        lr=options.lr,
        lr_end=options.lr / 10,
        lr_warm_up_steps=options.steps // 20,
        lr_decay_steps=options.steps // 5,
        dead_feature_window=100,
        n_batches_for_norm_estimate=50,
    )
    return SAETrainer(training, TopKTrainingSAE(config), batches(data, options.batch, options.seed)).fit()


def quality(sae: Any, data: Float[Tensor, "tokens d_model"]) -> dict[str, float]:
    """On tokens that it was not trained on: what it explains of their variance, and which features are ever active."""
    h = data.float()
    with torch.inference_mode():
        active = sae.encode(h)
        left = h - sae.decode(active)
    explained = 1 - left.square().sum() / (h - h.mean(dim=0)).square().sum()
    return {
        "explained_variance": float(explained),
        "active_features": int((active > 0).any(dim=0).sum()),
        "active_per_token": float((active > 0).sum(dim=1).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=18)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--features", type=int, default=2304)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    backend = open_backend("transformers", options.model)
    texts = list(sources(options.texts))
    # What was said to the model comes whole; of the other texts as many as there is room for, at random.
    answers, others = [each for each in texts if each.question], [each for each in texts if not each.question]
    random.Random(options.seed).shuffle(others)
    print(f"{len(answers):,} answers and {len(others):,} other texts")
    with showing_progress() as progress:
        data = activations(backend, options.layer, [*answers, *others], options.tokens, progress)
    data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed))]
    held_out = max(1, len(data) // 50)
    sae = train(data[held_out:], backend.info.model, f"blocks.{options.layer}.hook_resid_post", options)
    sae.save_inference_model(options.out)
    found = {"tokens": len(data), **quality(sae, data[:held_out])}
    (options.out / "quality.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
