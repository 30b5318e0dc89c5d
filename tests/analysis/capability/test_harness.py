"""A backend behind the harness's model interface gives the numbers of the harness's own Hugging Face model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import persona_lens
from persona_lens.analysis import AnalysisError
from persona_lens.analysis.capability import evaluate_capability
from persona_lens.backend import Backend, Edit, Positions, Sampling, wrap_model
from persona_lens.backend.blocks import find_blocks
from tests.analysis.capability.tasks import DOCUMENTS, write_tasks
from tests.backends.fixtures import Delegating, backend_of, direction
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from persona_lens.analysis.capability.harness import BackendLM
from persona_lens.analysis.capability.scoring import (
    Continuation,
    EditedModel,
    flags_from_logprobs,
)

TEXTS = ("The sun is hot. " * 12, "Short.", "A", "Fish live in the water, " * 5)
CONTEXT = 48


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@cache
def tiny() -> tuple[Any, Any]:
    return tiny_model("llama", seed=5), tiny_tokenizer()


def both(module: Any, tokenizer: Any, **options: Any) -> tuple[Any, Any]:
    """Ours and theirs over the same module, with inputs of the same length."""
    ours = BackendLM(wrap_model(module, tokenizer), max_length=CONTEXT, **options)
    # Its cache mixes up one text that is cut into context and continuation at two places, as `pairs` has it.
    theirs = HFLM(
        pretrained=module,
        tokenizer=tokenizer,
        batch_size=3,
        max_length=ours.max_length,
        backend="causal",
        logits_cache=False,
    )
    return ours, theirs


def pairs() -> list[tuple[str, str]]:
    asked = [(each["question"], f" {choice}") for each in DOCUMENTS for choice in each["choices"]]
    return [
        *asked,
        ("", "Alone"),
        ("Trailing space ", "here"),
        ("Long before it " * 8, " ends"),
        ("The sun", " is hot"),
    ]


def close(got: list[tuple[float, bool]], want: list[tuple[float, bool]]) -> None:
    torch.testing.assert_close(
        torch.tensor([value for value, _ in got]), torch.tensor([value for value, _ in want]), rtol=1e-4, atol=1e-4
    )
    assert [flag for _, flag in got] == [flag for _, flag in want]


def greedy_requests(model: Any) -> list[Any]:
    """Continuations that greedy decoding writes, and the same with another last token."""
    contexts = [tuple(model.tok_encode(text))[-20:] for text in TEXTS]
    found = model.model.backend.generate(contexts, Sampling(7)).responses
    written = [(context, list(ids)) for context, ids in zip(contexts, found, strict=True) if ids]
    other = [(context, [*ids[:-1], (ids[-1] + 1) % 200 + 3]) for context, ids in written]
    return [(("context", "continuation"), list(context), ids) for context, ids in (*written, *other)]


def agree(ours: Any, theirs: Any) -> None:
    requests = greedy_requests(ours)
    got = ours._loglikelihood_tokens(requests)
    close(got, theirs._loglikelihood_tokens(requests, disable_tqdm=True))
    assert {flag for _, flag in got} == {True, False}
    asked = instances("loglikelihood", *pairs())
    close(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True))
    rolling = instances("loglikelihood_rolling", *[(text,) for text in TEXTS])
    torch.testing.assert_close(
        torch.tensor(ours.loglikelihood_rolling(rolling)),
        torch.tensor(theirs.loglikelihood_rolling(rolling, disable_tqdm=True)),
        rtol=1e-4,
        atol=1e-4,
    )
    # No stop string that a control token's name contains: theirs stops there too, though the text never shows it.
    options = [{"until": ["A", "7", "."], "max_gen_toks": 8}, {"until": [], "max_gen_toks": 5}]
    generating = instances("generate_until", *[(text, dict(option)) for text in TEXTS for option in options])
    theirs._max_length = CONTEXT  # here theirs counts the tokens that are generated, as ours always does
    assert ours.generate_until(generating) == theirs.generate_until(generating, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_tiny_model_gives_the_harness_s_own_numbers(batch_size: int) -> None:
    agree(*both(*tiny(), batch_size=batch_size))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_other_architectures_too(architecture: str) -> None:
    agree(*both(tiny_model(architecture, seed=5), tiny_tokenizer()))


@pytest.mark.real
@pytest.mark.exhaustive
def test_the_embedded_model_gives_the_harness_s_own_numbers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = persona_lens.models.resolve("smollm2-135m").location
    module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    agree(*both(module, AutoTokenizer.from_pretrained(folder)))


def test_a_text_that_fills_the_context_of_learned_positions_runs() -> None:
    model = BackendLM(backend_of("transformers", tiny_model("gpt2")))
    (value,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", ("word " * 300,)))
    assert model.total_length == 512
    assert value < 0


def test_edits_go_to_every_call() -> None:
    module, tokenizer = tiny()
    edit = Edit.add(1, direction(scale=2.0), positions=Positions.ALL)
    steered = BackendLM(wrap_model(module, tokenizer), edits=[edit], max_length=CONTEXT)
    theirs = HFLM(pretrained=module, tokenizer=tokenizer, max_length=CONTEXT - 1, backend="causal", logits_cache=False)
    plain = BackendLM(wrap_model(module, tokenizer), max_length=CONTEXT).loglikelihood(
        instances("loglikelihood", *pairs())
    )
    handle = find_blocks(module)[1][1].register_forward_hook(
        lambda _, __, output: (
            (output[0] + edit.direction, *output[1:]) if isinstance(output, tuple) else output + edit.direction
        )
    )
    try:
        agree_steered = theirs.loglikelihood(instances("loglikelihood", *pairs()), disable_tqdm=True)
        generated = theirs.generate_until(instances("generate_until", ("Hi", {"max_gen_toks": 7})), disable_tqdm=True)
    finally:
        handle.remove()
    got = steered.loglikelihood(instances("loglikelihood", *pairs()))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(agree_steered), rtol=1e-4, atol=1e-4)
    assert abs(got[0][0] - plain[0][0]) > 0.1
    assert steered.generate_until(instances("generate_until", ("Hi", {"max_gen_toks": 7}))) == generated


def test_an_edit_for_the_rows_of_one_batch_is_refused() -> None:
    module, tokenizer = tiny()
    with pytest.raises(AnalysisError, match="fits one batch only"):
        BackendLM(wrap_model(module, tokenizer), edits=[Edit.add(1, direction(), torch.ones(4))])


def test_flags_are_read_off_only_where_the_probabilities_decide() -> None:
    rows = [Continuation((1,), (2, 3)), Continuation((1,), (4,)), Continuation((1,), (5,)), Continuation((9,), (4,))]
    logs = torch.log(torch.tensor([0.6, 0.5, 0.2, 0.1, 0.3])).tolist()
    values = [[logs[0], logs[1]], [logs[2]], [logs[3]], [logs[4]]]
    # 2 is the likeliest after 1, but 3 after it has exactly half; 4 and 5 are less likely than 2; 4 after 9 is alone.
    assert flags_from_logprobs(rows, values) == [None, False, False, None]
    values[0][1] = logs[0]
    assert flags_from_logprobs(rows, values)[0] is True


class _Counting(Delegating):
    generated = 0

    def generate(self, prompts: Any, *others: Any, **options: Any) -> Any:
        self.generated += len(prompts)
        return super().generate(prompts, *others, **options)


def test_what_stays_open_is_decided_by_generating_and_nothing_else_is() -> None:
    backend = _Counting(wrap_model(*tiny()))
    rows = [Continuation((10, 11, 12), (token,)) for token in range(3, 60)]
    logprobs = EditedModel(backend).logprobs(rows)
    flags = EditedModel(backend).greedy_flags(rows, logprobs)
    best = int(torch.tensor([each[0] for each in logprobs]).argmax())
    assert sum(flags) <= 1
    assert all(not flag for index, flag in enumerate(flags) if index != best)
    assert backend.generated == 1  # one context


@pytest.mark.parametrize("ends", [(2,), (1, 2)])
def test_a_continuation_that_ends_the_turn(ends: tuple[int, ...]) -> None:
    backend = Delegating(wrap_model(*tiny()))
    backend.inner.end_ids = ends  # type: ignore[misc]
    backend.end_ids = ends
    vocab = len(tiny_tokenizer())
    for prompt in ((20, 5), (33, 40, 8)):
        every = [Continuation(prompt, (token,)) for token in range(vocab)]
        values = [each[0] for each in EditedModel(backend).logprobs(every)]
        rows = [every[end] for end in ends]
        flags = [EditedModel(backend).greedy_flags([row], [[values[row.tokens[0]]]])[0] for row in rows]
        assert flags == [values.index(max(values)) == end for end in ends]
    with pytest.raises(AnalysisError, match="goes on after an end-of-turn token"):
        EditedModel(backend).greedy_flags([Continuation((5, 6), (2, 7))], [[-1.0, -1.0]])


def test_sampling_has_a_seed_a_row() -> None:
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "top_p": 0.9}
    asked = instances("generate_until", ("Hi", dict(options)), ("Hi", dict(options)), ("Ho there", dict(options)))
    module, tokenizer = tiny()
    texts = [
        BackendLM(wrap_model(module, tokenizer), seed=s, batch_size=n).generate_until(asked)
        for s, n in ((0, 1), (0, 8), (1, 8))
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"do_sample": True}, "temperature above 0"),
        ({"max_gen_toks": 600}, "600 new tokens leave no room"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 5}, "top_k=5"),
    ],
)
def test_generation_that_a_backend_does_not_have_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(AnalysisError, match=words):
        BackendLM(wrap_model(*tiny())).generate_until(instances("generate_until", ("Hi", options)))


def test_continuations_that_cannot_be_scored_are_refused() -> None:
    model = BackendLM(wrap_model(*tiny()), max_length=8)
    with pytest.raises(AnalysisError, match="no tokens of its own"):
        model.loglikelihood(instances("loglikelihood", ("Hi", "")))
    with pytest.raises(AnalysisError, match="does not fit the model's 8"):
        model.loglikelihood(instances("loglikelihood", ("Hi", " much too long for it")))


def test_chats_are_written_by_the_template() -> None:
    module, tokenizer = tiny()
    ours, theirs = both(module, tokenizer)
    chat = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.chat_template(True) == theirs.chat_template(True) == tokenizer.chat_template
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(AnalysisError, match="has no chat template"):
        BackendLM(wrap_model(module, bare)).apply_chat_template(chat)


def test_tasks_of_every_kind_give_the_harness_s_own_results(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = write_tasks(tmp_path)
    module, tokenizer = tiny()
    ours = evaluate_capability(wrap_model(module, tokenizer), names, include_path=tmp_path, num_fewshot=1, limit=3)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = HFLM(pretrained=module, tokenizer=tokenizer, backend="causal", max_length=511)
    want = simple_evaluate(
        theirs,
        tasks=list(names),
        task_manager=manager,
        num_fewshot=1,
        limit=3,
        fewshot_random_seed=0,
        bootstrap_iters=0,
    )
    assert want is not None
    for name in names:
        got = ours[name]
        assert (got.samples, got.available, got.num_fewshot) == (3, 4, 1)
        assert got.metrics
        for metric in got.metrics:
            assert metric.value == pytest.approx(want["results"][name][f"{metric.name},{metric.filter}"], rel=1e-4)
    accuracy = ours["local_choice"].metric("acc")
    assert ours["local_choice"].version == "2.0"
    assert accuracy.stderr is not None
    assert accuracy.higher_is_better
    assert sum(accuracy.scores) / 3 == pytest.approx(accuracy.value)


def test_a_backend_of_another_library_can_be_measured(tmp_path: Path) -> None:
    name, *_ = write_tasks(tmp_path)
    module = tiny()[0]
    backends: list[Backend] = [backend_of(adapter, module) for adapter in ("transformers", "nnsight")]
    first, second = (evaluate_capability(each, [name], include_path=tmp_path) for each in backends)
    assert first.tasks == second.tasks
