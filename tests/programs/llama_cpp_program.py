"""llama.cpp under a control vector: log-probabilities of the token that follows each prompt.

The library is the one in xllamacpp, of whose Python face control vectors are no part; it is called through the
declarations of llama-cpp-py-sync, of the release one build before (whose own library wants a newer C library than some
machines have). The file is read by ``common_control_vector_load``, which is what ``--control-vector-scaled`` calls: a
C++ function, so its arguments are laid out here as that library's compiler does.

Task: ``control`` and ``scale`` (a control vector), and ``model`` (a GGUF file), ``prompts`` (token ids) and ``out`` (an
.npy to write, float32 [prompts, vocabulary]); either part may be missing.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

import cffi
import numpy as np
import xllamacpp
from llama_cpp_py_sync import Llama, _cffi_bindings

LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
CXX = f"""
struct load_info {{ float strength; char * file; }};
struct infos {{ struct load_info * begin; struct load_info * end; struct load_info * room; }};
struct loaded {{ int32_t n_embd; float * begin; float * end; float * room; }};
void * {LOADER}(struct loaded * out, struct infos * in);
"""


def library() -> str:
    """The shared object with llama.cpp in it."""
    return str(next(Path(xllamacpp.__file__).parent.glob("*.so")))


def control_vector(file: str, scale: float) -> tuple[np.ndarray[Any, Any], int]:
    """What llama.cpp makes of a file: its buffer, and n_embd, which is -1 where it refuses the file."""
    ffi = cffi.FFI()
    ffi.cdef(CXX)
    path = os.fsencode(file) + b"\0"
    # A string of the older ABI, which the wheels are built for: a pointer to characters, with their numbers in front.
    text = ffi.new("char[]", struct.pack("<QQQ", len(path) - 1, len(path) - 1, 0) + path)
    info = ffi.new("struct load_info *", {"strength": scale, "file": text + 24})
    infos = ffi.new("struct infos *", {"begin": info, "end": info + 1, "room": info + 1})
    loaded = ffi.new("struct loaded *")
    getattr(ffi.dlopen(library()), LOADER)(loaded, infos)
    count = loaded.end - loaded.begin
    data = np.frombuffer(ffi.buffer(loaded.begin, 4 * count), dtype=np.float32).copy() if count else np.zeros(0, "f4")
    return data, loaded.n_embd


def log_probabilities(task: dict[str, Any], control: tuple[np.ndarray[Any, Any], int] | None) -> np.ndarray[Any, Any]:
    """Float32 [prompts, vocabulary]."""
    _cffi_bindings._lib = _cffi_bindings.get_ffi().dlopen(library())
    model = Llama(task["model"], n_ctx=512, n_threads=1, verbose=False)
    lib, ffi, context = model._lib, model._ffi, model._ctx
    if control is not None:
        data, width = control
        pointer = ffi.cast("float *", data.ctypes.data)
        assert lib.llama_set_adapter_cvec(context, pointer, data.size, width, 1, model.n_layer - 1) == 0
    rows = []
    for prompt in task["prompts"]:
        model._clear_context_state()
        model._eval_tokens(prompt, 0)
        logits = np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, -1), 4 * model.n_vocab), dtype=np.float32)
        shifted = logits.astype(np.float64) - logits.max()
        rows.append((shifted - np.log(np.exp(shifted).sum())).astype(np.float32))
    return np.stack(rows)


def main() -> None:
    task = json.load(sys.stdin)
    control = control_vector(task["control"], task.get("scale", 1.0)) if "control" in task else None
    answer: dict[str, Any] = {"llama_cpp": xllamacpp.__version__}
    if control is not None:
        data, width = control
        table = data.reshape(-1, width) if width > 0 else data
        answer |= {"n_embd": width, "first": table[:, 0].tolist() if width > 0 else []}
    if "model" in task:
        np.save(task["out"], log_probabilities(task, control))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
