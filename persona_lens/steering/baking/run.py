"""`bake`: the folder of a model that is steered by its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from persona_lens.backend import Backend, wrap_model
from persona_lens.backend.edits import check_edits
from persona_lens.backend.tokens import TokenIds
from persona_lens.core.files import named, write_text, writing_folder
from persona_lens.core.progress import Progress, no_progress
from persona_lens.models import Loaded, load, load_model, pinned, resolve, stored_dtype
from persona_lens.steering.baking import check as checking
from persona_lens.steering.baking.architectures import Architecture, architecture_of
from persona_lens.steering.baking.card import baked_card
from persona_lens.steering.baking.gguf import Converter
from persona_lens.steering.baking.plan import BakingError, Plan, everywhere_of, planned
from persona_lens.steering.baking.weights import Written, write
from persona_lens.steering.given import GivenVectors
from persona_lens.steering.steering import Steering, by_name

RECORD, CARD, GGUF = "persona-lens.json", "README.md", "model.gguf"
FORMAT_VERSION = 1
LIBRARIES = ("persona-lens", "torch", "transformers")


@dataclass(frozen=True)
class Baked:
    """A model that is steered by its weights.

    Attributes:
        folder: Where it is, for ``AutoModelForCausalLM.from_pretrained``.
        record: What is in it and where that came from, as ``persona-lens.json`` beside it says.
        check: How far it is from the steered model; None where that was not asked for.
    """

    folder: Path
    record: dict[str, Any]
    check: checking.Check | None = None


def bake(
    model: str,
    steering: Steering | str | None,
    folder: Path | str,
    *,
    vectors: GivenVectors = None,
    everywhere: Sequence[str] = (),
    check: bool = False,
    gguf: Converter | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    allow_other_model: bool = False,
    progress: Progress = no_progress,
) -> Baked:
    """Write a model whose weights do what a steering does, for any program that runs models.

    An addition to all tokens becomes a bias of the MLP's last projection, which is exactly what the edit does; where
    the class has none, the model is saved as one that has, or a block is put in that adds it. A direction is taken out
    everywhere by projecting it out of all that writes to the residual stream: the embedding, each attention, each MLP,
    and what is added. That is more than edits do, which ablate at the outputs of blocks.

    Args:
        model: Hub id, local folder or embedded model.
        steering: Additions, or their notation; None adds nothing.
        folder: The folder to write; it must not be there.
        vectors: Those that notations name.
        everywhere: Directions to take out of all that is written, each a trait and a layer, ``evil@18``.
        check: Compare what was written with the steered model.
        gguf: Writes it for llama.cpp too, as ``model.gguf`` in the folder.
        revision: Branch, tag or commit of a hub model.
        dtype: Precision of the weights; ``auto`` keeps the model's.
        device: Where to compute.
        allow_other_model: Bake into a model that the vectors do not belong to.
        progress: Told what is under way.

    Returns:
        What was written. Whether a check passed is in its ``check``.

    Raises:
        BakingError: If the folder exists, or the steering or the model does what no weights do.
        EditError: If vectors of another model, where they are allowed, do not fit.
        ModelError: If the model cannot be loaded.
        NotationError, SteeringError: If a notation is not written so, or names vectors that are not given.
        VectorsError: If vectors belong to another model.
    """
    target = Path(folder)
    with named(target, BakingError):
        if target.exists() or target.is_symlink():
            raise BakingError(f"{target} exists already; choose another name, or remove it")
    known = by_name(vectors if vectors is not None else ())
    given = Steering.parse(steering, known) if isinstance(steering, str) else steering
    taken = everywhere_of(everywhere, known)
    plan = planned(given, taken)
    if not plan.additions and plan.basis is None:
        raise _nothing(given)
    progress(0, None, "opening the model")
    loaded = _opened(model, revision, dtype, device)
    work = _Baking(loaded, architecture_of(loaded.model), plan, given, taken, device, progress)
    return work.done(target, work.backend(allow_other_model), check, gguf)


def _nothing(given: Steering | None) -> BakingError:
    what = "there is nothing to bake" if given is None else f"{given} adds nothing that could be baked"
    return BakingError(f"{what}; give a steering such as optimistic@18:+1.5, or --everywhere evil@18")


def _opened(model: str, revision: str | None, dtype: str, device: str) -> Loaded:
    """The model with its weights in the precision in which they are stored, wherever it runs."""
    if dtype == "auto":
        dtype = stored_dtype(pinned(resolve(model, revision)))
    return load(model, revision, dtype=dtype, device=device)


@dataclass(frozen=True)
class _Baking:
    loaded: Loaded
    architecture: Architecture
    plan: Plan
    steering: Steering | None
    everywhere: Steering | None
    device: str
    progress: Progress

    def backend(self, allow_other_model: bool) -> Backend:
        """The model, which the vectors belong to, or at least fit."""
        backend = wrap_model(self.loaded.model, self.loaded.tokenizer)
        for each in (self.steering, self.everywhere):
            if each is not None and not allow_other_model:
                each.check_model(backend)
        taken = self.everywhere.edits() if self.everywhere is not None else ()
        check_edits([*self.plan.edits(), *taken], backend.info.n_layers, backend.info.d_model)
        return backend

    def done(self, target: Path, backend: Backend, check: bool, gguf: Converter | None) -> Baked:
        """Write the folder; it takes its name when it is whole."""
        model, kind = self.loaded.model, self.architecture.gguf
        if gguf is not None and kind is None and self.plan.additions:
            raise BakingError(f"llama.cpp has no such biases for a {type(model).__name__}; leave out --gguf")
        record, prompts = self._record(backend), self._prompts(backend) if check else []
        with writing_folder(target, BakingError) as part:
            self.progress(0, None, "writing the weights")
            written = write(model, self.architecture, self.plan)
            record |= _told(written)
            with _named_writes(target):
                _save(written.model, part)
                self.loaded.tokenizer.save_pretrained(str(part))
                for file in part.glob("*.safetensors"):  # which only their owner could read
                    file.chmod((part / "config.json").stat().st_mode & 0o777)
            if gguf is not None:
                self.progress(0, None, "converting for llama.cpp")
                record["gguf"] = gguf.convert(part, part / GGUF, written.model, written.biases, kind)
            del written
            found = self._checked(part, prompts) if check else None
            record["check"] = None if found is None else found.to_json()
            write_text(part / RECORD, json.dumps(record, indent=2) + "\n", failed=BakingError)
            write_text(part / CARD, baked_card(record), failed=BakingError)
        return Baked(target, record, found)

    def _record(self, backend: Backend) -> dict[str, Any]:
        source = self.loaded.source
        info = replace(backend.info, model=source.id, revision=source.identity)
        return {
            "kind": "baked",
            "format_version": FORMAT_VERSION,
            "model": asdict(info),
            "steering": None if self.steering is None else self.steering.describe(),
            "everywhere": None if self.everywhere is None else self.everywhere.describe(),
            "versions": {name: version(name) for name in LIBRARIES},
        }

    def _prompts(self, backend: Backend) -> list[TokenIds]:
        """What the check asks."""
        both = (self.steering, self.everywhere)
        vectors = [each for steering in both if steering is not None for each in steering.vectors.values()]
        return checking.prompts_of(vectors, backend)

    def _checked(self, part: Path, prompts: list[TokenIds]) -> checking.Check:
        """The folder's model, loaded anew, beside the steered one, in float32; and that beside what is stored."""
        self.progress(0, None, "checking")
        dtype = str(self.loaded.model.dtype).removeprefix("torch.")
        plain: Any = self.loaded.model
        plain.float()
        tokenizer = self.loaded.tokenizer
        added = self.steering.edits() if self.steering is not None else ()
        found = checking.steered(plain, tokenizer, prompts, self.architecture, self.plan, added)
        anew = load(str(part), dtype="float32", device=self.device)
        if self._prompts(wrap_model(anew.model, anew.tokenizer)) != prompts:
            raise BakingError("the tokenizer that was written encodes the prompts otherwise than the model's own does")
        baked, stored = checking.observe(anew.model, anew.tokenizer, prompts), None
        del anew
        if dtype not in ("float32", stored_dtype(self.loaded.source)):
            original = load_model(self.loaded.source, dtype="float32", device=self.device)
            stored = checking.observe(original, tokenizer, prompts)
        return checking.compared(baked, found, dtype, stored)


def _told(written: Written) -> dict[str, Any]:
    """What was written, for the record."""
    return {
        "saved_as": type(written.model).__name__,
        "note": written.note,
        "dtype": str(written.model.dtype).removeprefix("torch."),
        "biases": [
            {"layer": layer, "name": name, "length": written.added[layer], "rounding": written.rounding[layer]}
            for layer, name in written.biases.items()
        ],
        "left": written.left,
        "gguf": None,
    }


def _save(model: Any, folder: Path) -> None:
    """Write a model as it is: transformers reads settings of generation that it would not write."""
    settings = model.generation_config
    model.generation_config = type(settings)()
    model.save_pretrained(str(folder))
    settings.to_json_file(str(folder / "generation_config.json"))


@contextmanager
def _named_writes(target: Path) -> Iterator[None]:
    """What libraries raise when they cannot write, as an error that names the folder."""
    with named(target, BakingError):
        try:
            yield
        except SafetensorError as error:
            raise BakingError(f"{target} cannot be written: {error}; make room there") from error
