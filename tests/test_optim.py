"""The step size is a pure function of the step, with torch's own schedulers as reference."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from lit_cifar.optim import Schedule, lr_factor

SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "onecycle")


def rates(scheduler: type[lr_scheduler.LRScheduler], num_steps: int, **options: Any) -> list[float]:
    """The learning rates that a scheduler of torch's gives at steps 0 to num_steps - 1, of a base rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = scheduler(optimizer, **options)
    seen = []
    for _ in range(num_steps):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        with warnings.catch_warnings():
            # its cosine is recursive in some releases and calls its own step through a deprecated path
            warnings.simplefilter("ignore", UserWarning)
            if len(seen) < num_steps:  # OneCycleLR refuses one step too many
                schedule.step()
    return seen


@pytest.mark.parametrize("num_steps", [3, 10, 97])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.5, 0.95])
def test_onecycle_equals_torchs_at_every_step(warmup: float, num_steps: int) -> None:
    expected = rates(
        lr_scheduler.OneCycleLR, num_steps, max_lr=1.0, total_steps=num_steps, pct_start=warmup, cycle_momentum=False
    )
    given = [lr_factor(step, num_steps, "onecycle", warmup) for step in range(num_steps)]
    assert given == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_onecycle_that_only_rises_ends_at_its_peak() -> None:
    given = [lr_factor(step, 11, "onecycle", 1.0) for step in range(11)]
    assert given == sorted(given)
    assert given[0] == pytest.approx(1 / 25)
    assert given[-1] == 1


def test_cosine_equals_torchs_at_every_step() -> None:
    expected = rates(lr_scheduler.CosineAnnealingLR, 50, T_max=50)
    assert [lr_factor(step, 50, "cosine") for step in range(50)] == pytest.approx(expected, abs=1e-9)


def test_cosine_after_its_warmup_falls_over_the_steps_that_are_left() -> None:
    given = [lr_factor(step, 50, "cosine", 0.2) for step in range(10, 50)]
    assert given == pytest.approx([(1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_rises_in_equal_steps_to_the_base_rate(schedule: Schedule) -> None:
    assert [lr_factor(step, 40, schedule, 0.1) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert lr_factor(4, 40, schedule, 0.1) == 1


def test_constant_stays_at_the_base_rate() -> None:
    assert {lr_factor(step, 10) for step in range(12)} == {1.0}


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_factors_are_in_0_to_1_and_the_last_stays(schedule: Schedule, warmup: float, num_steps: int) -> None:
    given = [lr_factor(step, num_steps, schedule, warmup) for step in range(num_steps + 3)]
    assert all(0 < factor <= 1 for factor in given)
    assert set(given[num_steps:]) == {given[num_steps - 1]}
