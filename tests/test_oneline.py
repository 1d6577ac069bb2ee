"""What a person can fix ends in one line, whatever part complains; bugs of this package keep their traceback."""

import ast
import copy
import gc
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Run, error_of
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor, nn

import lit_cifar.fit
from lit_cifar import log
from lit_cifar.cli import blame, checks, machine
from lit_cifar.cli.command import CLI, set_up
from lit_cifar.cli.wording import gist
from lit_cifar.data import shapes
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError
from lit_cifar.model.check import check_training
from lit_cifar.model.classifier import load
from lit_cifar.model.module import LitClassifier
from lit_cifar.nets import Net
from lit_cifar.text import in_command, is_command
from lit_cifar.training import loop
from lit_cifar.training.progress import Progress

NUM_IMAGES = 121  # of which 20 are for validation, and the last of 101 makes a batch of its own
FLAGS = ["--dataset", "shapes", "--accelerator", "cpu", "--batch_size", "20", "--max_epochs", "1"]
FLAGS += ["--data.num_val", "20", "--data.num_workers", "0"]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = shapes.draw_shapes

    def draw_few(train: bool) -> Split:
        split = draw(train)
        few = copy.copy(split)
        object.__setattr__(few, "images", split.images[:NUM_IMAGES])
        object.__setattr__(few, "labels", split.labels[:NUM_IMAGES])
        return few

    monkeypatch.setattr(shapes, "draw_shapes", draw_few)


def fit(*flags: str) -> None:
    machine.explained(lit_cifar.fit.main, [*FLAGS, *flags])


def line_of(*flags: str) -> str:
    return error_of(fit, *flags)


def has_begun() -> bool:
    return Path("lightning_logs/version_0").exists()


# ---- parts that complain ----


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        ({"EarlyStopping": {"monitor": "nothing"}}, ["EarlyStopping: nothing", "val/accuracy, val/loss"]),
        ({"ModelCheckpoint": {"monitor": "nothing"}}, ["ModelCheckpoint: nothing", "val/loss"]),
        ({"EarlyStopping": {"monitor": "val/loss", "mode": "up"}}, ["EarlyStopping", "min, max, got up"]),
        ({"Timer": {"duration": "00:00:00"}}, ["Timer", "00:00:00"]),
        ({"RichProgressBar": {}}, ["RichProgressBar", "pip install -U rich"]),
        ({"ModelPruning": {"pruning_fn": "nothing"}}, ["ModelPruning", "nothing"]),
        ({"Nothing": {}}, ["--trainer.callbacks", "Nothing"]),
        ({"EarlyStopping": {}}, ["--trainer.callbacks", "arguments are required: monitor"]),
        ({"EarlyStopping": {"monitor": "val/loss", "patience": "x"}}, ["patience: expected int, got x"]),
        ({"faults.RefusesArguments": {}}, ["RefusesArguments", "width must be even"]),
    ],
    ids=str,
)
def test_a_callback_that_cannot_work_is_named_before_anything_is_written(
    callback: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    if "RichProgressBar" in callback:
        _skip_where_there_is("rich")
    callbacks = [{"class_path": name, "init_args": settings} for name, settings in callback.items()]
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    line = line_of("--config", "callbacks.yaml")
    assert all(word in line for word in words), line
    assert not has_begun()


def _skip_where_there_is(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        return
    pytest.skip(f"{package} is installed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--trainer.callbacks DeviceStatsMonitor", ["the callback DeviceStatsMonitor", "pip install -U 'psutil'"]),
        ("--trainer.callbacks LearningRateMonitor --trainer.logger false", ["LearningRateMonitor", "no logger"]),
        ("--trainer.val_check_interval 1000000", ["the Trainer", "1000000"]),
    ],
)
def test_a_part_that_complains_when_it_is_used_is_named(flags: str, words: list[str]) -> None:
    if "DeviceStats" in flags:
        _skip_where_there_is("psutil")
    line = line_of(*flags.split())
    assert all(word in line for word in words), line
    assert "--log_level debug" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--trainer.logger CSVLogger --trainer.logger.save_dir /dev/null/x",
            ["CSVLogger cannot", "/dev/null/x"],
        ),
        ("--trainer.logger WandbLogger", ["WandbLogger", "pip install"]),
        ("--trainer.logger MLFlowLogger", ["MLFlowLogger", "pip install"]),
        ("--trainer.logger CometLogger", ["CometLogger", "pip install"]),
        ("--trainer.profiler nonsense", ["profiler", "simple"]),
        ("--trainer.limit_test_batches 0.01", ["--trainer.limit_test_batches 0.01", "no batch", "choose"]),
        ("--trainer.limit_train_batches 0.001", ["--trainer.limit_train_batches 0.001", "no batch"]),
        ("--trainer.limit_val_batches 0.1 --data.num_val 50", ["--trainer.limit_val_batches 0.1", "no batch"]),
        ("--trainer.profiler XLAProfiler", ["XLAProfiler", "torch_xla"]),
        ("--precision transformer-engine", ["TransformerEnginePrecision", "transformer_engine"]),
        ("--strategy deepspeed", ["DeepSpeed", "pip install"]),
        ("--strategy xla", ["XLAStrategy", "torch_xla"]),
        ("--strategy ddp_spawn", ["--strategy ddp_spawn", "use --strategy ddp"]),
        ("--strategy ddp_spawn --devices 2", ["--strategy ddp_spawn", "use --strategy ddp"]),
        ("--strategy ddp_notebook --devices 2", ["--strategy ddp_notebook", "use --strategy ddp"]),
        ("--strategy ddp_fork --devices 2", ["--strategy ddp_fork", "use --strategy ddp"]),
        ("--strategy fsdp", ["fsdp"]),
        ("--strategy nonsense", ["nonsense"]),
        ("--accelerator tpu", ["XLAAccelerator", "torch_xla"]),
        ("--devices 0", ["devices='0'"]),
        ("--trainer.plugins TorchCheckpointIO", ["CheckpointIO"]),
        ("--trainer.callbacks TQDMProgressBar --trainer.enable_progress_bar false", ["TQDMProgressBar"]),
        ("--checkpoint.monitor nothing", ["--checkpoint.monitor nothing", "val/accuracy"]),
        ("--trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/loss --data.num_val 0", ["--data.num_val"]),
        ("--seed -1", ["--seed: expected a number at least 0 and at most 4294967295, got -1"]),
        ("--seed 4294967296", ["--seed: expected", "got 4294967296"]),
        ("--trainer.accumulate_grad_batches 0", ["--trainer.accumulate_grad_batches 0", "1 or more"]),
        ("--trainer.accumulate_grad_batches -2", ["--trainer.accumulate_grad_batches -2", "1 or more"]),
        ("--trainer.check_val_every_n_epoch 0", ["--trainer.check_val_every_n_epoch 0", "1 or more"]),
        ("--trainer.val_check_interval 0", ["--trainer.val_check_interval 0", "above 0"]),
        ("--trainer.log_every_n_steps -1", ["--trainer.log_every_n_steps -1", "0 or more"]),
        ("--trainer.gradient_clip_val -1", ["--trainer.gradient_clip_val -1", "0 or more"]),
        ("--trainer.min_epochs 5", ["--trainer.min_epochs 5", "--trainer.max_epochs 1"]),
        ("--trainer.max_time garbage", ["garbage", "DD:HH:MM:SS"]),
        ("--max_epochs -2", ["max_epochs"]),
        ("--data.transform [torchvision.transforms.v2.RandomCrop]", ["--data.transform", "required: size"]),
        ("--trainer.fast_dev_run -1", ["fast_dev_run=-1"]),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Lightning's half-made XLAProfiler
def test_settings_that_cannot_work_end_in_one_line_and_nothing_is_written(flags: str, words: list[str]) -> None:
    for name, package in (("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow"), ("CometLogger", "comet_ml")):
        if name in flags:
            _skip_where_there_is(package)
    line = line_of(*flags.split())
    gc.collect()
    assert all(word in line for word in words), line
    assert len(line) < 700
    assert not has_begun()


def test_a_transform_for_whole_batches_is_refused() -> None:
    mix = '[{"class_path": "torchvision.transforms.v2.MixUp", "init_args": {"num_classes": 10}}]'
    assert "MixUp" in (line := line_of("--data.transform", mix))
    assert "a transform gets one image at a time" in line


def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for port in ("abc", "99999999", "-1"):
        monkeypatch.setenv("MASTER_PORT", port)
        assert f"MASTER_PORT={port} is no port" in line_of("--devices", "2")
    fit("--trainer.fast_dev_run", "true")  # alone it needs none


def test_what_own_callbacks_may_log_is_not_judged_beforehand() -> None:
    watch = '{"class_path": "EarlyStopping", "init_args": {"monitor": "own/value"}}'
    fit("--trainer.callbacks", f'[{watch}, "faults.LogsAValue"]')
    assert has_begun()


# ---- nets ----


class Linear(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(3072, num_classes)

    def forward(self, images: Tensor) -> Any:
        return self.head(images.flatten(1))


class GivesDict(Linear):
    def forward(self, images: Tensor) -> Any:
        return {"logits": super().forward(images)}


class GivesTupleInTraining(Linear):
    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


class GivesThreeDimensions(Linear):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[:, :, None]


class GivesOneDimension(Linear):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[:, 0]


class GivesIntegers(Linear):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).long()


class For224(Linear):
    def forward(self, images: Tensor) -> Any:
        assert images.shape[-1] == 224, "want 224"


class Double(Linear):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.double()


class Frozen(Linear):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.requires_grad_(False)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        raise KeyError("width")


class Huge(Linear):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images) + torch.empty(2**46).sum()


class Normed(nn.Sequential):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, num_classes))


class Lazy(nn.Sequential):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.LazyConv2d(4, 3, 2), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(num_classes))


def no_net(num_classes: int = 10) -> nn.Module:
    return num_classes  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("net", "words"),
    [
        ("GivesDict", ["GivesDict gives dict", "(B, K)"]),
        ("GivesTupleInTraining", ["GivesTupleInTraining gives tuple in training", "(B, K)"]),
        ("GivesThreeDimensions", ["(1, 10, 1)", "(B, K)"]),
        ("GivesOneDimension", ["(1,)", "(B, K)"]),
        ("GivesIntegers", ["torch.int64"]),
        ("For224", ["3x32x32", "want 224"]),
        ("Double", ["3x32x32", "dtype"]),
        ("Frozen", ["no parameter to train"]),
        ("Broken", ["Broken", "test_oneline.py:", "in __init__", "KeyError: 'width'"]),
        ("Huge", ["not enough memory", "--batch_size"]),
        ("Normed", ["BatchNorm of Normed", "--data.drop_last true"]),
        ("no_net", ["int", "torch.nn.Module"]),
        ("torchvision.models.alexnet", ["AlexNet cannot use images of 3x32x32"]),
        ("torchvision.models.densenet", ["torchvision.models.densenet"]),
        ("torch.nn.Identity", ["Identity gives a tensor (1, 3, 32, 32)"]),
        ("nothing.Net", ["--model.net: nothing.Net: No module named 'nothing'"]),
    ],
)
def test_a_net_that_cannot_be_trained_is_refused_before_anything_is_written(net: str, words: list[str]) -> None:
    line = line_of("--model.net", net if "." in net else f"test_oneline.{net}")
    assert all(word in line for word in words), line
    assert not has_begun()


def test_a_net_whose_extra_logits_can_be_left_out_is_told_how() -> None:
    line = line_of("--model.net", "torchvision.models.googlenet", "--model.net.init_weights", "false")
    assert "GoogLeNetOutputs in training" in line
    assert line.endswith("--model.net.aux_logits false")


def test_sides_that_a_net_cannot_take_are_refused() -> None:
    assert "Net cannot use images of 3x24x24" in line_of("--model.sides", "[24, 32]")
    assert not has_begun()


def test_a_net_of_its_modules_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("from own_package.OwnNet import OwnNet\n")
    (tmp_path / "own_package" / "OwnNet.py").write_text("from test_oneline import Linear\nclass OwnNet(Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    fit("--model.net", "own_package.OwnNet")
    command = set_up([*FLAGS, "--model.net", "torchvision.models.alexnet"], prog="test", description="")
    assert command.plain_config["model"]["net"]["init_args"]["num_classes"] == 10


def test_lazy_layers_get_their_shapes_before_anybody_asks_for_them() -> None:
    fit("--model.net", "test_oneline.Lazy", "--model.net.num_classes", "10", "--data.drop_last", "true")
    fit("--resume", "auto", "--max_epochs", "2", "--trust", "true")


def test_trying_a_net_changes_nothing_of_it() -> None:
    module = LitClassifier(Normed())
    module.net[3].eval()
    random_state, before = torch.get_rng_state(), copy.deepcopy(module.net.state_dict())
    module.set_classes(tuple("0123456789"))
    check_training(module, {20})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in module.net.state_dict().items())
    assert [layer.training for layer in module.net] == [True, True, True, False, True]


# ---- parts that take another's place, and settings that YAML has no form for ----


def test_a_progress_bar_that_is_chosen_takes_the_place_of_ours() -> None:
    for flags in ([], ["--trainer.enable_progress_bar", "true"]):
        args = [*FLAGS, "--trainer.callbacks", "TQDMProgressBar", *flags]
        trainer = CLI(args, prog="test", description="", logs=False).trainer
        assert type(trainer.progress_bar_callback) is TQDMProgressBar
        assert sum(isinstance(callback, TQDMProgressBar) for callback in trainer.callbacks) == 1


@pytest.mark.parametrize(
    ("callback", "settings", "expected"),
    [
        ("Timer", {"duration": "00:00:10:00"}, {"interval": "step"}),
        ("StochasticWeightAveraging", {"swa_lrs": 0.01}, {"device": "cpu"}),
        ("ModelPruning", {"pruning_fn": "l1_unstructured"}, {"pruning_fn": "l1_unstructured"}),
    ],
)
def test_a_callbacks_settings_can_be_written_and_read_again(
    callback: str, settings: dict[str, Any], expected: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--trainer.callbacks", callback]
    for key, value in settings.items():
        flags += [f"--trainer.callbacks.{key}", str(value)]
    first = CLI([*FLAGS, *flags], prog="test", description="", logs=False)
    written = first.plain_config["trainer"]["callbacks"]
    (written,) = written if isinstance(written, list) else [written]
    assert expected.items() <= {**dict.fromkeys(expected), **written["init_args"]}.items()
    Path("config.yaml").write_text(yaml.safe_dump(first.plain_config))
    again = CLI(["--config", "config.yaml"], prog="test", description="", logs=False)
    assert again.plain_config == first.plain_config
    assert "serialize" not in capfd.readouterr().err


def test_gradients_are_clipped_in_mixed_precision() -> None:
    fit("--precision", "bf16-mixed", "--trainer.gradient_clip_val", "1")


# ---- bugs of this package, and of those who write their own parts ----


@pytest.mark.parametrize(
    ("owner", "function"),
    [
        (Progress, "on_train_start"),
        (Progress, "on_train_batch_end"),
        (Progress, "_gradient_norm"),
        (LitClassifier, "training_step"),
        (LitClassifier, "_evaluate"),
        (LitClassifier, "configure_optimizers"),
        (Net, "forward"),
        (loop.LeanEpochLoop, "_find_obstacle"),
        (CLI, "results"),
        (checks, "check_ranges"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("way", ["found by torch", "by Python"])
def test_a_bug_of_ours_keeps_its_traceback(
    owner: Any, function: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # compiled as if it stood in the owner's file, which is what decides
    module = sys.modules[owner.__module__] if isinstance(owner, type) else owner
    body = "cross_entropy(None, None)" if way == "found by torch" else "raise TypeError('a bug of ours')"
    scope: dict[str, Any] = {"cross_entropy": nn.functional.cross_entropy}
    exec(compile(f"def {function}(*args, **kwargs):\n    {body}\n", str(module.__file__), "exec"), scope)
    monkeypatch.setattr(owner, function, scope[function])
    with pytest.raises(TypeError) as raised:
        fit("--trainer.log_every_n_steps", "1")
    assert blame.explain(raised.value) is None


def test_a_bug_of_ours_in_what_a_trainer_calls_is_none_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_train_start(self: Progress, trainer: Trainer, pl_module: LitClassifier) -> None:
        raise UserWarning("raised by a test's file: the user's own")

    monkeypatch.setattr(Progress, "on_train_start", on_train_start)
    with pytest.raises(UserWarning):
        fit()


class OwnCallback(Callback):
    """Fails in one of its hooks."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("in a file of mine")


@pytest.mark.parametrize("hook", ["setup", "on_train_start", "on_train_batch_end", "state_dict", "on_test_end"])
def test_what_fails_in_somebodys_own_file_keeps_its_traceback(hook: str) -> None:
    with pytest.raises(ZeroDivisionError):
        fit("--trainer.callbacks", "test_oneline.OwnCallback", "--trainer.callbacks.hook", hook)


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_transform_of_ones_own_that_fails_on_an_image_names_the_place(num_workers: str) -> None:
    line = line_of("--data.transform", "[faults.RefusesAnImage]", "--data.num_workers", num_workers)
    assert "RefusesAnImage fails (ValueError: a bad image, in " in line
    assert "faults.py:" in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPUAllocator"),
    ],
)
def test_where_memory_is_short_the_place_does_not_matter(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(Progress, "on_train_start", fail)
    line = line_of()
    assert words in line
    assert "--batch_size" in line


def test_at_level_debug_the_traceback_comes_before_the_line(run_command: Run) -> None:
    _skip_where_there_is("psutil")
    flags = [*FLAGS, "--trainer.callbacks", "DeviceStatsMonitor", "--log_level", "debug"]
    done = run_command("lit_cifar.fit", *flags)
    assert done.returncode == 2
    before, line = done.stderr.rsplit("lit_cifar: error: ", 1)
    assert "Traceback" in before
    assert "device_stats_monitor.py" in before
    assert len(line.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.slow
def test_a_parameter_without_use_on_two_devices_ends_in_one_line(run_command: Run) -> None:
    flags = [*FLAGS, "--devices", "2", "--data.drop_last", "true", "--model.net", "faults.WithoutUse"]
    done = run_command("lit_cifar.fit", *flags)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "--strategy ddp_find_unused_parameters_true" in line


@pytest.mark.slow
@pytest.mark.slow
def test_what_one_process_alone_finds_is_said_by_it(run_command: Run) -> None:
    flags = ["--devices", "2", "--data.drop_last", "true", "--trainer.callbacks", "faults.NoMemory"]
    done = run_command("lit_cifar.fit", *FLAGS, *flags, "--trainer.callbacks.rank", "1")
    assert "lit_cifar: error: rank 1 on " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_reason_that_matters_is_found_among_jsonargparses() -> None:
    message = (
        "Does not validate against any of the Union subtypes\nSubtypes: [a]\nErrors:\n  - Expected a <class 'list'>\n"
        "  - Import path does not correspond to a subclass of B\n"
        "  - Problem with given class_path 'a.B':\n      no such\n      thing\n  - Expected a <class 'NoneType'>\n"
        "Given value type: <class 'str'>\nGiven value: - x"
    )
    assert gist(message) == "a.B: no such thing"
    assert gist("something else") == "something else"


def test_a_process_whose_partner_is_gone_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(args: list[str]) -> None:
        raise RuntimeError("[gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:8579")

    monkeypatch.setattr(sys, "argv", ["fit"])
    with pytest.raises(SystemExit) as done:
        machine.run(lose)
    assert done.value.code == 1, "a restart may help"
    assert capsys.readouterr().err == "lit_cifar: another process of this run has ended: see its error, if it had one\n"


def test_a_net_with_lazy_layers_is_loaded_again() -> None:
    fit("--model.net", "test_oneline.Lazy", "--data.drop_last", "true")
    net, classes = load("lightning_logs/version_0/checkpoints/last.ckpt", trust=True)
    assert net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, len(classes))


# ---- what settings are called ----


def messages() -> list[str]:
    """Texts of the package that name a flag and can come out of Python; what fills them is 3."""
    found = []
    package = Path(lit_cifar.__file__).parent
    rooms = ("model", "data", "run", "results", "training")
    for path in (path for room in rooms for path in sorted((package / room).glob("*.py"))):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "3" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | parts:
                text = node.value
            if re.search(r"--[a-z_.]+", text) and " " in text:
                found.append(text)
    return found


def test_every_message_names_arguments_in_python_and_flags_in_a_command() -> None:
    assert len(messages()) > 40
    for message in messages():
        said = str(UserError(message))
        assert not re.search(r"(?<![\w-])--(?!shm-size)", said), said
        assert not re.search(r"=(true|false|null)\b|  |\bwith \w+$", said), said
        with in_command():
            assert str(UserError(message)) == message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model.lr -1 is out of range", "lr=-1 is out of range"),
        ("--model.lr nan is out of range", "lr=nan is out of range"),
        (
            "add --data.drop_last true, or choose another --batch_size",
            "add drop_last=True, or choose another batch_size",
        ),
        ("set --model.net.num_classes 10", "set net.num_classes=10"),
        ("--model.optimizer torch.optim.AdamW fails", "optimizer='torch.optim.AdamW' fails"),
        ("--data_dir a/b c has", "data_dir='a/b' c has"),
        ("name them with --data_dir, or stop", "name them with data_dir=..., or stop"),
        ("needs an end: set --max_epochs or --trainer.max_steps", "needs an end: set max_epochs or max_steps"),
        ("add --trust true", "add trust=True"),
        ("go on with --resume a/last.ckpt", "go on with ckpt_path='a/last.ckpt'"),
        ("choose --precision 32-true.", "choose precision='32-true'."),
        ("--data.mirrors names none", "mirrors names none"),
        ("fix it; --log_level debug prints more", "fix it"),
        ("in docker by --shm-size 1g", "in docker by --shm-size 1g"),
        ("the file a--model.lr 3.png", "the file a--model.lr 3.png"),
    ],
)
def test_a_flag_and_its_value_in_python(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(UserError(flags)) == str(UserError(said)) == said
    log.warn(flags)
    assert capsys.readouterr().err == f"lit_cifar: warning: {said}\n"


def test_a_command_that_is_called_as_a_function_names_flags_and_leaves_no_trace() -> None:
    assert "--data.num_val 121 takes" in error_of(lit_cifar.fit.main, [*FLAGS, "--data.num_val", "121"])
    assert not is_command()
    assert error_of(CIFAR10DataModule(dataset="shapes", num_val=121).setup).startswith("num_val=121 takes")
