"""`Counts`: what one kind of attack tried, and where the project did not keep its promises."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counts:
    """How many attacks were made, by what they were aimed at, and the failures in words.

    Attributes:
        tried: Attacks by target, in the order they were made.
        failures: One line for each promise that was not kept, with all that repeats it.
    """

    tried: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, target: str, failure: str | None = None) -> None:
        """Count one attack on a target, and its failure if it had one."""
        self.tried[target] = self.tried.get(target, 0) + 1
        if failure is not None:
            self.failures.append(f"{target}: {failure}")

    @property
    def total(self) -> int:
        """Attacks on all targets."""
        return sum(self.tried.values())
