"""Optimisers and schedulers that people name: any of torch, their own, Muon beside one; each resumes to the bit."""

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import SHORT, error_of, results
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from test_module import Data
from test_optim import train
from torch import nn
from torch.optim import lr_scheduler

import lit_cifar.fit
import lit_cifar.test
from lit_cifar.cli.command import CLI
from lit_cifar.cli.machine import explained
from lit_cifar.model.chosen import make_optimizer
from lit_cifar.model.module import LitClassifier
from lit_cifar.model.optim import Group
from lit_cifar.run.read import read_checkpoint
from lit_cifar.run.trust import check_trusted
from lit_cifar.run.write import plain
from lit_cifar.text import as_said

LIMITS = ["--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
FEW = [*SHORT[: SHORT.index("--lr")], *LIMITS, "--log_level", "warning"]  # without the rate
RUNS = Path("lightning_logs")
AdamW = torch.optim.AdamW
OF_TORCH = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
}
FEW_EVALUATIONS: dict[str, dict[str, Any]] = {"LBFGS": {"max_iter": 3}}
GROUPS = [Group("filters", r"1\.weight", "muon", lr=0.1, momentum=0.6), Group("rest", "")]


class Validated(Data):
    """Every training image is a validation image too."""

    def val_dataloader(self) -> Any:
        return self.test_dataloader()


def matrices() -> nn.Module:
    """A net without biases, which all optimisers take, torch's Muon too."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8, bias=False), nn.ReLU(), nn.Linear(8, 10, bias=False))


class SaveAt(Checkpoint):
    """Saves a state after so many steps, in the middle of an epoch, and one at its end, after what others do there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint("epoch.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint("saved.ckpt")


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 3, **options},
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def fitted(module: LitClassifier, *callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> Trainer:
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, datamodule=Validated(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def assert_resumes_to_the_bit(make: Callable[[], LitClassifier]) -> None:
    """A run of 18 steps, and those that go on from its 8th, within the second epoch, and from that epoch's end, end
    alike."""
    whole = make()
    trainer = fitted(whole, SaveAt(8))
    assert not whole.net[1].weight.equal(matrices()[1].weight)  # type: ignore[index]
    for state in ("saved.ckpt", "epoch.ckpt"):
        resumed = make()
        read_checkpoint(Path(state))
        again = fitted(resumed, ckpt_path=state)
        assert again.global_step == trainer.global_step == 18
        for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert one.equal(other)
        rates = [[group["lr"] for group in each.optimizers[0].param_groups] for each in (trainer, again)]
        assert rates[0] == rates[1]


# ---- each resumes to the bit ----


@pytest.mark.parametrize("name", OF_TORCH)
def test_every_optimiser_of_torch_resumes_to_the_bit(name: str) -> None:
    optimizer = functools.partial(OF_TORCH[name], **FEW_EVALUATIONS.get(name, {}))
    assert_resumes_to_the_bit(lambda: LitClassifier(matrices(), optimizer=optimizer))


@pytest.mark.parametrize(
    "groups", [None, [Group("first", r"1\.", lr=0.01, weight_decay=0.3), Group("rest", "")], GROUPS]
)
@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
def test_adamw_with_groups_muon_and_our_schedules_resumes_to_the_bit(groups: Any, schedule: Any) -> None:
    warmup = 0.3 if schedule == "onecycle" else 0.0
    assert_resumes_to_the_bit(
        lambda: LitClassifier(matrices(), optimizer=AdamW, groups=groups, schedule=schedule, warmup=warmup)
    )


@pytest.mark.parametrize("name", ["LBFGS", "Adagrad", "SGD"])
def test_muon_beside_others_resumes_to_the_bit(name: str) -> None:
    optimizer = functools.partial(OF_TORCH[name], **FEW_EVALUATIONS.get(name, {}))
    assert_resumes_to_the_bit(lambda: LitClassifier(matrices(), optimizer=optimizer, groups=GROUPS))


SCHEDULERS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 1},
    "MultiStepLR": {"milestones": [1, 2]},
    "ConstantLR": {"total_iters": 2},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.5},
    "CosineAnnealingLR": {"T_max": 3, "eta_min": 1e-4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "PolynomialLR": {},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.01, "step_size_up": 4},
    "OneCycleLR": {"max_lr": 0.01},
    "ReduceLROnPlateau": {"patience": 0, "threshold": 10.0},
    "LambdaLR": {"lr_lambda": lambda epoch: 0.5**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.5},
}


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize("interval", ["epoch", pytest.param("step", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_resumes_to_the_bit(name: str, interval: Any) -> None:
    made: dict[str, Any] = {"scheduler": functools.partial(getattr(lr_scheduler, name), **SCHEDULERS[name])}
    if name == "ReduceLROnPlateau" and interval == "step":
        made["scheduler_monitor"] = "train/loss"  # a validation's values change with epochs only
    assert_resumes_to_the_bit(lambda: LitClassifier(matrices(), optimizer=AdamW, scheduler_interval=interval, **made))


def test_a_plateau_of_steps_is_told_the_loss_of_each_and_resumes_to_the_bit() -> None:
    def make() -> LitClassifier:
        scheduler = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0, factor=0.9)
        made: dict[str, Any] = {"scheduler": scheduler, "scheduler_interval": "step"}
        return LitClassifier(matrices(), lr=0.1, scheduler_monitor="train/loss", **made)

    assert_resumes_to_the_bit(make)
    (group,) = torch.load("epoch.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(0.1 * 0.9**12)


def sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts: list[Any] = [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


def chain(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)])


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # of torch 2.8's own SequentialLR
@pytest.mark.parametrize("scheduler", [sequence, chain])
@pytest.mark.parametrize("optimizer", [None, AdamW])
def test_schedulers_of_schedulers_resume_to_the_bit_in_python(scheduler: Any, optimizer: Any) -> None:
    assert_resumes_to_the_bit(
        lambda: LitClassifier(matrices(), optimizer=optimizer, scheduler=scheduler, scheduler_interval="step")
    )


def test_all_of_torchs_schedulers_are_among_these() -> None:
    made = {"LRScheduler", "SequentialLR", "ChainedScheduler"}
    assert set(lr_scheduler.__all__) == made | set(SCHEDULERS)


class OneByOne(torch.optim.SGD):
    """A class of one's own, whose rate must be given, and which keeps a count in its groups."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["count"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] += 1
            group["weight_decay"] = 0.01 * group["count"]
        return super().step(closure)


def test_an_optimiser_of_ones_own_keeps_what_it_counts() -> None:
    assert_resumes_to_the_bit(lambda: LitClassifier(matrices(), lr=0.05, optimizer=OneByOne))


# ---- what is trained with ----


@pytest.mark.parametrize(
    ("settings", "lr"),
    [
        ({}, 0.001),
        ({"lr": 0.2}, 0.2),
        ({"optimizer": torch.optim.Adadelta}, 1.0),
        ({"optimizer": functools.partial(torch.optim.Adadelta, lr=0.5)}, 0.5),
        ({"optimizer": torch.optim.Adadelta, "lr": 0.2}, 0.2),
        ({"optimizer": lambda parameters: AdamW(parameters, lr=0.3)}, 0.3),
        ({"optimizer": AdamW, "groups": GROUPS}, 0.001),
        ({"scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.4)}, 0.4),
        ({"optimizer": AdamW, "scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=[0.4, 0.1])}, 0.4),
    ],
)
def test_there_is_one_base_rate_and_it_is_a_number(settings: dict[str, Any], lr: float) -> None:
    module = LitClassifier(matrices(), **settings)
    assert type(module.lr) is float
    assert module.lr == lr
    module._trainer = trainer_of()
    if "scheduler" not in settings:
        optimizer: Any = module.configure_optimizers()
        assert optimizer.param_groups[-1]["lr"] == lr


def test_settings_that_an_optimiser_has_are_applied_and_others_left_as_they_are() -> None:
    module = LitClassifier(matrices(), optimizer=functools.partial(AdamW, betas=(0.8, 0.9)), weight_decay=0.2)
    (group,) = module._make().param_groups
    assert (group["weight_decay"], group["betas"], group["name"]) == (0.2, (0.8, 0.9), "net")
    (group,) = LitClassifier(matrices(), optimizer=AdamW)._make().param_groups
    assert group["weight_decay"] == 0.01, "which is its own"
    module = LitClassifier(matrices(), optimizer=torch.optim.RMSprop, momentum=0.7)
    assert module._make().param_groups[0]["momentum"] == 0.7


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    first, *others = parameters
    return AdamW([{"params": [first], "lr": 0.5}, {"params": others}], lr=0.02)


def test_groups_that_a_callable_made_itself_keep_their_own_rates() -> None:
    rates = [group["lr"] for group in LitClassifier(matrices(), optimizer=two_groups)._make().param_groups]
    assert rates == [0.5, 0.02]
    groups = LitClassifier(matrices(), optimizer=two_groups, schedule="cosine")._make().param_groups
    assert [group["name"] for group in groups] == ["group0", "group1"]


def test_muon_beside_adamw_takes_the_steps_of_each_alone() -> None:
    options = [{"name": "f", "lr": 0.1, "momentum": 0.6, "weight_decay": 0.0, "nesterov": True}]
    options += [{"name": "rest", "lr": 0.01, "momentum": None, "weight_decay": 0.1, "nesterov": None}]
    groups = [Group("f", "weight", "muon"), Group("rest", "")]

    def net() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))

    whole = net()
    both = make_optimizer(whole, groups, options, False, AdamW)
    assert [group["name"] for group in both.param_groups] == ["f", "rest"]
    train(whole, both, 1)
    alone = net()
    named = dict(alone.named_parameters())
    rest = AdamW([named["0.bias"], named["2.bias"]], lr=0.01, weight_decay=0.1)
    train(alone, rest, 1)
    muon = make_optimizer(net(), groups, [options[0], {**options[1], "momentum": 0.0, "nesterov": False}], False)
    muon.param_groups[0]["params"][:] = [named["0.weight"], named["2.weight"]]
    muon.param_groups[1]["params"][:] = []
    muon.step()
    for one, other in zip(whole.parameters(), alone.parameters(), strict=True):
        assert one.equal(other)


def test_onecycle_is_planned_for_the_steps_of_the_run() -> None:
    module = LitClassifier(matrices(), scheduler=functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1))
    trainer = fitted(module)
    (config,) = trainer.lr_scheduler_configs
    assert config.interval == "step"
    assert config.scheduler.total_steps == 18  # type: ignore[union-attr]


@pytest.mark.parametrize("every", [1, 2])
def test_a_plateau_is_followed_as_often_as_there_is_a_validation(every: int) -> None:
    scheduler = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0)
    module = LitClassifier(matrices(), lr=0.1, scheduler=scheduler)
    trainer = fitted(module, max_epochs=4, check_val_every_n_epoch=every)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1 ** (4 // every))


class SaveBefore(Checkpoint):
    """Saves states in the first epoch's last step, before and in the validation that follows it."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint("step.ckpt")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint("validation.ckpt")


def plateau(monitor: str) -> LitClassifier:
    scheduler = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0)
    return LitClassifier(matrices(), lr=0.1, scheduler=scheduler, scheduler_monitor=monitor)


def test_a_state_of_an_epochs_last_step_goes_on_with_the_rate_of_a_plateau() -> None:
    whole = plateau("val/loss")
    trainer = fitted(whole, SaveBefore())
    for state in ("step.ckpt", "validation.ckpt"):
        resumed = plateau("val/loss")
        again = fitted(resumed, ckpt_path=state)
        rates = [each.optimizers[0].param_groups[0]["lr"] for each in (trainer, again)]
        assert rates == [pytest.approx(1e-4)] * 2
        assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


class SaveAround(Checkpoint):
    """Saves states around a validation after the fourth of six batches: before it, in it, and a batch later."""

    def __init__(self, saves: bool) -> None:
        self.saves = saves
        self.validated: list[int] = []  # after these steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.saves and trainer.global_step in (4, 5):
            trainer.save_checkpoint(f"step-{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.validated.append(trainer.global_step)
        if self.saves and trainer.global_step == 4:
            trainer.save_checkpoint("within.ckpt")


def test_a_validation_within_an_epoch_is_neither_lost_nor_forgotten() -> None:
    whole, seen = plateau("val/loss"), SaveAround(saves=True)
    trainer = fitted(whole, seen, val_check_interval=4)
    assert seen.validated == [4, 10, 16]
    for state, validated in (("step-4", [4, 10, 16]), ("within", [10, 16]), ("step-5", [10, 16])):
        resumed, again = plateau("val/loss"), SaveAround(saves=False)
        end = fitted(resumed, again, ckpt_path=f"{state}.ckpt", val_check_interval=4)
        assert again.validated == validated
        rates = [each.optimizers[0].param_groups[0]["lr"] for each in (trainer, end)]
        assert rates == [pytest.approx(1e-4)] * 2, "the rate falls at each epoch's end"
        assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_a_state_before_what_a_plateau_follows_in_training_is_refused() -> None:
    fitted(plateau("train/loss"), SaveBefore())
    for state in ("step.ckpt", "validation.ckpt"):
        message = error_of(lambda state=state: fitted(plateau("train/loss"), ckpt_path=state))  # type: ignore[misc]
        assert message.startswith("the state was saved in an epoch's last step, before train/loss was there")


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"optimizer": AdamW}, {}, "was trained with the optimizer AdamW, and this module has SGD or Muon of its own"),
        ({}, {"optimizer": AdamW}, "was trained with SGD or Muon of its own, and this module has the optimizer AdamW"),
        ({"optimizer": AdamW}, {"optimizer": torch.optim.Adam}, "AdamW, and this module has the optimizer Adam:"),
        (
            {"groups": [Group("first", r"1\."), Group("rest", "")]},
            {},
            "the parameter groups first, rest, and this module has the parameter groups net:",
        ),
        ({"scheduler": lr_scheduler.ConstantLR}, {"scheduler": lr_scheduler.LinearLR}, "the scheduler ConstantLR, and"),
    ],
)
def test_a_checkpoint_of_another_kind_of_optimiser_is_refused_in_one_line(before: Any, now: Any, message: str) -> None:
    trainer = fitted(LitClassifier(matrices(), **before), max_epochs=1)
    trainer.save_checkpoint("a.ckpt")
    module = LitClassifier(matrices(), **now)
    assert message in error_of(lambda: fitted(module, ckpt_path="a.ckpt", max_epochs=2))
    trainer.test(module, datamodule=Validated(), ckpt_path="a.ckpt", weights_only=True, verbose=False)


class OwnOptimizer(LitClassifier):
    """A subclass with an optimiser of its own."""

    def configure_optimizers(self) -> Any:
        first, *others = self.net.parameters()
        optimizer = AdamW([{"params": [first], "lr": 0.5}, {"params": others}], lr=0.02, weight_decay=0.7)
        return {"optimizer": optimizer}


class OwnScheduler(OwnOptimizer):
    """A subclass with an optimiser and a scheduler of its own."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()["optimizer"]
        cycle = lr_scheduler.OneCycleLR(optimizer, [0.5, 0.02], total_steps=18)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


@pytest.mark.parametrize("kind", [OwnOptimizer, OwnScheduler])
def test_a_subclass_with_its_own_configure_optimizers_is_left_alone(kind: type[LitClassifier]) -> None:
    class Starts(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append([{**group, "params": None} for group in trainer.optimizers[0].param_groups])

    seen: list[Any] = []
    module: Any = kind(matrices(), lr=0.3, momentum=0.8)
    trainer = trainer_of(Starts())
    module._trainer = trainer
    expected = [{**group, "params": None} for group in module.configure_optimizers()["optimizer"].param_groups]
    trainer.fit(module, datamodule=Validated())
    assert seen == [expected]
    assert module.lr == 0.3
    assert_resumes_to_the_bit(lambda: kind(matrices()))


class OwnRate(LitClassifier):
    """A subclass whose own optimiser takes the rate of LitClassifier, and nothing else of it."""

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=self.lr)


class Calling(LitClassifier):
    """A subclass that changes what LitClassifier's own configure_optimizers gives."""

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()


def test_settings_that_a_subclass_with_its_own_optimiser_ignores_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    for key, given in (("optimizer", AdamW), ("scheduler", lr_scheduler.ConstantLR)):
        options: dict[str, Any] = {key: given}
        message = error_of(lambda options=options: OwnRate(matrices(), **options))  # type: ignore[misc]
        assert message.startswith(f"{key} has no effect: OwnRate makes its own optimizer in configure_optimizers")
        Calling(matrices(), **options)
    OwnRate(matrices(), lr=0.1)
    assert capsys.readouterr().err == ""
    OwnRate(matrices(), lr=0.1, momentum=0.5, schedule="cosine")
    line = capsys.readouterr().err
    assert line.startswith("lit_cifar: warning: momentum, schedule may have no effect: OwnRate makes its own optimizer")
    flags = ["--model", "test_optimisers.OwnRate", "--model.optimizer", "AdamW"]
    assert "--model.optimizer has no effect: OwnRate makes" in error_of(lit_cifar.fit.main, [*FEW, *flags])
    assert not RUNS.exists()


def test_changed_settings_reach_a_resumed_optimiser() -> None:
    fitted(LitClassifier(matrices(), optimizer=AdamW, schedule="cosine"), SaveAt(8))
    changed = functools.partial(AdamW, betas=(0.5, 0.6), weight_decay=0.2)
    trainer = fitted(LitClassifier(matrices(), lr=0.1, optimizer=changed, schedule="cosine"), ckpt_path="saved.ckpt")
    (group,) = trainer.optimizers[0].param_groups
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.5, 0.6), 0.2, 0.1)


# ---- what cannot be meant ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": AdamW, "momentum": 0.9}, "--model.momentum 0.9: AdamW has no momentum; leave it out"),
        ({"optimizer": AdamW, "nesterov": True}, "--model.nesterov True: AdamW has no nesterov"),
        ({"optimizer": torch.optim.Rprop, "weight_decay": 0.1}, "Rprop has no weight_decay"),
        (
            {"optimizer": AdamW, "groups": [Group("all", "", momentum=0.5)]},
            "--model.groups: all's momentum 0.5: AdamW has no momentum; leave it out",
        ),
        ({"optimizer": AdamW, "groups": [Group("all", "", "muon")]}, "all groups are of kind muon"),
        (
            {"optimizer": functools.partial(AdamW, lr=0.2), "lr": 0.1},
            "--model.lr 0.1 and --model.optimizer.lr 0.2 contradict each other",
        ),
        (
            {"optimizer": functools.partial(AdamW, weight_decay=0.2), "weight_decay": 0.1},
            "--model.weight_decay 0.1 and --model.optimizer.weight_decay 0.2 contradict",
        ),
        ({"optimizer": torch.optim.SparseAdam}, "SparseAdam takes sparse gradients only"),
        ({"optimizer": torch.optim.SGD, "nesterov": True}, "--model.nesterov true needs --model.momentum above 0"),
        ({"optimizer": functools.partial(AdamW, rate=1)}, "--model.optimizer cannot be made: "),
        ({"optimizer": functools.partial(AdamW, betas=(2, 2))}, "cannot be made: Invalid beta parameter"),
        ({"optimizer": lambda parameters: 3}, "--model.optimizer gives int, no torch.optim.Optimizer"),
        (
            {"optimizer": torch.optim.LBFGS, "groups": [Group("one", "1"), Group("rest", "")]},
            "LBFGS doesn't support per-parameter options",
        ),
        ({"scheduler": sequence, "schedule": "cosine"}, "takes the place of --model.schedule and --model.warmup"),
        ({"scheduler": sequence, "warmup": 0.1}, "takes the place of --model.schedule and --model.warmup"),
        ({"scheduler_interval": "step"}, "--model.scheduler_interval step needs --model.scheduler"),
        ({"scheduler_monitor": "val/loss"}, "--model.scheduler_monitor val/loss needs --model.scheduler"),
        (
            {"scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.4), "lr": 0.1},
            "sets the rates itself, up to its max_lr 0.4",
        ),
        (
            {"scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.4), "groups": [Group("a", "", lr=1.0)]},
            "sets the rates itself, up to its max_lr 0.4",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_when_the_module_is_made(settings: Any, message: str) -> None:
    assert as_said(message) in error_of(lambda: LitClassifier(matrices(), **settings))


class Holds(lr_scheduler.LambdaLR):
    """Holds another scheduler, as schedulers of a warmup do."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda step: 1.0)
        self.after = lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": lr_scheduler.StepLR}, "--model.scheduler cannot be made: "),
        ({"scheduler": lambda optimizer: 3}, "--model.scheduler gives int, no scheduler"),
        (
            {"scheduler": Holds},
            "the state of Holds cannot be saved, for what it has in 'after': give it a state_dict()",
        ),
        ({"scheduler": functools.partial(lr_scheduler.LambdaLR, lr_lambda=math.exp)}, "state of LambdaLR cannot be"),
        (
            {"scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=9)},
            "OneCycleLR ends after 9 steps, and the training run has 18",
        ),
        ({"scheduler": lr_scheduler.ConstantLR, "scheduler_monitor": "val/loss"}, "ConstantLR watches nothing"),
        (
            {"scheduler": lr_scheduler.ReduceLROnPlateau, "scheduler_interval": "step"},
            "--model.scheduler_interval step: a validation's values change with epochs only",
        ),
    ],
)
def test_a_scheduler_that_cannot_work_is_refused_before_the_first_step(settings: Any, message: str) -> None:
    assert as_said(message) in error_of(fitted, LitClassifier(matrices(), **settings))


def test_onecycle_without_an_end_says_how_to_set_one() -> None:
    module = LitClassifier(matrices(), scheduler=functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1))
    module._trainer = trainer_of(max_epochs=-1)
    module._trainer.datamodule = Data()  # type: ignore[attr-defined]
    assert "OneCycleLR needs an end: set max_epochs" in error_of(module.configure_optimizers)


# ---- states of schedulers in files ----


def test_a_schedulers_state_is_saved_without_functions_and_as_plain_numbers(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    counted = lr_scheduler.MultiStepLR(optimizer, [2, 2, 3]).state_dict()
    state = {"anneal": math.cos, "rates": [np.float64(0.5), (np.int64(2),)], "parts": [counted], "none": None}
    given = plain(copy.deepcopy(state))
    assert given == {"rates": [0.5, (2,)], "parts": [counted], "none": None}
    assert type(given["rates"][0]) is float
    torch.save(given, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert sorted(read["parts"][0]["milestones"].elements()) == [2, 2, 3]


def test_what_a_stranger_names_needs_trust() -> None:
    check_trusted({"optimizer": {"class_path": "torch.optim.AdamW"}})
    check_trusted({"scheduler": {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau"}})
    for section in ("optimizer", "scheduler"):
        for path in (
            "test_optimisers.OneByOne",
            "os.system",
            "torch.optim.os.system",
            "lightning.pytorch.cli.LightningCLI",
        ):
            assert f"names the class {path}" in error_of(check_trusted, {section: {"class_path": path}})
            assert f"names the class {path}" in error_of(check_trusted, {section: path})


# ---- from the command line ----


def fit(*args: str) -> None:
    lit_cifar.fit.main([*FEW, *args])


def config(run: str = "version_0") -> Any:
    return yaml.safe_load((RUNS / run / "config.yaml").read_text())


def parsed(*args: str) -> CLI:
    command = CLI([*FEW, *args], prog="fit", description="", logs=False)
    command.model.trainer = command.trainer
    return command


def saved_group(run: str = "version_0") -> dict[str, Any]:
    (group,) = read_checkpoint(RUNS / run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    return dict(group)


def test_a_run_with_adamw_is_plain_in_its_config_and_goes_on_with_other_settings() -> None:
    fit("--model.optimizer", "torch.optim.AdamW", "--model.optimizer.weight_decay", "0.05")
    model = config()["model"]
    assert model["lr"] == results("version_0")["lr"] == 0.001
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert "lr" not in model["optimizer"]["init_args"], "the rate stands in one place"
    assert read_checkpoint(RUNS / "version_0/checkpoints/last.ckpt").config["model"] == model
    again = parsed("--config", str(RUNS / "version_0" / "config.yaml"), "--lr", "0.02").model
    assert (again.lr, again._make().param_groups[0]["weight_decay"]) == (0.02, 0.05)
    quiet = ["--max_epochs", "2", "--log_level", "warning"]
    changes = ["--lr", "0.01", "--model.optimizer.weight_decay", "0.1"]
    lit_cifar.fit.main(["--resume", "auto", *changes, *quiet])
    assert (saved_group()["lr"], saved_group()["weight_decay"]) == (0.01, 0.1)
    message = error_of(lit_cifar.fit.main, ["--resume", "auto", "--model.optimizer", "Adam"])
    assert message.startswith("--resume: --model.optimizer was torch.optim.AdamW and is now torch.optim.Adam")


def test_a_test_needs_neither_the_optimiser_nor_the_scheduler_of_the_training_run() -> None:
    fit("--model.optimizer", "AdamW", "--model.scheduler", "StepLR", "--model.scheduler.step_size", "1")
    content = torch.load(RUNS / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    model = content["lit_cifar"]["config"]["model"]
    model["optimizer"]["class_path"], model["scheduler"] = "gone.Lion", "gone.my_scheduler"
    torch.save(content, "theirs.ckpt")
    lit_cifar.test.main(["--ckpt_path", "theirs.ckpt", *FEW[: FEW.index("--batch_size")], *LIMITS[-2:]])
    tested = json.loads(Path("test-theirs.json").read_text())
    assert tested["accuracy"] == results("version_0")["accuracy"]


def halved(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def test_a_function_that_makes_the_optimiser_may_be_named() -> None:
    fit("--model.optimizer", "test_optimisers.halved")
    assert (config()["model"]["optimizer"], config()["model"]["lr"]) == ("test_optimisers.halved", 0.5)
    go_on = ["--resume", "auto", "--max_epochs", "2", "--log_level", "warning"]
    assert "--trust true" in error_of(lit_cifar.fit.main, go_on)
    assert "was test_optimisers.halved and is now" in error_of(
        lit_cifar.fit.main, [*go_on, "--trust", "true", "--model.optimizer", "Adam"]
    )
    lit_cifar.fit.main([*go_on, "--trust", "true"])
    assert saved_group()["lr"] == 0.5


def test_a_scheduler_that_fails_in_training_is_named() -> None:
    flags = ["--model.scheduler", "CosineAnnealingLR", "--model.scheduler.T_max", "0"]
    assert "the scheduler CosineAnnealingLR failed in training" in error_of(explained, lit_cifar.fit.main, FEW + flags)


def test_a_scheduler_from_the_command_line_goes_on_only_as_it_began() -> None:
    plateau = ["--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor"]
    fit("--data.num_val", "100", "--model.optimizer", "AdamW", *plateau, "val/accuracy")
    assert config()["model"]["scheduler"]["init_args"]["monitor"] == "val/accuracy"
    quiet = ["--resume", "auto", "--max_epochs", "2", "--log_level", "warning"]
    for changed in (["--lr", "0.5"], ["--model.scheduler.patience", "3"], ["--model.optimizer.eps", "0.1"]):
        assert "a run goes on with what it began with" in error_of(lit_cifar.fit.main, [*quiet, *changed])
    lit_cifar.fit.main(quiet)
    assert results("version_0")["num_steps"] == 12


@pytest.mark.parametrize("spoil", ["shape", "kind", "group", "schedule", "missing"])
def test_a_spoilt_state_of_any_optimiser_is_seen_before_it_is_used(spoil: str, adamw: Path) -> None:
    path = Path("spoilt.ckpt")
    content = torch.load(adamw / "checkpoints" / "last.ckpt", weights_only=True)
    (optimizer,) = content["optimizer_states"]
    if spoil == "shape":
        optimizer["state"][0]["exp_avg"] = torch.zeros(7)
    elif spoil == "kind":
        optimizer["state"][0]["exp_avg"] = "soon"
    elif spoil == "group":
        optimizer["param_groups"][0]["betas"] = 0.9
    elif spoil == "schedule":
        content["lr_schedulers"][0]["last_epoch"] = "soon"
    else:
        del content["lr_schedulers"][0]["_last_lr"]
    torch.save(content, path)
    assert "spoilt" in error_of(lit_cifar.fit.main, ["--resume", str(path), *LIMITS, "--max_epochs", "2"])


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with AdamW and StepLR; nobody may change it."""
    place = tmp_path_factory.mktemp("adamw")
    scheduler = ["--model.scheduler", "StepLR", "--model.scheduler.step_size", "1"]
    fit("--model.optimizer", "AdamW", *scheduler, "--trainer.default_root_dir", str(place))
    return place / RUNS / "version_0"


def test_short_names_and_yaml_name_the_same_classes() -> None:
    Path("config.yaml").write_text(
        "model:\n  optimizer: AdamW\n  scheduler: {class_path: StepLR, init_args: {step_size: 3}}\n"
    )
    of_file = parsed("--config", "config.yaml").plain_config["model"]
    flags = ["--model.optimizer", "torch.optim.AdamW", "--model.scheduler", "torch.optim.lr_scheduler.StepLR"]
    of_flags = parsed(*flags, "--model.scheduler.step_size", "3").plain_config["model"]
    assert of_file == of_flags
    assert of_file["optimizer"]["class_path"] == "torch.optim.AdamW"


def test_the_default_optimiser_is_written_out_in_full() -> None:
    model = parsed().plain_config["model"]
    given = {key: model[key] for key in ("lr", "momentum", "weight_decay", "nesterov")}
    assert given == {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}


PLATEAU = ["--model.scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"]
CYCLE = ["--model.scheduler", "OneCycleLR", "--model.scheduler.max_lr", "0.1"]
STEP_LR = ["--model.scheduler", "StepLR", "--model.scheduler.step_size", "2"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "AdamW"], "--model.optimizer torch.optim.AdamW"),
        (["--optimizer=AdamW"], "--model.optimizer torch.optim.AdamW"),
        (["--optimizer.lr", "0.1"], "--model.optimizer torch.optim.AdamW"),
        (["--lr_scheduler", "StepLR"], "--model.scheduler torch.optim.lr_scheduler.StepLR"),
        (["--lr_scheduler.step_size", "3"], "--model.scheduler torch.optim.lr_scheduler.StepLR"),
        (["--config", "{optimizer: {class_path: torch.optim.AdamW}}"], "put optimizer: under model:"),
        (["--config", "{lr_scheduler: {class_path: StepLR}}"], "put scheduler: under model:"),
        (["--model.optimizer", "Nonsense"], "--model.optimizer: there is no class Nonsense"),
        (["--model.optimizer", "torch.nn.Linear"], "torch.nn.Linear is not declared as a subclass of"),
        (["--model.optimizer", "os.system"], "os.system is not declared as a function that returns Optimizer"),
        (["--model.optimizer", "torch.optim.AdamX"], "--model.optimizer: module 'torch.optim' has no attribute"),
        (["--model.scheduler", "SequentialLR"], "name a function of your own that makes it"),
        (["--model.scheduler", "ChainedScheduler"], "name a function of your own that makes it"),
        (["--model.scheduler", "LambdaLR"], "add --model.scheduler.lr_lambda VALUE"),
        (["--model.scheduler", "ReduceLROnPlateau"], "torch.optim.lr_scheduler.ReduceLROnPlateau"),
        (["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.1", "--lr", "0.2"], "contradict each other"),
        ([*STEP_LR, "--model.schedule", "cosine"], "takes the place of --model.schedule"),
        (
            PLATEAU,
            "--model.scheduler_monitor there is no val/loss without validation: add --data.num_val 5000",
        ),
        (
            [*PLATEAU, "--data.num_val", "100", "--model.scheduler_monitor", "val/acc"],
            "--model.scheduler_monitor val/acc is not logged: choose one of train/loss, val/accuracy, val/loss",
        ),
        (
            [*CYCLE, "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateFinder"],
            "LearningRateFinder finds --model.lr, and --model.scheduler has its max_lr",
        ),
    ],
)
def test_flags_that_cannot_be_meant_end_in_a_line_with_the_way_out(flags: list[str], message: str) -> None:
    assert message in error_of(lit_cifar.fit.main, [*FEW, *flags])
    assert not RUNS.exists()


@pytest.mark.parametrize("scheduler", [pytest.param([], marks=pytest.mark.slow), STEP_LR])
@pytest.mark.parametrize(
    "callback",
    [
        "StochasticWeightAveraging --trainer.callbacks.swa_lrs 0.01 --trainer.callbacks.device cpu",
        "EMAWeightAveraging",
        "LearningRateFinder --trainer.callbacks.num_training_steps 20",
    ],
)
def test_lightnings_callbacks_work_with_any_optimiser_and_scheduler(callback: str, scheduler: list[str]) -> None:
    callbacks = f"--trainer.callbacks+={callback}".split()
    fit("--model.optimizer", "AdamW", *scheduler, *callbacks, "--max_epochs", "4", "--checkpoint.num_kept", "9",
        "--checkpoint.every_n_train_steps", "6")  # fmt: skip
    rate = config()["model"]["lr"]
    if callback.startswith("LearningRateFinder"):
        assert rate != 0.001
        assert saved_group()["lr"] == pytest.approx(rate * (0.01 if scheduler else 1.0))
    for state in sorted((RUNS / "version_0/checkpoints").glob("last*.ckpt")):
        read_checkpoint(state)
    lit_cifar.fit.main(["--resume", str(RUNS / "version_0/checkpoints/last-1.ckpt"), "--log_level", "warning"])
    assert results("version_0")["num_steps"] == 24


def test_help_tells_what_none_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lit_cifar.fit.main(["--help"])
    assert "--lr learning rate; None: 0.001, or that of --model.optimizer" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        lit_cifar.fit.main(["--help", "model"])
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate; None: 0.001, or that of --model.optimizer" in text
    assert "0 to below 1. None: 0.9." in text
