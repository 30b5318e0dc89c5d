"""`Places`: where the tasks of a plan leave what they find, and the words of their commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from persona_lens.core.documents import read_json
from persona_lens.core.files import write_text
from persona_lens.reproduction.plan import Plan, PlanError, Reference, Task, reference_of
from persona_lens.vectors import load_vectors

STEPS, FILES = "steps", "files"
SUMMARY = "summary.json"
_BRACES = re.compile(r"\{([^{}]*)\}")
STAND_INS = {"layer": "0", "coefficient": "1"}
"""What a command that is only read has in place of what earlier steps find."""


@dataclass(frozen=True)
class Places:
    """A folder in which a plan is carried out.

    Attributes:
        plan: The plan.
        model: The model's name.
        folder: The folder.
    """

    plan: Plan
    model: str
    folder: Path

    def of(self, task: Task) -> Path:
        """What a task is told to write."""
        return self.folder / STEPS / task.name

    def record(self, task: Task) -> Path:
        """Where it stands that a task is finished, with its words and, unless it left them itself, its figures."""
        return self.folder / STEPS / f"{task.name}.json"

    def write_files(self) -> None:
        """The files of the plan, where its commands find them."""
        for name, content in self.plan.files.items():
            write_text(self.folder / FILES / name, yaml.safe_dump(content, sort_keys=False))

    def shown(self, words: Sequence[str]) -> list[str]:
        """A command as it is typed in the folder, so that what is kept of it goes wherever the folder goes."""
        return [word.replace(f"{self.folder}/", "") for word in words]

    def words(self, task: Task, *, read_only: bool = False) -> list[str]:
        """The command of a task, every word as it is typed.

        Args:
            task: The task.
            read_only: Whether to read nothing, and put anything in place of what earlier steps find.

        Raises:
            PlanError: If an earlier step left no vectors, or none that were tuned.
        """
        return [word for each in task.step.words for word in self._resolved(each, task, read_only)]

    def _resolved(self, word: str, task: Task, read_only: bool) -> Iterator[str]:
        whole = _BRACES.fullmatch(word)
        if whole and (text := self.plan.values.get(whole[1])) is not None:
            for each in shlex.split(text):
                yield from self._resolved(each, task, read_only)
        elif whole and whole[1] not in self.plan.values and word.endswith(".all}"):
            yield from (str(self.of(each)) for each in self.plan.tasks_of(reference_of(whole[1]).step))
        else:
            yield _BRACES.sub(lambda found: self._inner(found[1], task, read_only), word)

    def _inner(self, inner: str, task: Task, read_only: bool) -> str:
        if inner in ("model", "trait", "out"):
            return {"model": self.model, "trait": task.trait or "", "out": str(self.of(task))}[inner]
        if inner in self.plan.values:
            given = f"{{{inner}}}" if self.plan.values[inner] is not None else ""
            return " ".join(self._resolved(given, task, read_only))
        if inner in self.plan.files:
            return str(self.folder / FILES / inner)
        reference = reference_of(inner)
        every = self.plan.tasks_of(reference.step)
        own = next((each for each in every if each.trait in (None, task.trait)), every[0])
        if reference.what is None:
            return str(self.of(own))
        if reference.what == "all":
            raise PlanError(f"{{{inner}}} stands for several folders; make it a word of its own")
        if read_only:
            return STAND_INS.get(reference.what, "0")
        return self._found(reference, self.of(own))

    def _found(self, reference: Reference, folder: Path) -> str:
        vectors = load_vectors(folder)
        assert reference.what is not None
        if reference.what.endswith("%"):
            last = vectors.model.n_layers - 1
            return str(min(last, round(int(reference.what[:-1]) / 100 * last)))
        tuned = vectors.tuned_choice("write a layer and a coefficient into the plan")
        return str(tuned.layer) if reference.what == "layer" else f"{tuned.coefficient * reference.factor:+.4g}"


def figures_in(folder: Path) -> bool:
    """Whether a run of its own is finished there."""
    return (folder / SUMMARY).is_file()


def summary_of(folder: Path) -> dict[str, object]:
    """The figures of a finished run."""
    found: dict[str, object] = read_json(folder / SUMMARY)
    return found
