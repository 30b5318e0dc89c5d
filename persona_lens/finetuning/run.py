"""`finetune`: a model trained on conversations, kept in a run folder that the same command continues."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from persona_lens.backend import ModelInfo, wrap_model
from persona_lens.backend.sinks import depend_on_sinks, sink_limits
from persona_lens.core.documents import read_json
from persona_lens.core.plugins import install_command
from persona_lens.core.progress import Progress, shown_progress
from persona_lens.data.transcripts import Transcript
from persona_lens.finetuning.config import FinetuneConfig, FinetuningError, Measures, measures_of
from persona_lens.finetuning.edits import PreventativeSteering
from persona_lens.finetuning.examples import (
    Example,
    Examples,
    check_answered,
    encode_examples,
    fingerprint,
    in_system,
    read_conversations,
)
from persona_lens.finetuning.trainer import (
    CheckedCheckpoints,
    MetricsFile,
    ProjectionPenalty,
    ProjectionWatch,
    TrainedError,
    last_checkpoint,
    make_trainer,
    named_writes,
)
from persona_lens.models import ChatFormat, Loaded, load, resolve
from persona_lens.models.loading import load_tokenizer
from persona_lens.models.source import taken_off
from persona_lens.reports.result import Result
from persona_lens.runs import RunFolder
from persona_lens.runs.cost import Work
from persona_lens.vectors import PersonaVectors

SUMMARY, CHECKPOINTS, ADAPTER, MODEL = "summary.json", "checkpoints", "adapter", "model"
_MODULES = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}
Data = Path | str | Sequence[Transcript]


@dataclass(frozen=True, repr=False, eq=False)
class Finetuned(Result):
    """What a finetuning left, whose rows are those of ``metrics.jsonl``.

    Attributes:
        model: The adapter, or the whole model: what every command takes for a model.
        summary: See `Result`.
        folder: See `Result`.
    """

    kind = "finetune"
    model: Path
    summary: Mapping[str, Any]
    folder: Path


def finetune_work(
    model: str,
    data: Data,
    config: FinetuneConfig | None = None,
    *,
    vectors: Sequence[PersonaVectors] = (),
    held_out: Data = (),
    side: str | None = None,
) -> tuple[Work, ...]:
    """What `finetune` would train on and read; the data is read and encoded, nothing runs.

    Calls of the training are optimizer steps. Which rows a part of an epoch takes is not known beforehand: they count
    as the mean of all.
    """
    config = config or FinetuneConfig()
    measures, transcripts = measures_of(config, vectors), conversations_of(data, side)
    others = conversations_of(held_out, side)
    chat = ChatFormat.from_tokenizer(load_tokenizer(resolve(model, weights=False)))
    encode = _encoding(chat, config)
    examples = encode(in_system(transcripts, measures.prompts) if measures.prompts else transcripts).rows
    one_step, each = config.batch_size * config.accumulation, config.watch
    an_epoch = ceil(len(examples) / one_step)
    steps = config.max_steps or ceil(config.epochs * an_epoch)
    rows = steps // an_epoch * len(examples) + steps % an_epoch * one_step
    tokens = round(rows * fmean(len(example.ids) for example in examples))
    how: dict[str, Any] = {
        "at_most": each.stop_above is not None,
        "precision": "bfloat16" if config.bf16 else _dtype(config),
    }
    work = [Work("training", steps, rows, tokens, **how)]
    if again := bool(measures.penalised) + config.gradient_checkpointing:
        passes = again * ceil(rows / config.batch_size)
        work.append(Work("reading in training", passes, again * rows, again * tokens, **how))
    if each.every is not None:
        prompts, looks = _watched(chat, vectors), 1 + steps // each.every
        work.append(Work("reading prompts", looks, looks * len(prompts), looks * sum(map(len, prompts)), **how))
    return *work, _loss_work(config, examples, encode(others).rows if others else (), steps, how)


def _loss_work(
    config: FinetuneConfig, learned: Sequence[Example], held_out: Sequence[Example], steps: int, how: Mapping[str, Any]
) -> Work:
    """What is read to take the loss at the end, and on held-out data in between."""
    times = 1 + (steps // config.evaluate_every if config.evaluate_every else 0)
    found = Work("reading for the loss", 0, 0, 0, **how)
    for rows, often in ((learned[: config.loss_examples], 1), (held_out, times)):
        tokens = sum(len(example.ids) for example in rows)
        found += Work(found.label, ceil(len(rows) / config.batch_size), len(rows), tokens, **how) * often
    return found


def _watched(chat: ChatFormat, vectors: Sequence[PersonaVectors]) -> list[list[int]]:
    """The prompts that are projected on vectors while the model is trained."""
    questions = dict.fromkeys(q for each in vectors for q in each.trait_definition.evaluation_questions)
    return [chat.encode(None, question) for question in questions]


def finetune(
    model: str | Loaded,
    data: Data,
    folder: Path | str,
    config: FinetuneConfig | None = None,
    *,
    vectors: Sequence[PersonaVectors] = (),
    held_out: Data = (),
    chat: ChatFormat | None = None,
    side: str | None = None,
    device: str = "auto",
    progress: Progress = shown_progress,
) -> Finetuned:
    """Finetune a model on conversations, with the loss on what the assistant says (method, section 6).

    Args:
        model: Hub id, local folder or embedded model; or a loaded one, which stays as it was if an adapter is trained.
        data: Conversations, or a file of them.
        folder: Run folder, kept and resumed: ``metrics.jsonl``, ``checkpoints/``, ``summary.json``, and ``adapter/`` or
            ``model/`` with what was trained.
        config: How; the paper's settings by default.
        vectors: Those that the configuration's edits name, that are watched, and whose trait prompts are taken.
        held_out: Conversations, or a file of them, whose loss is measured and not learned.
        chat: Chat format; the model's own by default.
        side: Of preference pairs: ``chosen`` or ``rejected``.
        device: ``auto`` or a torch device, for a model that is not loaded yet.
        progress: Told how far the work is.

    Raises:
        FinetuningError: If packages are missing, the configuration does not fit, or there is nothing to learn.
        RunError: If the folder holds another run.
        VectorsError: If the vectors belong to another model.
    """
    config = config or FinetuneConfig()
    _require(config)
    transcripts, others = conversations_of(data, side), conversations_of(held_out, side)
    measures = measures_of(config, vectors)
    loaded = load(model, dtype=_dtype(config), device=device) if isinstance(model, str) else model
    chat = chat or ChatFormat.from_tokenizer(loaded.tokenizer)
    backend = wrap_model(loaded.model, loaded.tokenizer)
    for each in vectors:
        each.check_model(backend, allowable=False)
    placed = in_system(transcripts, measures.prompts) if measures.prompts else transcripts
    encode = _encoding(chat, config)
    examples, unseen = encode(placed), encode(others).rows if others else ()
    info = replace(backend.info, model=loaded.source.id, revision=loaded.source.identity)
    record = {
        "data": fingerprint(transcripts),
        "held_out": fingerprint(others) if others else None,
        "model": asdict(info),
        **_described(config, measures, vectors, chat),
    }
    with RunFolder(folder, record) as run:
        place = run.path / (ADAPTER if config.weights == "lora" else MODEL)
        if (run.path / SUMMARY).is_file():
            return Finetuned(place, run.read_json(SUMMARY), run.path)
        # Of the model before training, which a run that continues from a checkpoint could not measure any more.
        limits = sink_limits(backend) if depend_on_sinks(measures.edits) else None
        work = _Training(loaded, config, examples, unseen, measures, tuple(vectors), chat, run, info, limits, progress)
        return Finetuned(place, work.done(place), run.path)


def _encoding(chat: ChatFormat, config: FinetuneConfig) -> Callable[[Sequence[Transcript]], Examples]:
    return partial(encode_examples, chat=chat, max_length=config.max_length, answers_only=config.part == "answer")


def _described(
    config: FinetuneConfig, measures: Measures, vectors: Sequence[PersonaVectors], chat: ChatFormat
) -> dict[str, Any]:
    return {
        "kind": "finetune",
        "config": config.model_dump(mode="json", exclude={"part"} if config.part == "all" else None),
        "steering": measures.steering.describe() if measures.steering else None,
        "prompts": list(measures.prompts),
        "watched": [each.content_hash for each in vectors] if config.watch.every else [],
        "chat": {"digest": chat.digest, "system_role": chat.system_role, "thinking": chat.thinking},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }


@dataclass(frozen=True)
class _Training:
    loaded: Loaded
    config: FinetuneConfig
    examples: Examples
    held_out: Sequence[Example]
    measures: Measures
    vectors: tuple[PersonaVectors, ...]
    chat: ChatFormat
    run: RunFolder
    info: ModelInfo
    sink_limits: Sequence[float] | None
    progress: Progress

    def done(self, place: Path) -> dict[str, Any]:
        """Train, and keep what came of it."""
        with trainable(self.loaded.model, self.config) as model, ExitStack() as held:
            prevention = held.enter_context(PreventativeSteering(self.measures.edits, sink_limits=self.sink_limits))
            watch = self._watch()
            kept = MetricsFile(self.run, self.progress)
            callbacks = [prevention, kept, *([watch] if watch else []), CheckedCheckpoints()]
            penalised = self.measures.penalised
            penalty = ProjectionPenalty(model, penalised) if penalised else None
            pad = self.loaded.tokenizer.pad_token_id or 0
            checkpoints = self.run.path / CHECKPOINTS
            data = (self.examples.rows, self.held_out)
            trainer = make_trainer(model, *data, self.config, checkpoints, pad, callbacks, penalty)
            if watch is not None:
                watch.log = trainer.log
            with named_writes(checkpoints), suppress(TrainedError):
                trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
            held.close()  # what follows is of the model as it will be used
            losses = _losses(trainer, self.examples.rows[: self.config.loss_examples], self.held_out)
            self._save(model, place)
            summary = {
                "model": self.info.model,
                "method": self.config.method.value,
                "trained": place.name,
                "steps": trainer.state.global_step,
                "stopped": watch.stopped if watch else None,
                "data": self.examples.to_json(),
                "loss": losses,
                "projections": watch.rows if watch else [],
            }
        if checkpoints.is_dir() and not any(checkpoints.iterdir()):
            checkpoints.rmdir()
        self.run.write_json(SUMMARY, summary)
        return summary

    def _watch(self) -> ProjectionWatch | None:
        wanted = self.config.watch
        if wanted.every is None:
            return None
        if not self.vectors:
            raise FinetuningError("watching needs vectors to project on (--vectors)")
        layers = wanted.layers or tuple(sorted({e.layer for e in (*self.measures.edits, *self.measures.penalised)}))
        layers = layers or (self.vectors[0].tuned_choice("name those to watch (`watch.layers` in --config)").layer,)
        prompts = _watched(self.chat, self.vectors)
        return ProjectionWatch(
            prompts, self.vectors, layers, self.loaded.tokenizer, every=wanted.every, stop_above=wanted.stop_above
        )

    def _save(self, model: Any, place: Path) -> None:
        """What was trained; the folder is moved to its place when it is whole."""
        with self.run.writing_folder(place.name) as part, named_writes(place):
            model.save_pretrained(str(part))
            if self.config.weights == "full":
                self.loaded.tokenizer.save_pretrained(str(part))
                return
            (part / "README.md").unlink(missing_ok=True)  # a card to be filled in
            file = part / "adapter_config.json"
            adapter = read_json(file)
            adapter["target_modules"] = sorted(adapter["target_modules"])  # a set, in another order each time
            source = self.loaded.source
            adapter["base_model_name_or_path"] = source.location if source.kind == "folder" else source.id
            adapter["revision"] = source.revision
            file.write_text(json.dumps(adapter, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def trainable(model: Any, config: FinetuneConfig) -> Iterator[Any]:
    """The model with a new adapter, or with all its weights, to be trained; afterwards without the adapter.

    Raises:
        FinetuningError: If no adapter fits the model.
    """
    from transformers import set_seed

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    use_cache = getattr(model.config, "use_cache", None)
    set_seed(config.seed)
    adapted = _adapted(model, config) if config.weights == "lora" else model
    try:
        adapted.train()
        yield adapted
    finally:
        if config.gradient_checkpointing:
            adapted.gradient_checkpointing_disable()
        if adapted is not model:
            taken_off(adapted)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.config.use_cache = use_cache
        model.eval()


def _adapted(model: Any, config: FinetuneConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilised,
        target_modules=list(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        if hasattr(model, "peft_config"):
            del model.peft_config
        raise FinetuningError(f"no adapter for {', '.join(lora.targets)} fits this model: {error}") from error


def _losses(trainer: Any, learned: Sequence[Example], held_out: Sequence[Example]) -> dict[str, float | None]:
    """Loss in nats a token: in training as it went, and of the model as it will be used, without edits."""
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    last = logged[-max(1, len(logged) // 4) :]
    after = trainer.evaluate(list(learned), metric_key_prefix="learned")
    other = trainer.evaluate(list(held_out), metric_key_prefix="unseen") if held_out else {}
    return {
        "first": logged[0] if logged else None,
        "last": fmean(last) if last else None,
        "learned": after["learned_loss"],
        "unseen": other.get("unseen_loss"),
    }


def conversations_of(data: Data, side: str | None = None) -> list[Transcript]:
    """Conversations with something to learn, read from a file if they are in one."""
    if isinstance(data, Path | str):
        return read_conversations(data, side)
    for transcript in data:
        check_answered(transcript)
    return list(data)


def _dtype(config: FinetuneConfig) -> str:
    return "float32" if config.weights == "full" and config.dtype == "auto" else config.dtype


def _require(config: FinetuneConfig) -> None:
    missing = [name for name in ("peft", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise FinetuningError(f"finetuning needs {' and '.join(missing)}: {install_command('finetune')}")
    for name in config.report_to:
        if not any(importlib.util.find_spec(module) for module in _MODULES[name]):
            raise FinetuningError(f"report_to {name} needs it installed: pip install {name}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FinetuningError(
            "finetune runs in one process, and this is one of several; to train over many, give the callback "
            "PreventativeSteering to your own Trainer"
        )
