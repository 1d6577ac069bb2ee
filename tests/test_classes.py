"""A subclass of LitClassifier in its place, with --model, and what LightningCLI's users write besides."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import SHORT, error_of, make_tree, results, weights
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lit_cifar.bench
import lit_cifar.export
import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.test
from lit_cifar import load
from lit_cifar.cli.command import CLI
from lit_cifar.model.module import LitClassifier

QUICK = [*SHORT, "--trainer.max_steps", "2", "--trainer.limit_test_batches", "1"]
MINE = ["--model", "test_classes.Scaled"]
RUN = Path("lightning_logs/version_0")
LAST = str(RUN / "checkpoints/last.ckpt")


class Scaled(LitClassifier):
    """A loss of its own.

    Args:
        factor: the loss is multiplied by.
    """

    factors: tuple[float, ...] = ()  # of those that were made

    def __init__(self, net: nn.Module, factor: float = 2.0, lr: float = 0.125, **settings: Any) -> None:
        super().__init__(net, lr, **settings)
        self.factor = factor
        Scaled.factors += (factor,)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1]) * self.factor


class NoNet(LitClassifier):
    def __init__(self, width: int = 3) -> None:
        super().__init__(nn.Linear(width, width))


class Few(LitClassifier):
    def __init__(self, net: nn.Module, width: int = 3) -> None:
        super().__init__(net)


class Another(LightningModule):
    pass


def settings_of(args: list[str]) -> Any:
    return CLI(args, prog="test", description="", build=False).config


@pytest.mark.parametrize("factor", [[], ["--model.factor", "3"], ["--model.init_args.factor=3"]])
@pytest.mark.parametrize("name", [MINE, ["--model.class_path=test_classes.Scaled"], [f"--model_class={MINE[1]}"]])
def test_a_class_and_its_arguments_may_be_typed_as_in_lightningcli(name: list[str], factor: list[str]) -> None:
    config = settings_of([*name, *factor, "--lr", "0.5"])
    assert (config.model_class, config.model.factor, config.model.lr) == (MINE[1], 3.0 if factor else 2.0, 0.5)


@pytest.mark.parametrize(
    "config",
    [
        {"model_class": MINE[1], "model": {"factor": 3, "lr": 0.5}},
        {"model": {"class_path": MINE[1], "init_args": {"factor": 3, "lr": 0.5}}},
        {"model": {"class_path": MINE[1], "factor": 3, "lr": 0.5}},
    ],
)
def test_a_class_may_be_named_in_yaml_flat_and_as_in_lightningcli(config: dict[str, Any]) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    found = settings_of(["--config", "mine.yaml", "--lr", "0.25"])
    assert (found.model_class, found.model.factor, found.model.lr) == (MINE[1], 3.0, 0.25)
    assert found.model.net.class_path == "lit_cifar.nets.Net"


def test_help_has_a_classs_own_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([*MINE, "--help", "model"], ["--help=model", *MINE]):
        with pytest.raises(SystemExit):
            lit_cifar.fit.main(flags)
        assert "the loss is multiplied by" in " ".join(capsys.readouterr().out.split())


def test_a_class_with_few_arguments_has_no_flags_of_the_others() -> None:
    assert "unknown flag --compile" in error_of(settings_of, ["--model", "test_classes.Few", "--compile", "true"])
    assert settings_of(["--model", "test_classes.Few", "--model.width", "4"]).model.width == 4


def test_a_class_travels_with_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.fit.main([*QUICK, *MINE, "--model.factor", "3", "--model.label_smoothing", "0.1"])
    checkpoint = torch.load(LAST, weights_only=True)
    assert checkpoint["lit_cifar"]["config"]["model_class"] == MINE[1]
    lit_cifar.fit.main([*QUICK, "--config", str(RUN / "config.yaml")])
    assert all(torch.equal(weight, weights("version_1")[name]) for name, weight in weights("version_0").items())

    test = ["--ckpt_path", LAST, "--trainer.limit_test_batches", "1"]
    resume = ["--resume", str(RUN), "--trainer.max_steps", "4"]
    for command, args in ((lit_cifar.test.main, test), (lit_cifar.fit.main, [*resume, "--model.factor", "4"])):
        line = error_of(command, args)
        assert "test_classes.Scaled" in line
        assert "--trust true" in line
        Scaled.factors = ()
        command([*args, "--trust", "true"])
        assert Scaled.factors == ((3.0,) if command is lit_cifar.test.main else (4.0,))
    assert results("version_0")["num_steps"] == 4

    capsys.readouterr()
    image = make_tree(Path("tree"), ("cat",)) / "test/cat/0.png"
    lit_cifar.predict.main(["--ckpt_path", LAST, str(image)])  # the net alone, which anybody may make
    lit_cifar.export.main(["--ckpt_path", LAST, "--output", "net.pt2"])
    assert load(LAST)[0](torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 10)


def test_a_class_of_a_stranger_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    lit_cifar.fit.main([*QUICK, *MINE])
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["lit_cifar"]["config"]["model_class"] = "antigravity.Module"
    torch.save(checkpoint, "theirs.ckpt")
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    for command, flag in ((lit_cifar.test.main, "--ckpt_path"), (lit_cifar.fit.main, "--resume")):
        assert "antigravity.Module" in error_of(command, [flag, "theirs.ckpt"])
    assert "antigravity" not in sys.modules


def test_a_class_is_measured_as_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"class_path": MINE[1], "init_args": {"factor": 3}}}))
    lit_cifar.bench.main(["mine.yaml", "--stage", "step", "--runs", "1", *SHORT, "--trainer.max_steps", "4"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["config"] == "mine.yaml"
    assert Scaled.factors[-1] == 3.0


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("test_classes.NoNet", "takes no net: give its __init__ a parameter net, or **settings for super().__init__"),
        (
            "test_classes.Another",
            "is no subclass of lit_cifar.LitClassifier: train it on CIFAR10DataModule in a plain Trainer, see "
            "docs/in-your-own-code.md",
        ),
        ("lit_cifar.nets.Net", "is no subclass of lit_cifar.LitClassifier: name a net with --model.net"),
        ("test_classes.Missing", "cannot be imported: module 'test_classes' has no attribute 'Missing'"),
        ("Scaled", "cannot be imported: name it as package.Class"),
        ("mine.yaml", "it takes a class, named as package.Class; settings in a file go to --config"),
    ],
)
def test_what_cannot_be_the_module_is_told(name: str, end: str) -> None:
    line = error_of(settings_of, ["--model", name, "--model.factor", "3"])
    assert line.startswith(f"--model {name}")
    assert line.endswith(end)


def test_a_mistyped_argument_of_a_class_is_told_with_the_nearest_one() -> None:
    assert error_of(settings_of, [*MINE, "--model.facto", "3"]).startswith(
        "unknown flag --model.facto (did you mean --model.factor?)"
    )
    assert error_of(settings_of, [*MINE, "--model.factor", "x"]) == "--model.factor: expected float, got x"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["fit", "--lr", "0.1"], "leave the word fit out: lit_cifar.fit trains, then tests once"),
        (["test", "--lr", "0.1"], "lit_cifar.fit trains; the other command is python -m lit_cifar.test"),
        (["validate"], "lit_cifar.fit validates as it trains, with --data.num_val 5000"),
        (["--ckpt_path", "x.ckpt"], "goes on with a run by --resume FILE"),
        (["--config", "ckpt.yaml"], "goes on with a run by --resume FILE"),
        (["--data", "MyData"], "data takes no class: images of your own are --data_dir FOLDER"),
        (["--data.class_path", "my.Data"], "data takes no class"),
        (["--config", "data.yaml"], "data takes no class"),
        (["--trainer", "my.Trainer"], "--trainer takes no class"),
        (
            ["--trainer.logger.init_args.save_dir", "x"],
            "--trainer.logger: its settings come after its class: --trainer.logger MyLogger --trainer.logger.SETTING",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_lightningclis_users_write_ends_in_the_line_that_works(args: list[str], line: str) -> None:
    Path("ckpt.yaml").write_text("ckpt_path: null")
    Path("data.yaml").write_text("data: {class_path: my.Data, init_args: {width: 3}}")
    assert line in error_of(settings_of, args)
