"""``python -m benchmarks.gpu``: what the product does on a GPU, in a few minutes and with nothing downloaded.

Whether it is right there comes first, then how fast it is. The large model has random weights at the shape of
Qwen2.5-7B, made on the device. Each part has its own time; one that fails does not stop the others, and one that there
is no time left for is skipped; one that takes far too long is stopped. Exit code 1 if a part failed or a figure is
above its limit. ``--device cpu --tiny`` tries all of it on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_setting import Setting
    from benchmarks.record import Figure, Outcome

ROOT = Path(__file__).resolve().parents[1]
TOO_LONG = 2  # times what a part may take
WORTH = ("torch", "transformers", "accelerate", "numpy", "triton", "nnsight", "transformer-lens", "vllm")


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        name: What ``--only`` calls it.
        run: Brings its figures as they come.
        seconds: How long it may take; comparisons take fewer pairs to stay within it.
        least: How much has to be left for it to begin.
    """

    name: str
    run: Callable[[Setting], Iterator[Figure]]
    seconds: float
    least: float


def parts() -> list[Part]:
    """All of them, in their order: what is cheap to know and stops all else comes first."""
    from benchmarks import gpu_right as right
    from benchmarks import gpu_speed as speed

    return [
        Part("ceilings", speed.ceilings, 20, 5),
        Part("tests", right.tests, 130, 60),
        Part("parity", right.parity, 60, 10),
        Part("precisions", right.precisions, 20, 10),
        Part("halving", right.halving, 30, 15),
        Part("placed", right.placed, 40, 15),
        Part("generation", speed.generation, 110, 25),
        Part("reading", speed.reading, 50, 20),
        Part("watching", speed.watching, 70, 25),
        Part("memory", right.memory, 30, 15),
        Part("screening", speed.screening, 45, 20),
        Part("halves", right.halves, 30, 15),
        Part("vllm", speed.engine, 90, 60),
    ]


def missing_packages() -> list[str]:
    """What ``pyproject.toml`` says that the product needs and is not installed here; itself among it."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[^\w.-]", line)[0] for line in stated["dependencies"]]
    return [name for name in (*names, stated["name"]) if not _version(name)]


def unlike_stated() -> list[str]:
    """What is installed in another version than ``pyproject.toml`` asks for."""
    from packaging.requirements import Requirement

    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    asked = [(each, _version(each.name)) for each in map(Requirement, stated)]
    return [
        f"{each.name} is {found}, not {each.specifier}"
        for each, found in asked
        if found and not each.specifier.contains(found, prereleases=True)
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class _TooLong(BaseException):
    """Stops a part; no error, so that nothing on the way takes it for one."""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Stop what runs in this context, wherever it is by then; but for what waits for a device that never answers."""

    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(part: Part, setting: Setting, end: float, told: Callable[[Outcome], None] = lambda _: None) -> Outcome:
    """Run a part, whatever comes of it; ``told`` of each figure as it comes."""
    from benchmarks.gpu_setting import NoTimeLeftError
    from benchmarks.record import Outcome

    outcome, start = Outcome(part.name), time.monotonic()
    if part.name == "vllm" and _version("vllm") is None:
        outcome.status, outcome.why = "skipped", "vllm is not installed"
        return outcome
    if end - start < part.least:
        left = f"{max(0.0, end - start):.0f} s are left, and it needs {part.least:.0f}"
        outcome.status, outcome.why = "skipped", left
        return outcome
    setting.until, setting.notes = min(end, start + part.seconds), []
    most = end - start if setting.tiny else min(end - start, TOO_LONG * part.seconds)
    try:
        with stopped_after(most):
            for figure in part.run(setting):
                outcome.figures.append(figure)
                told(outcome)
    except _TooLong:
        outcome.status, outcome.why = "stopped", f"it was not over after {most:.0f} s"
    except NoTimeLeftError as error:
        setting.notes.append(str(error))
    except Exception as error:  # noqa: BLE001 - the other parts go on
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome.status = "failed"
        outcome.why = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        traceback.print_exc()
    outcome.seconds, outcome.notes = time.monotonic() - start, setting.notes
    setting.empty()
    return outcome


def record_of(outcomes: list[Outcome], setting: Setting, minutes: float) -> dict[str, Any]:
    """All that was found, and where."""
    import torch

    name = torch.cuda.get_device_name(setting.device) if setting.on_cuda else str(setting.device)
    versions = {each: found for each in WORTH if (found := _version(each))}
    if setting.on_cuda:
        versions["CUDA"] = str(torch.version.cuda)
    return {
        "device": name,
        "versions": versions,
        "minutes": minutes,
        "tiny": setting.tiny,
        "layers": setting.layers,
        "holds": all(outcome.holds for outcome in outcomes),
        "parts": [outcome.to_json() for outcome in outcomes],
    }


def run_all(arguments: argparse.Namespace) -> int:
    """Run the parts that were asked for."""
    import torch

    from benchmarks.gpu_setting import Setting
    from benchmarks.record import table
    from persona_lens.models.loading import resolve_device

    begin = time.monotonic()
    device = resolve_device(arguments.device)
    if device.type == "cuda":  # memory is counted for one of them by its number
        device = torch.device("cuda", device.index or 0)
    setting = Setting(device, arguments.tiny, arguments.layers, 1 if arguments.tiny else arguments.pairs)
    outcomes: list[Outcome] = []

    def write(running: list[Outcome]) -> dict[str, Any]:
        """After each figure: whoever stops the run has what there is."""
        record = record_of(outcomes + running, setting, arguments.minutes)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return record

    def write_with(found: Outcome) -> None:
        write([found])

    record = write([])
    print(f"{record['device']}, {record['versions']}", file=sys.stderr, flush=True)
    for part in parts():
        if arguments.only and part.name not in arguments.only:
            continue
        outcomes.append(run_part(part, setting, begin + 60 * arguments.minutes, write_with))
        record = write([])
        print(table(outcomes[-1:]), file=sys.stderr, flush=True)
    print(f"{record['device']}, {record['versions']}, {time.monotonic() - begin:.0f} s\n{table(outcomes)}")
    return 0 if record["holds"] else 1


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="auto", help="such as cuda or cuda:1; default: the GPU if there is one")
    parser.add_argument("--minutes", type=float, default=8.0, help="what all parts together may take")
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of each comparison at most")
    parser.add_argument("--layers", type=int, default=28, help="blocks of the large model; fewer for a small card")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--tiny", action="store_true", help="try the script: everything small, no limits on speed")
    parser.add_argument("--json", metavar="FILE", help="also write the results here, after each part")
    parser.add_argument("--markdown", metavar="FILE", help="only print the table of results written before")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: who asks would wait for an answer
    if missing := missing_packages():
        names = ", ".join(missing)
        print(
            f"not installed: {names}; `pip install --no-deps {' '.join(missing)}`, and persona-lens itself from here "
            "by `pip install --no-deps --editable .` or from a wheel of `make wheel`",
            file=sys.stderr,
        )
        return 2
    for line in unlike_stated():
        print(f"{line}: it goes on, but may fail for that", file=sys.stderr)
    if arguments.markdown:
        from benchmarks.record import markdown

        print(markdown(json.loads(Path(arguments.markdown).read_text(encoding="utf-8"))))
        return 0
    known = [part.name for part in parts()]
    if unknown := [name for name in arguments.only or () if name not in known]:
        parser.error(f"there is no part {', '.join(unknown)}; the parts are {', '.join(known)}")
    return run_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
