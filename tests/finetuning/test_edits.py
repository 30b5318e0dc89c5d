"""`TrainingEdits` and `PreventativeSteering`: where edits act, when, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from persona_lens.backend import Edit, EditError, Operation, Positions, Schedule
from persona_lens.backend.blocks import UnsupportedModelError, bare_model, find_blocks
from persona_lens.finetuning import FinetuningError, PreventativeSteering, TrainingEdits
from tests.tiny import D_MODEL, tiny_model

IDS = torch.tensor([[5, 9, 40, 17, 23, 8], [11, 12, 13, 14, 15, 16]])


def direction(seed: int = 0) -> Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def residuals(model: Any, layer: int, **inputs: Any) -> Tensor:
    """The output of a block, as what follows it sees it."""
    kept: list[Tensor] = []
    following = find_blocks(bare_model(model))[1][layer + 1]
    handle = following.register_forward_pre_hook(lambda _, args, kwargs: kept.append(args[0]), with_kwargs=True)
    try:
        with torch.no_grad():
            model(input_ids=IDS, **inputs)
    finally:
        handle.remove()
    return kept[0]


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_training_forwards_are_edited_and_others_are_not() -> None:
    model: Any = tiny_model()
    before = residuals(model, 0)
    with TrainingEdits(model, [Edit.add(0, direction(), 2.0)]) as training:
        assert training.is_open
        model.train()
        torch.testing.assert_close(residuals(model, 0), before + 2 * direction())
        model.eval()
        assert torch.equal(residuals(model, 0), before)
        model.train()
    assert torch.equal(residuals(model, 0), before)
    assert hooks(model) == 0


def test_several_signed_edits_act_in_their_order() -> None:
    model = tiny_model().train()
    before = residuals(model, 0)
    edits = [Edit.add(0, direction(), 1.5), Edit.add(0, direction(1), -0.5), Edit.ablate(0, direction(2))]
    with TrainingEdits(model, edits):
        after = residuals(model, 0)
    moved = before + 1.5 * direction() - 0.5 * direction(1)
    unit = direction(2) / direction(2).norm()
    ablated = moved - (moved @ unit).unsqueeze(-1) * unit
    torch.testing.assert_close(after[:, 1:], ablated[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[:, 0], moved[:, 0], rtol=1e-4, atol=1e-4)  # an attention sink


def test_increments_at_all_layers_add_up(vectors: Any) -> None:
    from persona_lens.steering import Steering

    steering = Steering.parse("impolite@all:increments(+2)", vectors)
    assert [edit.layer for edit in steering.edits()] == [0, 1, 2]
    total = sum(edit.coefficient * edit.direction for edit in steering.edits())
    torch.testing.assert_close(total, 2 * vectors[2])
    model = tiny_model().train()
    with TrainingEdits(model, steering) as training:
        assert training.edits == steering.edits()
        assert hooks(model) == 3


def test_schedules_count_optimizer_steps() -> None:
    model = tiny_model().train()
    before = residuals(model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    edit = Edit(0, direction(), coefficient=2.0, schedule=Schedule(((0, 1.0), (4, 0.0))))
    seen = []
    with TrainingEdits(model, [edit], optimizer=optimizer) as training:
        for _ in range(6):
            # Two forwards to a step: accumulation does not count.
            residuals(model, 0)
            moved = residuals(model, 0) - before
            seen.append(float((moved[0, 0] @ direction()) / direction().square().sum()))
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert training.step == 6
    assert seen == pytest.approx([2, 1.5, 1, 0.5, 0, 0], abs=1e-5)
    before_step = training.step
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert training.step == before_step  # the optimizer is let go of, too


def test_gradients_through_edits_are_those_of_finite_differences() -> None:
    """In float64 all through, with respect to a parameter before the edits and one behind them."""
    model: Any = tiny_model("gpt2").double().train().requires_grad_(False)  # its norms do not compute in float32
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    edits = [Edit.add(0, direction().double(), 0.7), Edit.ablate(1, direction(1).double())]
    names = ("transformer.h.0.mlp.c_proj.bias", "transformer.h.2.mlp.c_proj.bias")

    def loss(before: Tensor, behind: Tensor) -> Tensor:
        replaced = dict(zip(names, (before, behind), strict=True))
        logits: Tensor = torch.func.functional_call(model, replaced, (), {"input_ids": IDS}).logits
        return -logits[:, :-1].log_softmax(dim=-1).gather(2, IDS[:, 1:, None]).mean()

    parameters = dict(model.named_parameters())
    inputs = tuple(parameters[name].detach().clone().requires_grad_() for name in names)
    with TrainingEdits(model, edits):
        assert torch.autograd.gradcheck(loss, inputs, eps=1e-5, atol=1e-7, rtol=1e-4)
        edited = torch.autograd.grad(loss(*inputs), inputs)
    unedited = torch.autograd.grad(loss(*inputs), inputs)
    for a, b in zip(edited, unedited, strict=True):
        assert float((a - b).abs().max()) > 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_under_the_same_edits(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with TrainingEdits(model, [Edit.add(0, direction(), 2.0), Edit.ablate(1, direction(1))]):
            model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([parameter.grad for parameter in model.model.layers.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_autocast_and_bfloat16_weights_train_under_edits() -> None:
    model: Any = tiny_model()
    model = model.to(torch.bfloat16).train()
    with TrainingEdits(model, [Edit.add(1, direction(), 2.0)]):
        assert residuals(model, 1).dtype is torch.bfloat16
        model(input_ids=IDS, labels=IDS).loss.backward()
    wide = tiny_model().train()
    with TrainingEdits(wide, [Edit.add(1, direction(), 2.0)]), torch.autocast("cpu", torch.bfloat16):
        loss = wide(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in wide.model.layers.parameters())


class Wrapping(nn.Module):
    """As DistributedDataParallel and FullyShardedDataParallel hold a model."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_wrapped_models_are_unwrapped() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    adapted: Any = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert bare_model(Wrapping(model)) is model
    assert bare_model(Wrapping(Wrapping(adapted))) is adapted.get_base_model()
    wrapped = Wrapping(adapted).train()
    before = residuals(wrapped, 0)
    with TrainingEdits(wrapped, [Edit.add(0, direction())]):
        torch.testing.assert_close(residuals(wrapped, 0), before + direction())


def test_one_process_of_ddp_trains_under_edits(tmp_path: Path) -> None:
    """DistributedDataParallel itself, in a group of one: hooks act, and gradients are those without it."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    edits = [Edit.add(0, direction(), 2.0)]
    alone: Any = tiny_model().train()
    with TrainingEdits(alone, edits):
        alone(input_ids=IDS, labels=IDS).loss.backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model: Any = tiny_model().train()
        wrapped = DistributedDataParallel(model)
        with TrainingEdits(wrapped, edits):
            wrapped(input_ids=IDS, labels=IDS).loss.backward()
    finally:
        dist.destroy_process_group()
    for a, b in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (Edit.add(7, direction()), EditError, "layer 7 does not exist"),
        (Edit.add(0, direction(), 1.0, Positions.RESPONSE), EditError, "cannot tell prompt from response"),
        (
            Edit(0, direction(), Operation.ABLATE, schedule=Schedule(((0, 1.0), (5, 1.5)))),
            FinetuningError,
            r"schedule\(0:1 5:1.5\) takes ablate out of its range",
        ),
    ],
)
def test_what_training_cannot_do_is_refused(edit: Edit, error: type[Exception], message: str) -> None:
    model = tiny_model()
    with pytest.raises(error, match=message):
        TrainingEdits(model, [edit])
    assert hooks(model) == 0


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in IDS for _ in range(3)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-3, **options,
    )  # fmt: skip


class Looking(TrainerCallback):
    """Notes whether training and evaluation forwards are edited."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.seen: list[tuple[int, bool]] = []
        self.crash_at = crash_at

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seen.append((hooks(given["model"]), given["model"].training))
        if state.global_step == self.crash_at:
            raise LookupError("on purpose")


def test_a_trainer_trains_under_the_edits_and_is_without_them_afterwards(tmp_path: Path) -> None:
    model, looking = tiny_model(), Looking()
    with PreventativeSteering([Edit.add(0, direction(), 2.0)]) as prevention:
        Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[prevention, looking]).train()
        assert hooks(model) == 0  # as soon as training is over
    assert looking.seen == [(1, True)] * 3


@pytest.mark.parametrize("where", ["callback", "forward"])
def test_a_crash_in_training_leaves_no_hook(tmp_path: Path, where: str) -> None:
    model: Any = tiny_model()
    looking = Looking(crash_at=2 if where == "callback" else None)
    data: list[Any] = rows() if where == "callback" else [{"input_ids": IDS[0], "labels": IDS[0, :3]}] * 4
    with pytest.raises((LookupError, ValueError)), PreventativeSteering([Edit.add(0, direction(), 2.0)]) as prevention:
        Trainer(model, arguments(tmp_path), train_dataset=data, callbacks=[prevention, looking]).train()
    assert hooks(model) == 0
    assert not prevention._open


def test_training_outside_the_context_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    prevention = PreventativeSteering([Edit.add(0, direction(), 2.0)])
    with pytest.raises(FinetuningError, match="train inside the steering"):
        Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[prevention]).train()
    assert hooks(model) == 0


def test_trl_trains_under_the_edits(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from tests.tiny import tiny_tokenizer

    data = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go away"}]}] * 4
    )
    model, looking = tiny_model(), Looking()
    options = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    with PreventativeSteering([Edit.add(0, direction(), 2.0)]) as prevention:
        trainer = trl.SFTTrainer(
            model, options, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[prevention, looking]
        )
        trainer.train()
    assert [hooked for hooked, _ in looking.seen] == [1, 1]
    assert hooks(model) == 0


def test_a_block_that_training_never_ran_is_an_error() -> None:
    model: Any = tiny_model().train()
    with TrainingEdits(model, [Edit.add(1, direction())]):
        pass  # nothing was trained, nothing is missing
    training = TrainingEdits(model, [Edit.add(0, direction()), Edit.add(1, direction())])
    model.model.layers = nn.ModuleList([model.model.layers[0], model.model.layers[2]])
    training.open()
    model(input_ids=IDS)
    with pytest.raises(UnsupportedModelError, match="without its block 1"):
        training.close()
    assert hooks(model) == 0
