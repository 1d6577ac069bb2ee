"""Lightning's callbacks, strategies, precisions, profilers and plugins: from flags and from YAML, then tested, then
resumed. docs/parts.md has a row for each; loggers are in test_loggers.py."""

import gc
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, SHAPES, Run, draw_few, error_of, results, scalars, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler

import lit_cifar.fit
import lit_cifar.test
from lit_cifar.cli import blame
from lit_cifar.errors import UserError
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.folder import RUNS
from lit_cifar.text import in_command
from lit_cifar.training.progress import Progress, named_rates

FEW = [*SHAPES, "--batch_size", "32", "--lr", "0.05", "--trainer.log_every_n_steps", "2"]
STATES = ["--checkpoint.every_n_train_steps", "3", "--checkpoint.num_kept", "9", "--checkpoint.epoch_end_seconds", "0"]
VALIDATED = ["--data.num_val", "64"]
FOLDER = RUNS / "version_0"
PLUGIN = "lightning.pytorch.plugins."

pytestmark = [
    pytest.mark.filterwarnings("ignore:SWA is currently:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),  # the copies that are resumed
    pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU:UserWarning"),
]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """224 images for training, 7 batches or with VALIDATED 5, and 50 for the test."""
    draw_few(monkeypatch, num_train=224, num_test=50)


def made(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


class Unfreezing(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.conv1)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.conv1, optimizer, lr=0.01)


def num_images(batch: Any) -> int:
    return len(batch[1])


def flags_of(callbacks: list[dict[str, Any]]) -> list[str]:
    """The callbacks as people type them."""
    flags = []
    for callback in callbacks:
        flags.append(f"--trainer.callbacks+={callback['class_path']}")
        for key, value in callback["init_args"].items():
            text = value if isinstance(value, str) else json.dumps(value)
            flags += [f"--trainer.callbacks.{key}", text]
    return flags


def ends(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    names = [path.stem for path in (folder / "checkpoints").glob("*.ckpt") if path.stem in ("last", "best", "final")]
    return {name: weights(folder.resolve(), name) for name in names}


def assert_same(ours: dict[str, dict[str, torch.Tensor]], theirs: dict[str, dict[str, torch.Tensor]]) -> None:
    assert ours.keys() == theirs.keys()
    for state, tensors in ours.items():
        assert tensors.keys() == theirs[state].keys()
        assert all(torch.equal(tensor, theirs[state][name]) for name, tensor in tensors.items()), state


def run(command: Any, args: list[str]) -> None:
    """Runs a command, and leaves the group of processes that it was in, as its process would at its end."""
    try:
        command.main(args)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def check_road(
    settings: dict[str, Any], flags: list[str], ages: tuple[int, ...], more: list[str] | None = None
) -> None:
    """A run of three epochs from YAML; the test of its state; the run again from its states of some ages; more epochs.

    The trained run and each of those that go on from a state end with the same bits.
    """
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": settings}))
    run(lit_cifar.fit, [*FEW, *STATES, "--max_epochs", "3", *flags, "--config", "run.yaml"])
    found, trust = results("version_0"), ["--trust", "true"]
    precision = ["--precision", settings["precision"]] if "precision" in settings else []
    state = str(FOLDER / "checkpoints" / f"{found['checkpoint']}.ckpt")
    run(lit_cifar.test, ["--ckpt_path", state, "--output", "test.json", *precision])
    assert json.loads(Path("test.json").read_text())["confusion_matrix"] == found["confusion_matrix"]
    for age in ages:
        shutil.copytree(FOLDER, f"of_{age}")
        shutil.move(f"of_{age}/checkpoints/last-{age}.ckpt", f"of_{age}/checkpoints/last.ckpt")
        run(lit_cifar.fit, ["--resume", f"of_{age}", *trust])
        assert_same(ends(FOLDER), ends(Path(f"of_{age}")))
        again = results(Path(f"of_{age}").resolve())
        assert all(again[key] == found[key] for key in ("confusion_matrix", "num_steps", "checkpoint"))
    for one in more or []:
        run(lit_cifar.fit, ["--resume", str(FOLDER), "--max_epochs", one, *trust])
        assert results("version_0")["num_steps"] > found["num_steps"]


# ---- callbacks ----

# by the row of docs/parts.md; flags that each needs besides
CALLBACKS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "EarlyStopping": ([made("EarlyStopping", monitor="train/loss", patience=1, min_delta=0.02)], []),
    "EarlyStopping in validation": ([made("EarlyStopping", monitor="val/loss", patience=1)], VALIDATED),
    "ModelCheckpoint": ([made("ModelCheckpoint", every_n_train_steps=2, save_top_k=-1)], []),
    "ModelCheckpoint of a monitor": (
        [made("ModelCheckpoint", monitor="val/accuracy", mode="max", dirpath="mine", save_top_k=2, save_last=True)],
        VALIDATED,
    ),
    "ModelCheckpoint of train/loss": (
        [made("ModelCheckpoint", monitor="train/loss", every_n_train_steps=3, save_top_k=2, save_last=True)],
        [],
    ),
    "LearningRateMonitor": ([made("LearningRateMonitor")], ["--model.schedule", "cosine"]),
    "StochasticWeightAveraging": ([made("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1)], []),
    "EMAWeightAveraging": ([made("EMAWeightAveraging", decay=0.9)], []),
    "WeightAveraging": ([made("WeightAveraging")], []),
    "GradientAccumulationScheduler": ([made("GradientAccumulationScheduler", scheduling={0: 1, 1: 2})], []),
    "DeviceStatsMonitor": ([made("DeviceStatsMonitor", cpu_stats=True)], []),
    "RichProgressBar": ([made("RichProgressBar")], []),
    "TQDMProgressBar": ([made("TQDMProgressBar")], []),
    "ModelSummary": ([made("ModelSummary", max_depth=2)], []),
    "RichModelSummary": ([made("RichModelSummary")], []),
    "Timer": ([made("Timer", duration="00:01:00:00")], []),
    "BatchSizeFinder": ([made("BatchSizeFinder", init_val=16, max_trials=1)], []),
    "LearningRateFinder": ([made("LearningRateFinder", num_training_steps=10)], ["--lr", "0.01"]),
    "ModelPruning": ([made("ModelPruning", pruning_fn="l1_unstructured", amount=0.2)], []),
    "ModelPruning without the lottery": (
        [made("ModelPruning", pruning_fn="l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False)],
        [],
    ),
    "OnExceptionCheckpoint": ([made("OnExceptionCheckpoint", dirpath="exception")], []),
    "LambdaCallback": ([made("LambdaCallback")], []),
    "ThroughputMonitor": ([made("ThroughputMonitor", batch_size_fn="test_parts.num_images")], []),
    "SpikeDetection": ([made("SpikeDetection")], []),
    "BaseFinetuning": ([made("test_parts.Unfreezing")], []),
    "BasePredictionWriter": ([made("BasePredictionWriter", write_interval="epoch")], []),
    "EarlyStopping, ModelCheckpoint, LearningRateMonitor": (
        [
            made("EarlyStopping", monitor="val/loss", patience=0),
            made("ModelCheckpoint", monitor="val/accuracy", mode="max"),
            made("LearningRateMonitor"),
        ],
        VALIDATED,
    ),
    "EMAWeightAveraging, EarlyStopping": (
        [made("EMAWeightAveraging", decay=0.9), made("EarlyStopping", monitor="val/loss", patience=0)],
        VALIDATED,
    ),
    "StochasticWeightAveraging, GradientAccumulationScheduler": (
        [
            made("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1),
            made("GradientAccumulationScheduler", scheduling={1: 2}),
        ],
        [],
    ),
}


def skip_without(names: str) -> None:
    if "Rich" in names:
        pytest.importorskip("rich")
    if "DeviceStatsMonitor" in names:
        pytest.importorskip("psutil")


AGAIN = (" in ", " of ", " without ")  # a callback that another case has too


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * any(word in name for word in AGAIN)) for name in CALLBACKS]
)
def test_a_run_with_a_callback_is_tested_and_resumed_to_the_bit(name: str) -> None:
    skip_without(name)
    callbacks, flags = CALLBACKS[name]
    check_road({"callbacks": callbacks}, flags, ages=(2,))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLBACKS)
def test_flags_make_the_same_run_which_goes_on_from_any_state(name: str) -> None:
    skip_without(name)
    callbacks, flags = CALLBACKS[name]
    check_road({"callbacks": callbacks}, flags, ages=(1, 3), more=["4"])
    lit_cifar.fit.main([*FEW, *STATES, "--max_epochs", "3", *flags_of(callbacks), *flags])
    shutil.rmtree(FOLDER)
    lit_cifar.fit.main([*FEW, *STATES, "--max_epochs", "3", *flags, "--config", "run.yaml"])
    assert_same(ends(RUNS / "version_1"), ends(RUNS / "version_2"))


def test_flags_make_the_same_run_as_yaml() -> None:
    callbacks, flags = CALLBACKS["EarlyStopping, ModelCheckpoint, LearningRateMonitor"]
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    for source in (flags_of(callbacks), ["--config", "run.yaml"]):
        lit_cifar.fit.main([*FEW, "--max_epochs", "2", *flags, *source])
    one, other = (yaml.safe_load((RUNS / f"version_{n}" / "config.yaml").read_text()) for n in (0, 1))
    assert one["trainer"] == other["trainer"]
    assert_same(ends(RUNS / "version_0"), ends(RUNS / "version_1"))


def line_of(settings: dict[str, Any], *flags: str) -> str:
    """The one line that a run with these settings of the Trainer ends in, as the command would print it."""
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": settings}))

    @in_command()
    def fit() -> None:
        try:
            lit_cifar.fit.main([*FEW, "--max_epochs", "2", "--config", "run.yaml", *flags])
        except UserError:
            raise
        except Exception as error:
            if line := blame.explain(error):
                raise UserError(line) from None
            raise

    return error_of(fit)


REFUSED = {
    "BackboneFinetuning": (made("BackboneFinetuning"), "LitClassifier has no backbone"),
    "BaseFinetuning": (made("BaseFinetuning"), "does nothing by itself"),
    "ModelPruning": (
        made("ModelPruning", pruning_fn="l1_unstructured", make_pruning_permanent=False),
        "make_pruning_permanent false",
    ),
    "LambdaCallback": (made("LambdaCallback", on_fit_start="lambda trainer: None"), "on_fit_start"),
    "EarlyStopping": (made("EarlyStopping", monitor="lr"), "choose one of train/loss, train/gradient_norm, lr/net"),
    "ModelCheckpoint": (made("ModelCheckpoint", monitor="val/f1"), "no val/f1 without validation: add --data.num_val"),
    "OnExceptionCheckpoint": (made("OnExceptionCheckpoint"), "arguments are required: dirpath"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_that_cannot_work_here_ends_in_one_line_and_no_run(name: str) -> None:
    callback, words = REFUSED[name]
    assert words in line_of({"callbacks": [callback]})
    assert not RUNS.exists()


def test_a_spike_names_the_way_on() -> None:
    spike = made("SpikeDetection", rtol=None, atol=1e-9)
    assert "go on from the last state with --resume" in line_of({"callbacks": [spike]})
    schedule = line_of({"callbacks": [made("test_parts.Unfreezing")]}, "--model.schedule", "cosine")
    assert "use --model.schedule constant" in schedule


# ---- what callbacks rely on ----


class Reading(Callback):
    """Notes what callbacks find while a run goes on."""

    seen: list[tuple[str, dict[str, float]]] = []  # noqa: RUF012
    losses: list[float] = []  # noqa: RUF012

    def _note(self, hook: str, trainer: Trainer) -> None:
        self.seen.append((hook, {name: float(value) for name, value in trainer.callback_metrics.items()}))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note("epoch", trainer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._note("step", trainer)


@pytest.mark.parametrize("flags", [[], ["--trainer.accumulate_grad_batches", "2"]])
def test_callbacks_find_the_loss_of_the_step_and_of_the_epoch(flags: list[str]) -> None:
    Reading.seen, Reading.losses = [], []
    lit_cifar.fit.main([*FEW, "--max_epochs", "2", "--trainer.callbacks+=test_parts.Reading", *flags])
    assert len(Reading.losses) == 14
    epochs = [found for hook, found in Reading.seen if hook == "epoch"]
    for number, found in enumerate(epochs):
        losses = Reading.losses[7 * number : 7 * (number + 1)]
        assert found["train/loss"] == pytest.approx(sum(losses) / 7)
        assert found["lr/net"] == pytest.approx(0.05)
        assert found["train/gradient_norm"] > 0
    steps = [found for hook, found in Reading.seen if hook == "step"]
    assert steps[0].get("lr/net") == pytest.approx(0.05), "before anything was logged"
    if not flags:
        assert steps[3]["train/loss"] == pytest.approx(Reading.losses[2])


class Own(LitClassifier):
    """Two optimisers that have no names, stepped by hand, and a training_step that gives no loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        weights = list(self.net.parameters())
        return [torch.optim.AdamW(weights[:2], lr=0.25), torch.optim.AdamW([{"params": weights[2:]}], lr=0.125)]

    def on_train_start(self) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()


def test_progress_follows_a_module_with_its_own_steps(capsys: pytest.CaptureFixture[str]) -> None:
    from lit_cifar.data.datamodule import CIFAR10DataModule
    from lit_cifar.nets import Net

    data = CIFAR10DataModule(dataset="shapes", batch_size=32)
    progress = Progress(every_n_steps=5)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[progress],
        use_distributed_sampler=False,
    )
    trainer.fit(Own(Net()), datamodule=data)
    assert "step 5 of 7" in (output := capsys.readouterr().out)
    assert "loss" not in output
    assert named_rates(trainer, [0.25, 0.125]) == {"lr/AdamW": 0.25, "lr/AdamW-1": 0.125}
    assert {name for name in trainer.callback_metrics if name.startswith("lr/")} == {"lr/AdamW", "lr/AdamW-1"}
    assert "train/loss" not in trainer.callback_metrics


def test_a_state_that_an_exception_left_begins_no_other_run() -> None:
    left = [made("OnExceptionCheckpoint", dirpath="exception")]
    lit_cifar.fit.main([*FEW, "--max_epochs", "1"])
    Path("exception").mkdir()
    shutil.copy(FOLDER / "checkpoints" / "last.ckpt", "exception/on_exception.ckpt")
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": left}}))
    lit_cifar.fit.main([*FEW, "--max_epochs", "1", "--config", "run.yaml"])
    assert_same(ends(FOLDER), ends(RUNS / "version_1"))
    assert results("version_1")["num_steps"] == 7
    assert OnExceptionCheckpoint("exception").ckpt_path == "exception/on_exception.ckpt"


def test_a_model_checkpoint_keeps_off_the_files_of_the_run() -> None:
    callbacks = [made("ModelCheckpoint", monitor="val/loss", filename="best", save_last=True)]
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    lit_cifar.fit.main([*FEW, *VALIDATED, "--max_epochs", "2", "--config", "run.yaml"])
    files = sorted(str(path.relative_to(FOLDER / "checkpoints")) for path in (FOLDER / "checkpoints").rglob("*.ckpt"))
    theirs = [f"{ModelCheckpoint.__name__}/{name}.ckpt" for name in ("best", "last")]
    assert files == [*theirs, "best.ckpt", "last-1.ckpt", "last.ckpt"]
    assert results("version_0")["checkpoint"] == "best"


# ---- strategies, precisions, profilers, plugins ----

STRATEGIES: dict[str, str | None] = {  # and the words of its line, where it has one
    "auto": None,
    "single_device": None,
    "ddp": None,
    "ddp_find_unused_parameters_true": None,
    "ddp_spawn": "is for notebooks",
    "ddp_fork": "is for notebooks",
    "ddp_notebook": "is for notebooks",
    "fsdp": "requires a GPU",
    "deepspeed": "pip install -U deepspeed",
    "xla": "torch_xla",
    "dp": "invalid strategy name",
}
PRECISIONS: dict[str, str | None] = {
    **dict.fromkeys(("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")),
    "transformer-engine": "transformer_engine",
    "transformer-engine-float16": "transformer_engine",
}
PROFILERS: dict[str, str | None] = {
    "simple": None,
    "advanced": None,
    "pytorch": None,
    "PassThroughProfiler": None,
    "xla": "torch_xla",
}
PLUGINS: dict[str, tuple[dict[str, Any], str | None]] = {
    "AsyncCheckpointIO": (made(f"{PLUGIN}AsyncCheckpointIO"), None),
    "TorchCheckpointIO": (made(f"{PLUGIN}TorchCheckpointIO"), "may leave half a state"),
    "XLACheckpointIO": (made(f"{PLUGIN}XLACheckpointIO"), "torch_xla"),
    "LayerSync": (made(f"{PLUGIN}LayerSync"), "abstract"),
    "TorchSyncBatchNorm": (made(f"{PLUGIN}TorchSyncBatchNorm"), None),
    "MixedPrecision": (made(f"{PLUGIN}MixedPrecision", precision="bf16-mixed", device="cpu"), None),
    "LightningEnvironment": (made(f"{PLUGIN}environments.LightningEnvironment"), None),
}
SLOW = (
    "ddp",
    "advanced",
    "pytorch",
    "16-true",
    "32-true",
    "TorchSyncBatchNorm",
    "LightningEnvironment",
    "MixedPrecision",
    "auto",
)
KINDS: dict[str, tuple[dict[str, Any], str | None]] = {
    **{f"strategy {name}": ({"strategy": name}, line) for name, line in STRATEGIES.items()},
    **{f"precision {name}": ({"precision": name}, line) for name, line in PRECISIONS.items()},
    **{f"profiler {name}": ({"profiler": name}, line) for name, line in PROFILERS.items()},
    **{f"plugin {name}": ({"plugins": [plugin]}, line) for name, (plugin, line) in PLUGINS.items()},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name.split()[1] in SLOW)) for name in KINDS]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Lightning's half-made XLAProfiler
def test_a_setting_of_the_trainer_works_or_ends_in_one_line(name: str) -> None:
    settings, line = KINDS[name]
    if settings.get("profiler") == "PassThroughProfiler":
        settings = {"profiler": made("lightning.pytorch.profilers.PassThroughProfiler")}
    if line is None:
        check_road(settings, [], ages=(1,))
    else:
        package = line.split()[-1]
        if importlib.util.find_spec(package if package.isidentifier() else "no_such"):
            pytest.skip(f"{package} is installed")
        assert line in line_of(settings)
        gc.collect()  # a half-made profiler, whose end complains
        assert not RUNS.exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_on_2_processes_callbacks_watch_what_all_of_them_compute(strategy: str, run_command: Run) -> None:
    callbacks = [
        made("ModelCheckpoint", monitor="train/loss", every_n_train_steps=2, save_top_k=1, filename="{step}"),
        made("EarlyStopping", monitor="train/loss", patience=9),
        made("ModelPruning", pruning_fn="l1_unstructured", amount=0.2),
    ]
    trainer = {"callbacks": callbacks, "plugins": [made(f"{PLUGIN}AsyncCheckpointIO")]}
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    short = [
        "--trainer.limit_train_batches",
        "4",
        "--max_epochs",
        "2",
        "--config",
        "run.yaml",
        "--trainer.log_every_n_steps",
        "1",
    ]
    for devices in ("1", "2"):
        parts = ["--devices", devices, *(["--strategy", strategy] if devices == "2" else [])]
        done = run_command("lit_cifar.fit", *SHAPES, "--batch_size", "32", "--lr", "0.05", *short, *parts)
        assert done.returncode == 0, done.stderr
    one, two = (sorted(path.name for path in (RUNS / f"version_{n}" / "checkpoints").glob("step*")) for n in (0, 1))
    assert one == two


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--trainer.barebones true", "--trainer.barebones true leaves out"),
        ("--trainer.overfit_batches 0.01", "--trainer.overfit_batches 0.01 of"),
    ],
)
def test_a_setting_that_a_run_cannot_have_is_named(flags: str, words: str) -> None:
    assert words in line_of({}, *flags.split())
    assert not RUNS.exists()


def test_a_run_without_a_step_names_no_state() -> None:
    lit_cifar.fit.main([*FEW, "--max_epochs", "0"])
    assert results("version_0")["checkpoint"] is None


@pytest.mark.parametrize("settings", [{"max_steps": 10}, {"max_steps": 10, "max_epochs": -1}], ids=str)
def test_a_run_that_ends_by_steps_goes_on_from_the_end_of_an_epoch(settings: dict[str, int]) -> None:
    check_road(settings, [], ages=(2,))  # the states are of steps 3, 6, 7, 9 and 10


# ---- the lean loop and Lightning's ----

TRAINER_SETTINGS: list[dict[str, Any]] = [
    {},
    {"gradient_clip_val": 0.5},
    {"accumulate_grad_batches": 3},
    {"val_check_interval": 2},
    {"val_check_interval": 6, "check_val_every_n_epoch": None},
    {"check_val_every_n_epoch": 2},
    {"num_sanity_val_steps": 1},
    {"overfit_batches": 2},
    {"reload_dataloaders_every_n_epochs": 1},
    {"max_steps": 8},
    {"detect_anomaly": True},
    {"deterministic": True},
    {"inference_mode": False},
    {"limit_train_batches": 0.5},
    {"sync_batchnorm": True},
    {"use_distributed_sampler": True},
    {"model_registry": "name"},
    {"max_time": "00:01:00:00"},
    {"enable_checkpointing": False},
    {"enable_model_summary": True},
    {"fast_dev_run": 2},
    {"precision": "bf16-mixed"},
]


class OwnLoop(PassThroughProfiler):
    """Leaves all steps to Lightning's own loop, and does nothing else."""


class Recorder(Callback):
    """Notes each hook, with its arguments and what it finds in the Trainer and the module."""

    seen: list[Any] = []  # noqa: RUF012


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.double().sum().item()), value.requires_grad
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (int, float, str)) else type(value).__name__


def _recording(hook: str) -> Callable[..., None]:
    def record(self: Recorder, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        loop: Any = trainer.fit_loop.epoch_loop
        metrics = [
            {name: str(float(value)) for name, value in found.items() if not name.startswith("speed/")}
            for found in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        ]
        gradients = [parameter.grad is not None for parameter in pl_module.parameters()]
        progress = [loop.batch_progress.state_dict(), loop._batches_that_stepped, trainer.global_step]
        state = [torch.is_grad_enabled(), pl_module.training, pl_module._current_fx_name, trainer.current_epoch]
        self.seen.append((hook, [_plain(one) for one in args], metrics, gradients, progress, state))
        if hook in ("on_train_batch_start", "on_after_backward", "on_train_batch_end") and trainer.training:
            pl_module.log(f"recorder/{hook}", float(trainer.global_step), on_step=True, on_epoch=True, prog_bar=True)

    return record


for _hook in vars(Callback):
    if _hook.startswith("on_") and _hook not in ("on_save_checkpoint", "on_load_checkpoint", "on_exception"):
        setattr(Recorder, _hook, _recording(_hook))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(one, marks=[pytest.mark.slow] * (number > 3), id=str(one))
        for number, one in enumerate(TRAINER_SETTINGS)
    ],
)
def test_the_lean_loop_calls_all_that_lightnings_loop_calls(settings: dict[str, Any]) -> None:
    seen = []
    for profiler in ([], ["--trainer.profiler", "test_parts.OwnLoop"]):
        Path("run.yaml").write_text(yaml.safe_dump({"trainer": settings}))
        Recorder.seen = []
        recorder = ["--trainer.callbacks+=test_parts.Recorder", *profiler]
        lit_cifar.fit.main([*FEW, *VALIDATED, "--max_epochs", "2", *recorder, "--config", "run.yaml"])
        seen.append(Recorder.seen)
    assert {"on_train_batch_end", "on_before_optimizer_step", "on_test_end"} <= {call[0] for call in seen[0]}
    for lean, own in zip(*seen, strict=True):
        assert lean == own
    if not settings.get("fast_dev_run"):
        assert scalars("version_0") == scalars("version_1")
        assert_same(ends(RUNS / "version_0"), ends(RUNS / "version_1"))


# ---- docs/parts.md ----


def rows(heading: str) -> list[str]:
    """The names in the first column of the table below a heading."""
    section = re.split(r"^## ", (ROOT / "docs" / "parts.md").read_text(), flags=re.M)
    (text,) = (one for one in section if one.startswith(f"{heading}\n"))
    return re.findall(r"^\| `([^`]+)`", text, flags=re.M)


def test_each_row_of_the_page_exists_and_has_a_case() -> None:
    packages = ["callbacks", "plugins", "plugins.environments"]
    modules = [importlib.import_module(f"lightning.pytorch.{package}") for package in packages]
    cases = {name for key in (*CALLBACKS, *REFUSED) for name in key.split(" ")[0].split(",")}
    cases |= {name for key in CALLBACKS for name in key.split(", ")}
    assert rows("Callbacks")
    for row in rows("Callbacks"):
        assert hasattr(modules[0], row), row
        assert row in cases, row
    for heading, kinds in (("Strategies", STRATEGIES), ("Precisions", PRECISIONS), ("Profilers", PROFILERS)):
        assert set(rows(heading)) == set(kinds)
    assert set(rows("Plugins")) == set(PLUGINS)
    assert all(any(hasattr(module, row) for module in modules) for row in rows("Plugins"))
