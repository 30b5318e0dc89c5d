"""The nnsight backend on a real NDIF server gives the numbers that it gives here.

Both sides run in float32 and with one thread, so that the difference has to be exactly zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from persona_lens.backend import (
    Backend,
    BackendError,
    Edit,
    Generation,
    Part,
    Parts,
    Positions,
    Read,
    ReadError,
    ReadKind,
    Sampling,
    Span,
    StopGeneration,
    TokenBatch,
    Watch,
    WatchedTokens,
    open_backend,
    watched_generation,
)
from persona_lens.backend.parity import EVERYTHING, check_parity
from persona_lens.backend.verification import verify, was_verified
from tests.backends.fixtures import PROMPTS, RESPONSES, direction, matrix
from tests.ndif.server import environment
from tests.tiny import D_MODEL, N_LAYERS, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = TokenBatch.of(PROMPTS, RESPONSES)
SEEDED = Sampling(6, 1.0, 0.9, seeds=(3, 5, 7))


def remote(model: object) -> Backend:
    return open_backend("nnsight", str(model), remote=True)


def local(model: object) -> Backend:
    return open_backend("nnsight", str(model), dtype="float32", device="cpu")


def different(there: Backend, here: Backend, **options: Any) -> list[str]:
    """What the parity suite finds to be not the very same."""
    checks = check_parity(there, here, self_checks=False, **options)
    assert len(checks) > 10
    return [f"{check.name}: {check.measured:.2g}: {check.detail}" for check in checks if check.measured != 0]


def test_the_server_does_not_have_this_package(server: str) -> None:
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('persona_lens', 'jaxtyping', 'beartype')])"
    done = subprocess.run(
        [environment() / "bin" / "python", "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[None, None, None]"


@pytest.mark.parametrize(("adapter", "architecture"), matrix(adapters=["nnsight"]))
def test_numbers_are_those_of_the_model_here(server: str, models: Path, adapter: str, architecture: str) -> None:
    """Reads at every layer, log-probabilities, greedy and seeded tokens, under every kind of edit."""
    assert different(remote(models / architecture), local(models / architecture), max_new_tokens=5) == []


@pytest.mark.real
def test_numbers_of_the_embedded_model_are_those_of_the_model_here(server: str) -> None:
    assert different(remote("smollm2-135m"), local("smollm2-135m")) == []


def test_the_contract_is_kept(server: str, models: Path) -> None:
    """What a backend must agree with itself about: cached, batched, while generating, after an error."""
    checks = check_parity(remote(models / "llama"), local(models / "llama"), max_new_tokens=4)
    assert [check for check in checks if not check.passed] == []


def test_positions_masks_and_projections(server: str, models: Path) -> None:
    there, here = remote(models / "qwen2"), local(models / "qwen2")
    mask = torch.zeros(len(TEXT), max(TEXT.lengths), dtype=torch.bool)
    mask[0, -3] = mask[2, -9:] = True
    directions = torch.randn(2, 2, D_MODEL, generator=torch.Generator().manual_seed(1))
    reads = [Read.projections(directions, (0, 2)), Read(ReadKind.RESPONSE_MEAN, (1,))]
    edits = [Edit.ablate(0, direction(), mask), Edit.add(1, direction(1).requires_grad_(), -1.0, Positions.RESPONSE)]
    got, want = (backend.forward(TEXT, edits, reads, logprobs=True) for backend in (there, here))
    assert got.reads.keys() == want.reads.keys()
    assert all(torch.equal(got.reads[name].nan_to_num(), want.reads[name].nan_to_num()) for name in want.reads)
    assert got.logprobs is not None
    assert want.logprobs is not None
    assert all(map(torch.equal, got.logprobs, want.logprobs))


def test_thinking_and_answer_are_told_apart_there(server: str, models: Path) -> None:
    """The server has neither the tokenizer nor this package."""
    there, here = remote(models / "thinks"), local(models / "thinks")
    opening = here.tokenizer.get_vocab()["<think>"]
    prompts = [*PROMPTS, *((*prompt, opening) for prompt in PROMPTS)]
    sampling = Sampling(20, 1.0, seeds=tuple(range(6)))
    reads = (Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN, (0, 2)), Read(ReadKind.NORMS))
    for positions in (Positions.THINKING, Positions.ANSWER, Span(Positions.THINKING, 1, 9)):
        edits = [Edit.add(1, direction(1), -1.0, positions)]
        got, want = (backend.generate(prompts, sampling, edits, reads) for backend in (there, here))
        assert got.responses == want.responses
        text = TokenBatch.of(prompts, got.responses)
        whose = Parts.of(there.tokenizer)
        parts = [part for p, r in zip(prompts, got.responses, strict=True) for part in whose.of_response(p, r)]
        assert set(parts) == set(Part)
        again = there.forward(text, edits, reads)
        for name, value in want.reads.items():
            torch.testing.assert_close(got.reads[name], value, rtol=1e-5, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(again.reads[name], value, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert [check for check in check_parity(there, here, max_new_tokens=4) if not check.passed] == []


def test_thinking_is_limited_there(server: str, models: Path) -> None:
    """The automaton travels in plain values."""
    there, here = remote(models / "thinks"), local(models / "thinks")
    opening = here.tokenizer.get_vocab()["<think>"]
    prompts = [*PROMPTS, *((*prompt, opening) for prompt in PROMPTS)]
    reads, whose = (Read(ReadKind.THINKING_MEAN), Read(ReadKind.ANSWER_MEAN)), Parts.of(here.tokenizer)
    for budget in (0, 2):
        for seeds in (None, tuple(range(6))):
            sampling = Sampling(12, 0.0 if seeds is None else 1.0, seeds=seeds, thinking_budget=budget)
            got, want = (
                each.generate(prompts, sampling, [Edit.add(1, direction(1), -1.0)], reads) for each in (there, here)
            )
            assert got.responses == want.responses
            for name, value in want.reads.items():
                torch.testing.assert_close(got.reads[name], value, rtol=1e-5, atol=1e-5, equal_nan=True)
            spent = [whose.of_response(p, r).count(Part.THINKING) for p, r in zip(prompts, got.responses, strict=True)]
            assert max(spent) == budget


def test_a_watched_generation_is_told_once_the_result_is_here(server: str, models: Path) -> None:
    """The same passes as here, and the same stops."""
    edits = [Edit.add(1, direction(1), -1.0, Positions.GENERATING)]
    told: dict[str, list[WatchedTokens]] = {"there": [], "here": []}

    def watched(backend: Backend, passes: list[WatchedTokens]) -> Generation:
        def on_tokens(tokens: WatchedTokens) -> None:
            passes.append(tokens)
            if tokens.step == 3:
                raise StopGeneration([1])

        watch = Watch(direction()[None], on_tokens, (0, 2))
        return watched_generation(backend, PROMPTS, SEEDED, watch, edits, [Read(ReadKind.PROMPT_LAST)])

    there = watched(remote(models / "llama"), told["there"])
    here = watched(local(models / "llama"), told["here"])
    assert (there.responses, there.ended) == (here.responses, here.ended)
    assert there.reads.keys() == here.reads.keys()
    for a, b in zip(told["there"], told["here"], strict=True):
        assert (a.step, a.finished.tolist()) == (b.step, b.finished.tolist())
        torch.testing.assert_close(a.projections, b.projections, rtol=1e-5, atol=1e-5, equal_nan=True)
    watch, backend = Watch(direction()[None], print), remote(models / "llama")
    with pytest.raises(ReadError, match="takes no other; leave it out"):
        watched_generation(backend, PROMPTS, SEEDED, watch, (), [watch.read])


def test_a_model_and_its_remote_copy_are_one_model(server: str, models: Path) -> None:
    there, here = remote(models / "llama").info, local(models / "llama").info
    assert there.differences(here) == here.differences(there) == []
    assert (there.remote, there.weights, there.device, there.dtype) == (True, None, "remote", "remote")
    assert (there.n_layers, there.d_model, there.architecture) == (N_LAYERS, D_MODEL, "LlamaForCausalLM")
    assert there.differences(remote(models / "qwen2").info) != []
    assert there.differences(replace(here, revision="folder:other")) != []


def test_no_weights_are_here(server: str, models: Path) -> None:
    backend: Any = remote(models / "llama")
    backend.forward(TEXT, reads=Read.means())
    assert all(parameter.is_meta for parameter in backend.module.parameters())
    with pytest.raises(BackendError, match="weights"):
        backend.editing([])


def test_the_models_own_generation_defaults_are_overruled(server: str, tmp_path: Path) -> None:
    """A server's copy keeps them, since it belongs to all of its users."""
    model, folder = tiny_model("llama"), tmp_path / "opinionated"
    plain = remote_and_local_tokens(saved(model, tmp_path / "plain"))
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=0.3,
        top_k=2,
        repetition_penalty=5.0,
        suppress_tokens=sorted({token for row in plain[0] for token in row})[:3],
        forced_eos_token_id=7,
        no_repeat_ngram_size=1,
        min_new_tokens=3,
        eos_token_id=[2, 9],
    )
    opinionated = remote_and_local_tokens(saved(model, folder))
    assert plain[0] == plain[1]
    assert opinionated[0] == opinionated[1] == plain[0]
    assert remote(folder).end_ids == local(folder).end_ids


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def remote_and_local_tokens(folder: Path) -> list[tuple[tuple[int, ...], ...]]:
    return [backend.generate(PROMPTS, Sampling(6)).responses for backend in (remote(folder), local(folder))]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Sizes in bytes of what goes up and comes down, a request each."""
    from nnsight.intervention.backends.remote import RemoteBackend

    sizes: dict[str, list[int]] = {"up": [], "down": []}

    def noting(name: str, size: Callable[..., int]) -> None:
        original = getattr(RemoteBackend, name)

        def method(self: Any, *arguments: Any) -> Any:
            result = original(self, *arguments)
            sizes["up" if name == "_serialize" else "down"].append(size(result, *arguments))
            return result

        monkeypatch.setattr(RemoteBackend, name, method)

    noting("_serialize", lambda result, *_: len(result))
    noting("finalize", lambda _, content: len(content))
    return sizes


def test_a_batch_is_one_request_and_no_more_than_its_result_comes_back(
    server: str, models: Path, traffic: dict[str, list[int]]
) -> None:
    backend = remote(models / "llama")
    traffic.update(up=[], down=[])  # what opening the model took
    wide = direction().repeat(1000, 1)[5]  # a view of something large
    edit, read = Edit.add(1, wide), Read(ReadKind.RESPONSE_MEAN, (1,))
    backend.generate(PROMPTS, Sampling(2), [edit], [read])
    backend.generate(PROMPTS, Sampling(40), [edit], [read])
    backend.forward(TEXT, [edit], [read])
    assert len(traffic["up"]) == len(traffic["down"]) == 3
    short, long, _ = traffic["up"]
    # However many steps run, the edit is sent once; and without what it was cut from.
    assert abs(long - short) < 100
    assert max(traffic["up"]) < 40_000
    assert max(traffic["down"]) < 3 * 4 * len(PROMPTS) * (D_MODEL + 64) + 4_000


SCRIPT = """
import json, sys
wheel, checkout, folder = sys.argv[1:]
sys.path[:] = [wheel] + [p for p in sys.path if p not in (checkout, checkout + "/backends")]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch
torch.set_num_threads(1)
import persona_lens
from persona_lens.backend import Edit, Read, Sampling, TokenBatch, open_backend
prompts, responses, direction = json.loads(sys.stdin.read())
backend = open_backend("nnsight", folder, remote=True)
edits = [Edit.add(1, torch.tensor(direction))]
generated = backend.generate(prompts, Sampling(6, 1.0, 0.9, seeds=(3, 5, 7)), edits, Read.means())
read = backend.forward(TokenBatch.of(prompts, responses), edits, Read.means(), logprobs=True)
print(json.dumps([
    persona_lens.__file__,
    generated.responses,
    generated.reads["response_mean"].tolist(),
    read.reads["response_mean"].tolist(),
    [row.tolist() for row in read.logprobs],
]))
"""


def test_an_installed_wheel_works_against_a_server_without_it(server: str, models: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path))
    run(*build, str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(installed), str(wheel))
    vector = direction()
    given = json.dumps([PROMPTS, RESPONSES, vector.tolist()])
    arguments = ("-I", "-c", SCRIPT, str(installed), str(ROOT), str(models / "mistral"))
    file, tokens, generating, reading, logprobs = json.loads(run(*arguments, given=given, host=server).splitlines()[-1])
    assert Path(file).is_relative_to(installed)

    here, edits = local(models / "mistral"), [Edit.add(1, vector)]
    generated = here.generate(PROMPTS, SEEDED, edits, Read.means())
    read = here.forward(TEXT, edits, Read.means(), logprobs=True)
    assert tokens == [list(row) for row in generated.responses]
    assert generating == generated.reads["response_mean"].tolist()
    assert reading == read.reads["response_mean"].tolist()
    assert logprobs == [row.tolist() for row in read.logprobs or ()]


def run(*arguments: str, given: str = "", host: str = "") -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, *arguments],
        input=given,
        env={**environ, "NDIF_HOST": host, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


# One whose logits are its output embedding's, and one that changes them further.
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma2", marks=pytest.mark.exhaustive)])
def test_numbers_are_the_same_in_a_sandbox(sandbox_server: str, models: Path, architecture: str) -> None:
    """A process of its own runs the traces, and every value that they read or write is copied to it and back."""
    there, here = remote(models / architecture), local(models / architecture)
    edits: Sequence[Edit] = [Edit.add(1, direction()), Edit.cap(2, direction(1), 0.5, Positions.GENERATING)]
    got, want = (backend.generate(PROMPTS, SEEDED, edits, EVERYTHING) for backend in (there, here))
    assert (got.responses, got.ended) == (want.responses, want.ended)
    assert all(torch.equal(got.reads[name].nan_to_num(), want.reads[name].nan_to_num()) for name in want.reads)
    got_read, want_read = (backend.forward(TEXT, edits, EVERYTHING, logprobs=True) for backend in (there, here))
    for name in want_read.reads:
        assert torch.equal(got_read.reads[name].nan_to_num(), want_read.reads[name].nan_to_num())
    assert all(map(torch.equal, got_read.logprobs or (), want_read.logprobs or ()))


def test_edits_are_made_sure_to_act_by_three_requests(server: str, tmp_path: Path) -> None:
    there: Any = remote(saved(tiny_model(), tmp_path / "model"))
    before = there.traffic.requests
    points = verify(there)
    assert there.traffic.requests - before == 3
    names = {each.name for each in points}
    assert {"an edit that cannot be made is an error", "rows beside steered ones stay"} <= names
    assert was_verified(asdict(there.info))
