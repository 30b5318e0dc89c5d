"""``persona-lens bake``: a model that is steered by its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from persona_lens.cli import options
from persona_lens.cli.display import quiet_libraries, say, showing_progress
from persona_lens.cli.options.steerings import named_vectors
from persona_lens.cli.runner import deliver
from persona_lens.cli.settings import Option, argument
from persona_lens.core.errors import PersonaLensError
from persona_lens.core.text import counted

if TYPE_CHECKING:
    from persona_lens.steering.baking import Baked


CONVERTER = Option(metavar="PATH", shown="PERSONA_LENS_LLAMA_CPP, or what is on the PATH")
STEERING = "Additions, such as `optimistic@18:+1.5`, or the .yaml or .safetensors file of a steering."


def bake_command(
    model: options.Model,
    out: Annotated[Path, Option("Folder to write; it must not be there.")],
    steering: Annotated[str | None, argument("STEERING", STEERING)] = None,
    vectors: Annotated[list[str] | None, Option(metavar="PATH")] = None,
    everywhere: Annotated[list[str] | None, Option(metavar="TRAIT@LAYER")] = None,
    check: bool = False,
    gguf: bool = False,
    converter: Annotated[Path | None, CONVERTER] = None,
    dtype: Annotated[str, Option("`auto`, `float32`, `bfloat16` or `float16`; auto keeps the model's.")] = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    allow_other_model: options.AllowOtherModel = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a steering into the weights: a folder that any program runs, steered, without this one and at no cost.

    Additions to all tokens are exact: they become biases of the MLP's last projection. Other edits depend on the
    residual or on the token, and are refused.

    Example: `persona-lens bake smollm2-135m optimistic@18:+1.5 --vectors runs/optimistic-smollm2-135m --check
    --out runs/baked`

    Args:
        vectors: Run folder or file of vectors that the steering names; `NAME=PATH` renames. Repeatable.
        everywhere: Take the direction of this layer out of all that writes to the residual stream: embedding,
            attention, MLP, additions. That is more than `:ablate` does, which acts between blocks. Repeatable.
        check: Compare logits and greedy tokens with the steered model; failing is an error.
        gguf: Write model.gguf into the folder too, by llama.cpp's own converter.
        converter: llama.cpp's convert_hf_to_gguf.py, or the folder it is in.
    """
    from persona_lens.steering.baking import BakingError, bake
    from persona_lens.steering.baking.gguf import Converter
    from persona_lens.steering.given import read_steering

    if converter is not None and not gguf:
        raise PersonaLensError("--converter is for --gguf; give both, or leave it out")
    named = named_vectors(vectors or ())
    given = None if steering is None else read_steering(steering, named)
    if given is not None:
        named = {**given.vectors, **named}
    quiet_libraries()
    with showing_progress() as progress:
        baked = bake(
            model,
            given,
            out,
            vectors=named,
            everywhere=everywhere or (),
            check=check,
            gguf=Converter.find(converter) if gguf else None,
            revision=revision,
            dtype=dtype,
            device=device,
            allow_other_model=allow_other_model,
            progress=progress,
        )
    deliver({"folder": str(baked.folder), **baked.record}, lambda: _show(baked), as_json)
    if baked.check is not None and not baked.check.passed:
        raise BakingError(f"what was written to {baked.folder} is not the steered model: {baked.check.failure}")


def _show(baked: Baked) -> None:
    record, check = baked.record, baked.check
    if record["biases"]:
        worst = max(each["rounding"] for each in record["biases"])
        at = counted(len(record["biases"]), "layer")
        say(f"added at {at}; rounding to {record['dtype']} changes an addition by up to {worst:.1e} of its length")
    if record["left"] is not None:
        say(f"taken out everywhere; rounding to {record['dtype']} leaves up to {record['left']:.1e} of what was there")
    if record["note"]:
        say(f"saved as {record['saved_as']}: {record['note']}")
    if check is not None:
        say(
            f"baked and steered differ by {check.difference:.1e} of the largest logit, steered and unsteered by "
            f"{check.shift:.1e}; greedy tokens are the same after {check.same} of {check.prompts} questions"
        )
        if not check.tells:
            say(
                f"steering changes no more than the {check.limit:.1e} that the check allows, so that passing it says "
                "nothing"
            )
        if check.cast is not None:
            say(
                f"both are of the model in {record['dtype']}; rounding its own weights to that changes the unsteered "
                f"model by {check.cast:.1e}, which the check leaves out"
            )
        if check.edits is not None:
            say(
                f"baked and ablated between blocks, as edits do, differ by {check.edits:.1e}, "
                f"and at attention sinks too by {check.edits_with_sinks:.1e}"
            )
    say(f"model: {baked.folder}")
