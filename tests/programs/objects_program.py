"""steering-vectors and repeng: what they make of our files, what they do with it, and files of their own.

Task: ``steering_vector`` (our file), ``control`` (our GGUF file), ``model`` (a folder), ``rope_theta``, ``layer``,
``scale``, ``ids``, ``out`` (a folder to write to).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repeng import ControlModel, ControlVector
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM


def main() -> None:
    task = json.load(sys.stdin)
    out, layer, scale = Path(task["out"]), task["layer"], task["scale"]
    ids = torch.tensor([task["ids"]])
    # transformers 4 does not find it where transformers 5 writes it.
    theta = task["rope_theta"]
    model: Any = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32, rope_theta=theta)

    def logprobs() -> np.ndarray[Any, Any]:
        with torch.no_grad():
            found: np.ndarray[Any, Any] = model(ids).logits[0, -1].log_softmax(-1).numpy()
        return found

    found: dict[str, Any] = {"plain": logprobs()}
    vector = SteeringVector(**torch.load(task["steering_vector"], weights_only=True))
    with vector.apply(model, multiplier=scale):
        found["steering_vectors"] = logprobs()
    torch.save(vector, out / "pickled.pt")
    control = ControlVector.import_gguf(task["control"])
    control.export_gguf(str(out / "repeng.gguf"))
    controlled = ControlModel(model, [layer])
    controlled.set_control(control, scale)
    found["repeng"] = logprobs()
    np.savez(out / "logprobs.npz", **found)
    layers = {"steering_vectors": sorted(vector.layer_activations), "repeng": sorted(control.directions)}
    print(json.dumps({"layers": layers, "model_type": control.model_type}))


if __name__ == "__main__":
    main()
