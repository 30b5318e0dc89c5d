"""``python -m benchmarks.control_vectors RUN``: a control vector in llama.cpp against the same steering here.

Both add the same vector at the same layer to the same prompts, and the shifts of the next token's log-probabilities are
compared: with llama.cpp on the same weights in float32, and on the quantised file that the embedded model comes as.
Ours is the dequantised model in float32. ``make test-programs`` installs llama.cpp's environment.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_lens import load_vectors, wrap_model
from persona_lens.models import resolve
from persona_lens.vectors.formats import Chosen, export_vectors
from tests.programs import comparing as c
from tests.programs.environment import missing
from tests.servers.conftest import embedded_gguf


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="vectors of the embedded model, or their run folder")
    parser.add_argument("--layer", type=int, default=19)
    parser.add_argument("--coefficient", type=float, default=2.0)
    parser.add_argument("--prompts", type=int, default=200)
    given = parser.parse_args()
    reason = missing()
    if reason is not None:
        raise SystemExit(reason)
    folder = resolve("smollm2-135m").location
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = load_vectors(given.run)
    asked = c.prompts(wrap_model(model, tokenizer), given.prompts)
    plain = c.ours(model, tokenizer, asked)
    ours = c.ours(model, tokenizer, asked, [vectors.edit(given.layer, given.coefficient)]) - plain
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        [file], _ = export_vectors(vectors, "gguf", place / "control.gguf", Chosen((given.layer,)))
        quantised = embedded_gguf()
        for name, gguf in (("float32", c.unquantised(quantised, place / "f32.gguf")), (quantised.stem, quantised)):
            before = c.theirs(place, gguf, asked)
            after = c.theirs(place, gguf, asked, control=str(file), scale=given.coefficient)
            found = c.compare_shifts(ours, after - before, plain)
            print(json.dumps({"llama.cpp's weights": name, **asdict(found)}), flush=True)


if __name__ == "__main__":
    main()
