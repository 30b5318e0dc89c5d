"""Turning a quantised GGUF file into a folder of float32 safetensors that transformers loads in a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persona_lens.models.errors import ModelError

__all__ = ["convert_gguf"]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file and save model and tokenizer as transformers would have them.

    The weights are saved as float32: a dequantised weight is ``scale * q + minimum`` with float16 scale and
    minimum, whose product needs more digits than float16 or bfloat16 have, so anything shorter would be
    another model. The arithmetic is numpy's, elementwise in float32, and gives the same bits on every
    machine.

    Args:
        gguf: The file.
        folder: An existing folder to save into.

    Raises:
        ModelError: transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                **place,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, padding_side="left", **place)
        except Exception as error:  # tokenizers raises bare exceptions, and gguf most of the others
            raise ModelError(
                f"transformers cannot convert {gguf.name}: {error}. `pip install -U transformers gguf` may help."
            ) from error
        # What loads from here on is an ordinary float32 model: traces of the quantised origin would make
        # save_pretrained refuse, and from_pretrained look for a quantiser.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        for leftover in ("hf_quantizer", "is_quantized", "quantization_method"):
            if leftover in vars(model):
                delattr(model, leftover)
        for unlasting in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(unlasting, None)  # how it was loaded just now, not what it is
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own bars and notices out of the user's terminal, and put its settings back."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as notices

    log: Any = notices  # its functions carry no types
    source: Any = reader
    level, bars, bar = log.get_verbosity(), log.is_progress_bar_enabled(), getattr(source, "tqdm", None)
    log.set_verbosity_error()
    log.disable_progress_bar()
    # The GGUF reader draws a bar of its own that no setting of transformers reaches.
    source.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        if bar is not None:
            source.tqdm = bar
