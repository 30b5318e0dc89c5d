"""Local tasks for the harness, written into a folder by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MULTIPLE_CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""

GENERATING = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["t"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
metadata:
  version: 1.0
"""

DOCUMENTS: list[dict[str, Any]] = [
    {"question": "The sun is", "choices": ["hot", "cold and wet"], "answer": 0},
    {"question": "Two and two make", "choices": ["four", "a fine evening"], "answer": 0},
    {"question": "At night it is", "choices": ["bright", "dark"], "answer": 1},
    {"question": "Fish live in the", "choices": ["water, not on land", "sky"], "answer": 0},
]


def write_tasks(folder: Path) -> list[str]:
    """One task of each kind, over the same documents; returns their names."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS), encoding="utf-8")
    kinds = {"local_choice": MULTIPLE_CHOICE, "local_generate": GENERATING, "local_rolling": ROLLING}
    for name, text in kinds.items():
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data), encoding="utf-8")
    return list(kinds)
