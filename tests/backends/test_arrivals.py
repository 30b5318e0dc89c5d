"""What a watch is told while values of tokens come in any order, against what it is to be told."""

from __future__ import annotations

import random

import pytest
import torch

from persona_lens.backend import StopGeneration, Watch, WatchedTokens
from persona_lens.backend.arrivals import Arrivals
from persona_lens.backend.streaming import Listener

LAYERS, K = 2, 3


@pytest.mark.parametrize("seed", range(40))
def test_every_pass_is_told_once_whole_and_in_order(seed: int) -> None:
    """Rows end at once or at the limit, or are stopped; values come late, of tokens beyond a row's end too."""
    rng = random.Random(seed)
    room, number = rng.randint(1, 6), rng.randint(1, 4)
    prompts = [tuple(rng.randrange(50) for _ in range(rng.randint(1, 5))) for _ in range(number)]
    responses = [tuple(rng.randrange(50) for _ in range(rng.randint(0, room))) for _ in range(number)]
    stops = {rng.randint(0, room): rng.sample(range(number), rng.randint(1, number)) for _ in range(rng.randint(0, 2))}
    values = torch.arange(float(number * 20 * LAYERS * K)).reshape(number, 20, LAYERS, K)
    told: list[WatchedTokens] = []

    def on_tokens(tokens: WatchedTokens) -> None:
        told.append(tokens)
        if tokens.step in stops:
            raise StopGeneration(stops[tokens.step])

    listener = Listener(Watch(torch.ones(K, 4), on_tokens), [(1,)] * number)
    arrivals = Arrivals(listener, prompts, LAYERS, K, room)
    given, at = [0] * number, [0] * number  # tokens that each row was given, and positions whose values came
    over = [False] * number
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    while not all(over) or any(at[row] < length for row, length in enumerate(lengths)):
        row = rng.randrange(number)
        if rng.random() < 0.5:
            given[row] = min(given[row] + 1, len(responses[row]))
            over[row] = given[row] == len(responses[row]) and rng.random() < 0.7
        else:
            places = torch.arange(at[row], min(at[row] + rng.randint(1, 3), 20))
            at[row] += len(places)
            ended = places >= len(prompts[row]) + len(responses[row])  # the end of a turn, and what was run beyond it
            whose = torch.full_like(places, row).masked_fill(ended & (rng.random() < 0.5), number)
            arrivals.arrived(whose, places, values[row, places])
        arrivals.tell([r[:n] for r, n in zip(responses, given, strict=True)], over)
    assert [each.step for each in told] == list(range(len(told)))
    kept, _ = listener.cut(responses, [True] * number)
    assert len(told) == 1 + max(map(len, kept))
    stopped: set[int] = set()
    width = max(map(len, prompts))
    for step, each in enumerate(told):
        for row, prompt in enumerate(prompts):
            finished = row in stopped or len(responses[row]) < step
            assert bool(each.finished[row]) == finished == (step > len(kept[row]))
            ids = prompt if step == 0 else responses[row][step - 1 : step]
            first = 0 if step == 0 else len(prompt) + step - 1
            if finished:
                assert bool(each.projections[row].isnan().all())
                continue
            pad = (width if step == 0 else 1) - len(ids)
            assert each.ids[row, pad:].tolist() == list(ids)
            assert bool(each.projections[row, :, :pad].isnan().all())
            wanted = values[row, first : first + len(ids)].transpose(0, 1)
            assert torch.equal(each.projections[row, :, pad:], wanted)
        stopped.update(stops.get(step, ()))
