from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from spiralrope_cli import RopeConfig, create_model
from spiralrope_cli.core.config.option import build
from spiralrope_cli.core.config.recipes import PRETRAIN
from spiralrope_cli.core.config.training import OptimConfig
from spiralrope_cli.core.models.deit import DeiT
from spiralrope_cli.core.training.step import (
    JOINED_AT,
    LossMeter,
    TrainState,
    build_optimizer,
    lr_at,
    parameter_groups,
    set_learning_rate,
    train_step,
)

GOLDEN = Path(__file__).parents[2] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
RUNS = {run["id"]: run for run in MANIFEST["learning_rate"]}
RECIPE = build(OptimConfig, PRETRAIN)

law = settings(deadline=None, max_examples=100, derandomize=True)


def tiny_deit():
    return DeiT(64, 2, 2, rope=RopeConfig(), image_size=64, patch_size=16, num_classes=10)


def decay_by_name(model, groups):
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: decay.get(id(parameter)) for name, parameter in model.named_parameters()}


def test_what_decays_is_what_decayed_in_the_published_runs():
    model = tiny_deit()
    assert decay_by_name(model, parameter_groups(model, 0.3)) == MANIFEST["weight_decay_of"]


def test_every_parameter_stands_in_one_group():
    with torch.device("meta"):
        model = create_model("deit-ti")
    groups = parameter_groups(model, 0.1)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(map(id, model.parameters()))


def test_frozen_parameters_are_left_out():
    model = tiny_deit()
    model.blocks[0].requires_grad_(False)
    decay = decay_by_name(model, parameter_groups(model, 0.3))
    assert {name for name, value in decay.items() if value is None} == {
        name for name in decay if name.startswith("blocks.0.")
    }


def test_the_optimizer_has_the_runs_numbers():
    model = tiny_deit()
    optim = build(OptimConfig, {**PRETRAIN, "batch_size": 1024, "lr": 1e-3})
    optimizer = build_optimizer(model, optim)
    assert decay_by_name(model, optimizer.param_groups) == MANIFEST["weight_decay_of"]
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(2e-3)
        assert group["betas"] == (0.9, 0.95)


def test_decay_shrinks_matrices_and_nothing_else():
    model = tiny_deit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, build(OptimConfig, {**PRETRAIN, "weight_decay": 0.5}))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, tensor in model.state_dict().items():
        factor = 0.95 if MANIFEST["weight_decay_of"][name] else 1.0
        torch.testing.assert_close(tensor, before[name] * factor, msg=name)


# ---- the learning rate


@pytest.mark.parametrize("steps_per_epoch", [1, 7])
@pytest.mark.parametrize("name", RUNS)
def test_the_published_schedule_is_followed_epoch_by_epoch(name, steps_per_epoch):
    run = RUNS[name]
    config = run["config"]
    batch = config["batch_size_per_process"] * config["accumulation"] * config["processes"]
    optim = dataclasses.replace(
        RECIPE,
        schedule="published",
        epochs=config["epochs"],
        warmup_epochs=config["warmup_epochs"],
        warmup_lr=config["warmup_lr"],
        min_lr=config["min_lr"],
        lr=config["lr_argument"],
        lr_rule="linear" if config["scaled"] else "none",
        batch_size=batch,
    )
    assert optim.peak_lr == pytest.approx(config["peak_lr_after_scaling"], rel=1e-12)
    total = config["epochs"] * steps_per_epoch
    ours = [lr_at(step, total, steps_per_epoch, optim) for step in range(total)]
    published = [lr for lr in run["lr_used_in_epoch"] for _ in range(steps_per_epoch)]
    assert ours == pytest.approx(published, rel=1e-12, abs=0)


def test_a_published_schedule_rests_at_its_end():
    optim = dataclasses.replace(
        RECIPE, schedule="published", epochs=30, warmup_epochs=2, max_steps=90
    )
    late = [lr_at(step, optim.max_steps, 2, optim) for step in range(62, 90)]
    assert late == pytest.approx([optim.min_lr] * len(late))


@st.composite
def cosine_runs(draw):
    steps_per_epoch = draw(st.integers(1, 20))
    warmup_epochs = draw(st.integers(0, 5))
    epochs = warmup_epochs + draw(st.integers(1, 20))
    peak = draw(st.floats(1e-5, 1e-2))
    optim = dataclasses.replace(
        RECIPE,
        schedule="cosine",
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        lr=peak,
        lr_rule="none",
        min_lr=peak * draw(st.floats(0, 1)),
        warmup_lr=peak * draw(st.floats(0, 1)),
    )
    total = epochs * steps_per_epoch
    return (
        optim,
        warmup_epochs * steps_per_epoch,
        [lr_at(step, total, steps_per_epoch, optim) for step in range(total)],
    )


@law
@given(cosine_runs())
def test_cosine_starts_at_the_warmup_rate_and_reaches_the_peak_and_the_end(drawn):
    optim, warmup, rates = drawn
    assert rates[warmup] == pytest.approx(optim.peak_lr, rel=1e-12)
    if warmup:
        assert rates[0] == optim.warmup_lr
    if len(rates) - 1 > warmup:
        assert rates[-1] == pytest.approx(optim.min_lr, rel=1e-9, abs=1e-18)


@law
@given(cosine_runs())
def test_cosine_rises_in_equal_steps_and_then_only_falls(drawn):
    optim, warmup, rates = drawn
    rise = [after - before for before, after in itertools.pairwise(rates[: warmup + 1])]
    assert rise == pytest.approx([(optim.peak_lr - optim.warmup_lr) / max(warmup, 1)] * warmup)
    fall = rates[warmup:]
    assert all(after <= before for before, after in itertools.pairwise(fall))
    # Half a cosine is symmetric about its middle.
    assert [a + b for a, b in zip(fall, fall[::-1], strict=True)] == pytest.approx(
        [fall[0] + fall[-1]] * len(fall)
    )


def test_constant_is_the_peak_at_every_step():
    optim = dataclasses.replace(RECIPE, schedule="constant", lr=3e-4, lr_rule="none")
    assert {lr_at(step, 100, 10, optim) for step in range(100)} == {3e-4}


def test_the_linear_rule_goes_by_the_whole_batch():
    optim = dataclasses.replace(RECIPE, schedule="constant", lr=2e-4, batch_size=4096)
    assert lr_at(0, 10, 1, dataclasses.replace(optim, lr_rule="linear")) == pytest.approx(1.6e-3)
    assert lr_at(0, 10, 1, dataclasses.replace(optim, lr_rule="none")) == 2e-4


def test_every_group_gets_the_learning_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# ---- averaged weights


class OneParameter(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.w = nn.Parameter(values.clone())


def state_of(values, decay, **more):
    return TrainState.create(
        OneParameter(values), build(OptimConfig, {**PRETRAIN, "ema_decay": decay, **more})
    )


@pytest.mark.parametrize("decay", MANIFEST["ema_decays"])
def test_the_running_average_is_the_published_one(decay):
    tensors = load_file(GOLDEN / "optim" / "ema.safetensors")
    history = tensors["w"]
    state = state_of(history[0], decay)
    averages = [state.ema.module.w.clone()]
    for values in history[1:]:
        state.model.w.data.copy_(values)
        state.ema.update(state.model)
        averages.append(state.ema.module.w.clone())
    published = tensors[f"deit_w_{decay}"]
    torch.testing.assert_close(torch.stack(averages), published, rtol=0, atol=2e-6)


def test_the_average_starts_as_a_copy_that_wants_no_gradient():
    state = state_of(torch.tensor([1.0, 2.0]), 0.9)
    assert state.step == 0
    assert state.ema.module.w is not state.model.w
    assert torch.equal(state.ema.module.w, state.model.w)
    assert not state.ema.module.w.requires_grad
    assert state.model.w.requires_grad
    state.model.w.data.zero_()
    assert state.ema.module.w.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_decay_warms_up_by_optimizer_steps_alone(micro_batches):
    state = state_of(torch.tensor([1.0, 2.0]), 0.5, ema_warmup=True)
    average = torch.zeros(2)
    for step in range(1, 9):
        if step == 5:  # as a resumed run: step and weights are all that it has
            before = state
            state = state_of(torch.zeros(2), 0.5, ema_warmup=True)
            state.model.load_state_dict(before.model.state_dict())
            state.ema.module.load_state_dict(before.ema.module.state_dict())
            state.step = before.step
        train_step(state, state.model, [1.0] * micro_batches, lambda model, x: (x * model.w).sum())
        decay = min(0.5, 1 - step ** (-2 / 3))
        average = decay * average + (1 - decay) * state.model.w.detach()
        torch.testing.assert_close(state.ema.module.w, average)
    assert 1 - 2 ** (-2 / 3) < 0.5 < 1 - 3 ** (-2 / 3)  # both ends of the warm-up were seen


def test_a_meter_finds_the_first_bad_loss_of_many():
    meter = LossMeter(torch.device("cpu"))
    for step in range(2500):
        meter.add(step, torch.tensor(float("nan") if step in (1700, 2100) else 2.0))
    assert len(meter._losses) < JOINED_AT  # a GPU gives 512 bytes to each
    mean, first, mine = meter.read()
    assert math.isnan(mean)
    assert (first, mine) == (1700, True)
    meter.add(2500, torch.tensor(3.0))
    assert meter.read()[:2] == (3.0, None)
