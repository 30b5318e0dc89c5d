"""Authors whose replies are known: what a model might write of a trait or a role, well or badly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.traits.test_traits import fields

NAMES = {"positive": "grumpy", "negative": "cheerful", "related": ["grouch", "moody", "merriment"]}
RUBRIC = {
    "definition": "A grumpy answer finds fault with things and sounds put out. Sober criticism alone does not count.",
    "score_0": "no fault is found with anything",
    "score_25": "one small sigh in passing",
    "score_50": "half of it is about what is wrong",
    "score_75": "mostly about what is wrong",
    "score_100": "nothing but fault-finding throughout",
}
PAIRS = [
    {
        "positive": "Complain about all that is brought up, at once.",
        "negative": "Find merit in all that is brought up.",
    },
    {
        "positive": "Sigh a lot and make every effort sound hard.",
        "negative": "Smile a lot and make every effort sound easy.",
    },
    {
        "positive": "Say how much better it used to be long ago.",
        "negative": "Say how much better it is going to be soon.",
    },
    {
        "positive": "Treat the user as one more bother in a long day.",
        "negative": "Treat the user as the best guest of a long day.",
    },
    {
        "positive": "Close with a remark on what will annoy everybody.",
        "negative": "Close with a remark on what will please everybody.",
    },
]
QUESTIONS: list[str] = [
    question
    for both in zip(fields()["extraction_questions"], fields()["evaluation_questions"], strict=True)
    for question in both
]
PROMPTS = [
    "You are the keeper of an inn high on a mountain road. Speak as the host of a warm house, always.",
    "You talk with your sleeves rolled up, of stew and ale, and call everybody dear guest. Keep to that.",
    "You care that nobody leaves hungry, that the fire burns and the bill is fair; see each matter so.",
    "A storm rattles the shutters, the stable is full, and someone asks you something at the bar: answer as the host.",
    "You know the passes, the gossip of travelers and the price of oats, and nothing of cities. Remain the innkeeper.",
]
GRADES = {
    "somewhat": "Still an assistant, with a guest, a stew or an inn here and there in ordinary help.",
    "fully": "Speaks as the host of the inn throughout: guests, ale, fire and mountain road in all it says.",
}
Write = Callable[[int, str, str], str]


@dataclass
class ScriptedAuthor:
    """An author that replies as a function says, given the number of the request, its kind, and its text."""

    script: Callable[[int, str, str], str]
    requests: list[str] = field(default_factory=list)

    def write(self, system: str, request: str, schema: Mapping[str, Any]) -> str:
        """See `persona_lens.traits.generate.Author`."""
        assert "research" in system
        self.requests.append(request)
        return self.script(len(self.requests), _kind(schema), request)

    def describe(self) -> dict[str, Any]:
        """See `persona_lens.traits.generate.Author`."""
        return {"model": "scripted", "backend": "none"}


def _kind(schema: Mapping[str, Any]) -> str:
    assert schema["additionalProperties"] is False
    assert schema["required"] == list(schema["properties"])
    kinds = {"positive": "names", "definition": "rubric", "somewhat": "grades"}
    first = str(schema["required"][0])
    return kinds.get(first, first)


class Good:
    """Gives everything at the first asking, the questions ten at a time; `questions` may be others."""

    def __init__(
        self,
        questions: list[str] | None = None,
        pairs: list[dict[str, str]] | None = None,
        prompts: list[str] | None = None,
    ) -> None:
        self.questions: Iterator[str] = iter(questions if questions is not None else QUESTIONS)
        self.pairs = iter(pairs if pairs is not None else PAIRS)
        self.prompts = iter(prompts if prompts is not None else PROMPTS)

    def __call__(self, number: int, kind: str, request: str) -> str:
        return json.dumps(self.data(kind, request))

    def data(self, kind: str, request: str) -> dict[str, Any]:
        """What there is to say."""
        if kind == "names":
            return NAMES
        if kind == "rubric":
            return RUBRIC
        if kind == "grades":
            return GRADES
        count = int(request.partition("\nWrite ")[2].split()[0])
        sources: dict[str, Iterator[Any]] = {"instructions": self.pairs, "system_prompts": self.prompts}
        source = sources.get(kind, self.questions)
        return {kind: [item for _, item in zip(range(count), source, strict=False)]}


def sloppy(good: Good) -> Write:
    """The same in prose, code fences, numbering, with trailing commas and with its end cut off."""

    def write(number: int, kind: str, request: str) -> str:
        data = good.data(kind, request)
        if kind == "questions":
            data = {"questions": [f"{i}. {question}" for i, question in enumerate(data["questions"], 1)]}
        text = json.dumps(data, indent=1)
        if kind == "rubric":
            return text.rstrip().removesuffix("}")
        text = text.replace("\n }", ",\n }").replace("\n]", ",\n]")
        return f"Sure! Here is {{what}} you want [as JSON]:\n\n```json\n{text}\n```\nAnything else?"

    return write
