"""What is timed, and against what."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from persona_lens.backend import (
    Backend,
    Edit,
    Read,
    Sampling,
    TokenBatch,
    Watch,
    WatchedTokens,
    find_backend,
    watched_generation,
    wrap_model,
)
from persona_lens.backend.batches import forward_batches
from persona_lens.models import load_model, load_tokenizer, resolve
from persona_lens.traits import load_trait

ROWS, NEW_TOKENS, LAYER, TRAITS = 64, 64, 18, 7
WATCHED_TOKENS = 128  # a short reply of a chat; a watch runs one pass more, over the last token
TEXTS, SHORTEST, LONGEST = 256, 20, 400

Work = Callable[[], object]


def load(dtype: str) -> tuple[Any, Any]:
    """The embedded model and its tokenizer."""
    source = resolve("smollm2-135m")
    return load_model(source, dtype=dtype), load_tokenizer(source)


def endless(model: Any, tokenizer: Any) -> Backend:
    """A backend that never ends a turn early, so that every run generates the same number of tokens."""
    backend: Any = wrap_model(model, tokenizer)
    backend.end_ids = ()
    return backend  # type: ignore[no-any-return]


def prompts(tokenizer: Any, rows: int = ROWS) -> list[list[int]]:
    """Questions of the demo trait under its instructions, as an extraction sends them."""
    from persona_lens.models import ChatFormat
    from persona_lens.traits import Arm

    trait, chat = load_trait("optimistic"), ChatFormat.from_tokenizer(tokenizer)
    asked = [(arm, pair, q) for q in trait.extraction_questions for pair in range(5) for arm in Arm]
    return [chat.encode(trait.system_prompt(arm, pair), q) for arm, pair, q in asked[:rows]]


def sampling(rows: int = ROWS, new_tokens: int = NEW_TOKENS) -> Sampling:
    """Seeded sampling at temperature 1."""
    return Sampling(new_tokens, 1.0, seeds=tuple(range(rows)))


def plain_generation(model: Any, tokenizer: Any, rows: list[list[int]], new_tokens: int = NEW_TOKENS) -> Work:
    """``model.generate`` as one would call it, sampling at temperature 1."""
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="left").to(model.device)

    def run() -> object:
        with torch.inference_mode():
            return model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )

    return run


def reading_generation(backend: Backend, rows: list[list[int]], new_tokens: int = NEW_TOKENS) -> Work:
    """Generation that brings back the three means at every layer."""
    return lambda: backend.generate(rows, sampling(len(rows), new_tokens), (), Read.means())


def one_edit(backend: Backend) -> list[Edit]:
    """One vector added at one layer."""
    direction = torch.randn(backend.info.d_model, generator=torch.Generator().manual_seed(0))
    return [Edit.add(min(LAYER, backend.info.n_layers - 1), direction, 0.1)]


def all_layers(backend: Backend) -> list[Edit]:
    """Another vector added at every layer."""
    generator = torch.Generator().manual_seed(0)
    return [
        Edit.add(layer, torch.randn(backend.info.d_model, generator=generator), 0.01)
        for layer in range(backend.info.n_layers)
    ]


def generation(backend: Backend, rows: list[list[int]], edits: list[Edit], new_tokens: int = NEW_TOKENS) -> Work:
    """Generation without reads, under edits."""
    return lambda: backend.generate(rows, sampling(len(rows), new_tokens), edits)


def watching_generation(
    backend: Backend, rows: list[list[int]], traits: int = TRAITS, new_tokens: int = WATCHED_TOKENS
) -> Work:
    """Generation whose every token is told, at every layer, on a direction a trait."""
    info, generator = backend.info, torch.Generator().manual_seed(0)
    directions = torch.randn(info.n_layers, traits, info.d_model, generator=generator)
    highest = torch.tensor(-torch.inf)

    def on_tokens(tokens: WatchedTokens) -> None:
        nonlocal highest
        highest = torch.maximum(highest, tokens.projections.nan_to_num().max())

    watch = Watch(directions, on_tokens)
    return lambda: watched_generation(backend, rows, sampling(len(rows), new_tokens), watch)


def bridge_generation(bridge: Any, tokenizer: Any, rows: list[list[int]]) -> Work:
    """TransformerLens' own way to the same: its bridge's module generates under hooks that add up the residuals."""
    plain = plain_generation(bridge.original_model, tokenizer, rows)
    sums: dict[str, torch.Tensor] = {}

    def add_up(residual: torch.Tensor, hook: Any) -> None:
        total = residual.float().sum(dim=1)
        sums[hook.name] = sums[hook.name] + total if hook.name in sums else total

    def run() -> object:
        sums.clear()
        names = [f"blocks.{layer}.hook_out" for layer in range(bridge.cfg.n_layers)]
        with bridge.hooks(fwd_hooks=[(name, add_up) for name in names]):
            return plain()

    return run


def bridged(dtype: str) -> tuple[Any, Any]:
    """A TransformerBridge over a module of its own."""
    find_backend("transformer_lens")
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = load(dtype)
    bridge = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        hf_model=model,
        tokenizer=tokenizer,
        dtype=model.dtype,
        device=str(model.device),
    )
    return bridge, tokenizer


def nnsighted(model: Any, tokenizer: Any) -> Any:
    """An nnsight model over a module that is already loaded."""
    find_backend("nnsight")
    from persona_lens_nnsight.library import nnsight

    return nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation")


def rollouts(tokenizer: Any, count: int = TEXTS) -> TokenBatch:
    """What an extraction reads: ten responses to each prompt, texts of up to 400 tokens, the responses' ids random."""
    generator = random.Random(0)
    asked = prompts(tokenizer, -(-count // 10))
    rows = [asked[row // 10] for row in range(count)]
    lengths = [generator.randint(4, LONGEST - len(row)) for row in rows]
    return TokenBatch.of(rows, [[generator.randrange(100, len(tokenizer)) for _ in range(n)] for n in lengths])


def texts(vocabulary: int, count: int = TEXTS) -> TokenBatch:
    """Texts that share nothing: random token ids, 20 to 400 a text; what they say makes no difference to the time."""
    generator = random.Random(0)
    lengths = [generator.randint(SHORTEST, LONGEST) for _ in range(count)]
    rows = [[generator.randrange(100, vocabulary) for _ in range(length)] for length in lengths]
    return TokenBatch.of([row[: len(row) // 3] for row in rows], [row[len(row) // 3 :] for row in rows])


def batched_reading(backend: Backend, batch: TokenBatch) -> Work:
    """The three means of every text at every layer, in batches of like length."""

    def run() -> object:
        total = 0.0
        for _, result in forward_batches(backend, batch, Read.means()):
            total += float(result.reads["response_mean"].nan_to_num().sum())
        return total

    return run


def seconds_in_linear_layers(work: Work) -> float:
    """How long the linear layers take while some work runs: what no way of batching can save."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    found = (e.self_cpu_time_total for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))
    return float(sum(found)) / 1e6


def one_by_one_reading(model: Any, batch: TokenBatch) -> Work:
    """The released reference's way: a forward a text, autograd on, logits and all hidden states, means at the end."""

    def run() -> object:
        kept: list[list[torch.Tensor]] = []
        for prompt, response in zip(batch.prompts, batch.responses, strict=True):
            ids = torch.tensor([prompt + response], device=model.device)
            states = model(ids, output_hidden_states=True).hidden_states
            kept.append([state[:, len(prompt) :].mean(dim=1).detach().cpu() for state in states])
            kept[-1] += [state[:, : len(prompt)].mean(dim=1).detach().cpu() for state in states]
            kept[-1] += [state[:, len(prompt) - 1].detach().cpu() for state in states]
        return kept

    return run


def training_step(model: Any, tokenizer: Any, edits: list[Edit], rows: int = 8, width: int = 96) -> Work:
    """An optimizer step of a LoRA adapter over a batch, under edits."""
    from peft import LoraConfig, get_peft_model

    from persona_lens.finetuning import TrainingEdits

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.0)
    ids = torch.randint(100, len(tokenizer), (rows, width), generator=torch.Generator().manual_seed(0))

    def run() -> object:
        with TrainingEdits(adapted, edits):
            adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return None

    return run
