"""Searches before a training run, steps whose number of batches changes, and what Lightning reports by its log."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import SHAPES, assert_same_run, draw_few, error_of, make_tree, results, scalars, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import lit_cifar.fit
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.model import steps
from lit_cifar.model.module import LitClassifier
from lit_cifar.nets import Net
from lit_cifar.training.loop import LeanEpochLoop

FEW = [*SHAPES, "--batch_size", "50", "--max_epochs", "2", "--lr", "0.03"]  # 20 batches
CALLBACKS = "--trainer.callbacks+=lightning.pytorch.callbacks."
RATE = [f"{CALLBACKS}LearningRateFinder", "--trainer.callbacks.num_training_steps", "30"]
BATCH = [f"{CALLBACKS}BatchSizeFinder", "--trainer.callbacks.init_val", "10", "--trainer.callbacks.max_trials", "3"]
FINDER_FILES = (".lr_find_*", ".scale_batch_size_*", "checkpoints/.*")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 images for training and 200 for the test."""
    draw_few(monkeypatch, num_train=1000, num_test=200)


class Dropping(torch.nn.Sequential):
    """Draws random numbers in each step, and takes images of any side."""

    def __init__(self, num_classes: int = 10) -> None:
        filters = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        super().__init__(*filters, torch.nn.Dropout(0.2), torch.nn.Linear(8, num_classes))


class Sides(Callback):
    """Notes the side of each step's images."""

    seen: list[int | None] = []  # noqa: RUF012

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, LitClassifier)
        self.seen.append(pl_module.side())


# ---- what a search finds ----


def test_what_was_found_is_what_the_run_says_it_was_trained_with(capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.fit.main([*FEW, "--data.num_val", "200", "--model.schedule", "linear", *BATCH, *RATE])
    run = Path("lightning_logs/version_0")
    config = yaml.safe_load((run / "config.yaml").read_text())
    found = config["model"]["lr"]
    assert 1e-8 < found <= 1
    assert found != 0.03
    assert (config["data"]["batch_size"], config["trainer"]["callbacks"]) == (40, None)
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["lit_cifar"]["config"] == config
    report = results("version_0")
    assert {key: report[key] for key in ("batch_size", "lr", "num_steps")} == {
        **{"batch_size": 40, "lr": found, "num_steps": 40},
    }
    assert checkpoint["global_step"] == 40
    (schedule,) = checkpoint["lr_schedulers"]
    assert schedule["base_lrs"] == [found]
    assert schedule["_last_lr"] == [pytest.approx(found / 40)]  # the line's end, at the last step
    events = EventAccumulator(str(run)).Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text.removeprefix("```yaml\n").removesuffix("```")) == config
    start = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert (start.hparams["batch_size"].number_value, start.hparams["lr"].number_value) == (40, found)
    assert not [path for pattern in FINDER_FILES for path in run.glob(pattern)]
    output = capsys.readouterr().out
    assert output.count("training 62,006 parameters") == 1
    assert output.count("epoch 1  validation") == 1


@pytest.mark.parametrize("flags", [BATCH, RATE, [*BATCH, *RATE]], ids=["batch", "rate", "both"])
def test_a_run_after_a_search_is_the_run_that_was_started_with_what_it_found(flags: list[str]) -> None:
    more = ["--model.schedule", "cosine", "--model.warmup", "0.2", "--model.sides", "[16, 32]"]
    net = ["--model.net", "test_tuner.Dropping", "--trainer.callbacks+=test_tuner.Sides"]
    Sides.seen = []
    lit_cifar.fit.main([*FEW, *more, *net, *flags])
    searched, Sides.seen = Sides.seen, []
    lit_cifar.fit.main(["--config", "lightning_logs/version_0/config.yaml"])
    assert searched == Sides.seen
    assert searched.count(16) == searched.count(32) == results("version_0")["num_steps"] / 2
    assert_same_run("version_0", "version_1")
    one, other = (Path(f"lightning_logs/version_{version}/config.yaml").read_text() for version in (0, 1))
    assert yaml.safe_load(one) == yaml.safe_load(other)


def test_a_resumed_run_keeps_what_was_found_and_does_not_search_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lit_cifar.fit.main([*FEW, "--max_epochs", "1", *BATCH, *RATE])
    found = results("version_0")["lr"]
    lit_cifar.fit.main(["--config", "lightning_logs/version_0/config.yaml", "--max_epochs", "2"])

    def search(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr("lightning.pytorch.callbacks.lr_finder._lr_find", search)
    monkeypatch.setattr("lightning.pytorch.callbacks.batch_size_finder._scale_batch_size", search)
    capsys.readouterr()
    # as a job's script does, which is the same each time
    lit_cifar.fit.main([*FEW, *BATCH, *RATE, "--resume", "lightning_logs/version_0"])
    assert capsys.readouterr().err.splitlines()[:2] == [
        "BatchSizeFinder searches where a run begins: this one goes on with --data.batch_size 40",
        f"LearningRateFinder searches where a run begins: this one goes on with --model.lr {found}",
    ]
    assert (results("version_0")["lr"], results("version_0")["num_steps"]) == (found, 50)
    assert_same_run_but_events("version_0", "version_1")
    lit_cifar.fit.main(["--resume", "lightning_logs/version_0", "--max_epochs", "3"])  # and without the finders
    assert results("version_0")["num_steps"] == 75


def assert_same_run_but_events(one: str, other: str) -> None:
    ours, theirs = weights(one), weights(other)
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert results(one)["confusion_matrix"] == results(other)["confusion_matrix"]


def test_batches_are_searched_within_the_images_there_are() -> None:
    make_tree(Path("tree"), ("one", "two"), num_images=6)
    for flags in ([], ["--trainer.callbacks.mode", "binsearch", "--trainer.callbacks.margin", "0"]):
        lit_cifar.fit.main(
            ["--data_dir", "tree", "--accelerator", "cpu", "--max_epochs", "1", f"{CALLBACKS}BatchSizeFinder", *flags]
        )
    assert [results(f"version_{version}")["batch_size"] for version in (0, 1)] == [8, 12]


def test_a_search_that_cannot_be_made_ends_in_one_line_before_a_run_begins() -> None:
    groups = ["--model.groups", "[{name: all, pattern: '', lr: 0.1}]"]
    for flags, message in (
        ([*BATCH, "--batch_size", "50", "--strategy", "ddp"], "BatchSizeFinder searches on one device only"),
        ([*BATCH, "--trainer.callbacks.init_val", "2000"], "init_val 2000 is more than 1000 images"),
        ([*BATCH, "--trainer.callbacks.batch_arg_name", "size"], "the data have no size"),
        ([*RATE, "--trainer.callbacks.attr_name", "rate"], "the model has no rate"),
        ([*RATE, *groups], "each group of --model.groups has an lr of its own"),
    ):
        assert message in error_of(lit_cifar.fit.main, [*FEW, *flags])
    assert not Path("lightning_logs").exists()


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_search_tries_the_rates_it_was_asked_for_whatever_the_models_own() -> None:
    for lr in (0.5, 0.001):
        finder = LearningRateFinder(min_lr=1e-5, max_lr=0.1, num_training_steps=25)
        trainer = quiet_trainer(max_epochs=4, callbacks=[finder])
        torch.manual_seed(0)
        module = LitClassifier(Net(), lr=lr, schedule="linear")
        trainer.fit(module, datamodule=few_images())
        assert finder.optimal_lr is not None
        tried = finder.optimal_lr.results["lr"]
        assert tried[0] == pytest.approx(1e-5)
        assert tried[-1] == pytest.approx(0.1, rel=0.5)
        assert tried == sorted(tried)
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(module.lr / trainer.global_step)


def test_a_run_too_short_for_the_search_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.fit.main([*FEW, *RATE, "--max_epochs", "1"])
    assert "over 30 steps, and the training run has 20: large rates are not tried" in capsys.readouterr().err


# ---- steps of several batches ----


def few_images() -> CIFAR10DataModule:
    return CIFAR10DataModule(dataset="shapes", batch_size=90)  # 12 batches, the last of 10


def quiet_trainer(**options: Any) -> Trainer:
    return Trainer(
        **{"accelerator": "cpu", "logger": False, "limit_val_batches": 0, **options},
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Rates(Callback):
    """Notes how many steps are planned, and the learning rate of each step."""

    def __init__(self) -> None:
        self.planned: int | None = None
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, LitClassifier)
        self.planned = pl_module._planned_steps
        self.rates[trainer.global_step :] = [trainer.optimizers[0].param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({"scheduling": {1: 5}}, 12 + 3 + 3),
        ({"scheduling": {0: 4, 2: 2}}, 3 + 3 + 6),
        ({"scheduling": {0: 4, 2: 2}, "max_steps": 8}, 8),
        ({"scheduling": {1: 5}, "limit_train_batches": 0.5}, 6 + 2 + 2),
        ({"scheduling": {0: 3, 1: 2, 2: 7}, "limit_train_batches": 7}, 3 + 4 + 1),
        ({"scheduling": {0: 3, 1: 2}, "overfit_batches": 3, "min_epochs": 2}, 1 + 2 + 2),
        ({"scheduling": {2: 50}, "max_steps": 70, "min_steps": 3}, 12 + 12 + 1),
        ({"scheduling": {1: 5, 900: 2}, "max_epochs": -1, "max_steps": 20}, 20),
        ({"accumulate_grad_batches": 5}, 9),
    ],
)
@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_schedule_ends_at_the_last_step_whatever_the_steps_are_made_of(
    options: dict[str, Any], num_steps: int
) -> None:
    scheduling = options.pop("scheduling", None)
    rates = Rates()
    callbacks = [rates, *([GradientAccumulationScheduler(scheduling)] if scheduling else [])]
    trainer = quiet_trainer(**{"max_epochs": 3, **options}, callbacks=callbacks)
    module = LitClassifier(Net(), lr=0.01, schedule="linear")
    trainer.fit(module, datamodule=few_images())
    assert rates.rates == pytest.approx([0.01 * (1 - step / num_steps) for step in range(num_steps)])
    assert trainer.global_step == rates.planned == module._num_steps() == num_steps


def test_steps_and_batches_left_are_those_of_a_loop() -> None:
    """Against Lightning's loop in a few lines, from every place in it."""
    for num_batches, max_epochs, max_steps, factors in (
        (12, 4, -1, {0: 1, 1: 5}),
        (7, 5, 9, {0: 3, 2: 2, 3: 10}),
        (5, 3, 100, {0: 2}),
        (4, -1, 13, {0: 3, 4: 1}),
        (1, 6, -1, {0: 4, 3: 1}),
    ):
        scheduler = GradientAccumulationScheduler(dict(factors))
        places = [(0, 0, 0)]  # epoch, batches of it, and steps
        epoch = batch = step = 0
        while epoch != max_epochs and step != max_steps:
            batch += 1
            step += batch % scheduler.get_accumulate_grad_batches(epoch) == 0 or batch == num_batches
            if batch == num_batches:
                epoch, batch = epoch + 1, 0
            places.append((epoch, batch, step))
        for index, (epoch, batch, taken) in enumerate(places):
            counts = SimpleNamespace(processed=epoch, started=epoch + bool(batch))
            progress = SimpleNamespace(current=SimpleNamespace(ready=batch))
            trainer: Any = SimpleNamespace(
                **{"callbacks": [scheduler], "max_epochs": max_epochs, "max_steps": max_steps, "global_step": taken},
                fit_loop=SimpleNamespace(
                    epoch_progress=SimpleNamespace(current=counts), epoch_loop=SimpleNamespace(batch_progress=progress)
                ),
            )
            assert steps.left(trainer, num_batches) == (places[-1][2] - taken, len(places) - 1 - index)


ACCUMULATE = [
    f"{CALLBACKS}GradientAccumulationScheduler",
    *("--trainer.callbacks.scheduling", "{0: 1, 1: 3}"),
    *("--model.schedule", "linear"),
]


def test_a_run_resumed_within_an_epoch_accumulates_as_before() -> None:
    lit_cifar.fit.main([*FEW, *ACCUMULATE])
    lit_cifar.fit.main([*FEW, *ACCUMULATE, "--checkpoint.every_n_train_steps", "1", "--checkpoint.num_kept", "9"])
    run = Path("lightning_logs/version_1")
    states = sorted(run.glob("checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    (state,) = (path for path in states if torch.load(path, weights_only=True)["global_step"] == 23)
    state.rename("state.ckpt")
    for path in run.glob("checkpoints/*"):
        path.unlink()
    Path("state.ckpt").rename(run / "checkpoints/last.ckpt")
    lit_cifar.fit.main(["--resume", str(run), "--trust", "true"])
    assert results("version_0")["num_steps"] == results("version_1")["num_steps"] == 27
    assert_same_run_but_events("version_0", "version_1")
    (schedule,) = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["lr_schedulers"]
    assert schedule["_last_lr"] == [pytest.approx(0.03 / 27)]


def test_a_run_resumed_with_other_steps_is_planned_from_where_it_is() -> None:
    lit_cifar.fit.main([*FEW, "--model.schedule", "linear", "--max_epochs", "1"])
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "3", "--trainer.accumulate_grad_batches", "4"])
    assert results("version_0")["num_steps"] == 20 + 5 + 5
    state = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert state["lr_schedulers"][0]["_last_lr"] == [pytest.approx(0.03 / 30)]


def test_the_loss_is_the_mean_over_images_whatever_the_steps_are_made_of() -> None:
    flags = ["--lr", "0", "--trainer.log_every_n_steps", "1000", "--running_loss.every_n_steps", "1000"]
    lit_cifar.fit.main([*FEW, *flags])
    lit_cifar.fit.main([*FEW, *flags, *ACCUMULATE])
    (_, plain), (_, same) = scalars("version_0")["train/loss"]
    assert plain == pytest.approx(same, rel=1e-6)
    assert scalars("version_1")["train/loss"] == [(20, pytest.approx(plain)), (27, pytest.approx(plain))]


def test_the_lean_loop_stands_aside_only_while_gradients_are_accumulated(monkeypatch: pytest.MonkeyPatch) -> None:
    lean: list[bool] = []
    found = LeanEpochLoop._find_obstacle

    def noting(self: LeanEpochLoop, data_fetcher: Any) -> str | None:
        obstacle = found(self, data_fetcher)
        lean.append(obstacle is None)
        return obstacle

    monkeypatch.setattr(LeanEpochLoop, "_find_obstacle", noting)
    lit_cifar.fit.main([*FEW, *ACCUMULATE, "--max_epochs", "3", "--trainer.callbacks.scheduling", "{1: 3, 2: 1}"])
    assert lean == [True, False, True]


# ---- what was switched on is printed ----


@pytest.fixture
def lightnings_lines() -> Iterator[io.StringIO]:
    """What Lightning's log prints."""
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    logging.getLogger("lightning.pytorch").addHandler(handler)
    yield lines
    logging.getLogger("lightning.pytorch").removeHandler(handler)


SWITCHED_ON = [
    *("--trainer.profiler", "simple", "--trainer.enable_model_summary", "true"),
    *(f"{CALLBACKS}EarlyStopping", "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.verbose", "true"),
    *(f"{CALLBACKS}StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.01"),
]


@pytest.mark.filterwarnings("ignore")
def test_what_somebody_switched_on_is_printed(
    lightnings_lines: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [*RATE, *SWITCHED_ON]
    lit_cifar.fit.main([*FEW, "--data.num_val", "200", "--model.schedule", "linear", *callbacks])
    lines = lightnings_lines.getvalue() + capsys.readouterr().out  # where Lightning prints a summary if there is rich
    for said in ("FIT Profiler Report", "Trainable params", "Learning rate set to", "Metric val/loss", "SWALR"):
        assert said in lines
    for chatter in ("GPU available", "Seed set", "`Trainer.fit` stopped", "Restored", "Restoring", "LOCAL_RANK", "TPU"):
        assert chatter not in lines


@pytest.mark.filterwarnings("ignore")
def test_an_overfitting_or_short_try_is_named(lightnings_lines: io.StringIO) -> None:
    lit_cifar.fit.main([*FEW, "--trainer.fast_dev_run", "2"])
    assert "will run the requested loop using 2 batch(es)" in lightnings_lines.getvalue()
    assert "GPU" not in lightnings_lines.getvalue()


@pytest.mark.parametrize("level", ["warning", "error"])
def test_above_info_nothing_of_it_is_printed(level: str, lightnings_lines: io.StringIO) -> None:
    lit_cifar.fit.main([*FEW, "--max_epochs", "1", *SWITCHED_ON[:4], *RATE, "--log_level", level])
    assert lightnings_lines.getvalue() == ""
