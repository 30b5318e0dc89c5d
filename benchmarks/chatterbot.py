"""Real conversations for `reproduce --data`: the first question and answer of every one in chatterbot-corpus.

python -m benchmarks.chatterbot chatterbot_corpus/data/english chatterbot.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml


def main(folder: Path, out: Path) -> None:
    """Write the pairs of a folder of the corpus as JSON lines."""
    with out.open("w", encoding="utf-8") as lines:
        for path in sorted(folder.glob("*.yml")):
            for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
                if len(turns) > 1 and all(isinstance(turn, str) for turn in turns[:2]):
                    pair = {"prompt": turns[0], "response": turns[1], "subject": path.stem}
                    lines.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
