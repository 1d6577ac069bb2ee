"""Nets as people name them with --model.net: timm, torchvision, functions without annotations, partials, **kwargs."""

import functools
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import SHORT, Run, assert_same_run, error_of, make_tree, results, weights
from torch import Tensor, nn

import lit_cifar.export
import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.test
from lit_cifar import load
from lit_cifar.cli import blame

QUICK = [*SHORT, "--trainer.max_steps", "2", "--trainer.limit_test_batches", "1"]
TIMM = ["--model.net", "timm.create_model", "--model.net.model_name", "test_resnet"]
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"


def net_of(run: str = "version_0") -> dict[str, Any]:
    """The net's settings in a run's config."""
    return yaml.safe_load(Path("lightning_logs", run, "config.yaml").read_text())["model"]["net"]


def blamed(*args: str) -> str:
    """The line that a command ends in, of whatever kind its exception is."""
    try:
        lit_cifar.fit.main([*QUICK, *args])
    except Exception as error:
        line = blame.explain(error)
        assert line, "an error of the user's"
        return line
    raise AssertionError("it goes well")


class Linear(nn.Sequential):
    def __init__(self, num_classes: int = 10, width: int = 4) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, num_classes))


class Package:
    class Nested(Linear):
        pass


class Labelled(Linear):
    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels)


class Fixed(Linear):
    def __init__(self) -> None:
        super().__init__(7)


class Seven(Linear):
    def __init__(self, n_classes: int = 7) -> None:
        super().__init__(n_classes)


class HandsOn(Linear):
    def __init__(self, depth: int = 1, **settings: Any) -> None:
        super().__init__(**settings)


class Lazy(nn.Sequential):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))


def untyped(num_classes, width=4):  # type: ignore[no-untyped-def]
    return Linear(num_classes, width)


def anything(*args, **settings):  # type: ignore[no-untyped-def]
    return Linear(*args, **settings)


def by_name(name: str, **settings: Any):  # type: ignore[no-untyped-def]
    return globals()[name](**settings)


partial = functools.partial(Linear, width=3)
made = Linear()


# ---- the number of classes ----


@pytest.mark.parametrize(
    "flags",
    [
        TIMM,
        [*TIMM, "--model.net.num_classes", "3", "--model.net.drop_rate", "0.1"],
        ["--model.net", "timm.models.test_resnet"],
        ["--model.net", "timm.models.byobnet.test_byobnet"],
        ["--model.net", "torchvision.models.get_model", "--model.net.name", "mobilenet_v3_small"],
        ["--model.net", "torchvision.models.mobilenet_v3_small"],
        ["--model.net", "test_named_nets.untyped"],
        ["--model.net", "test_named_nets.anything", "--model.net.width", "2"],
        ["--model.net", "test_named_nets.partial"],
        ["--model.net", "test_named_nets.Package.Nested"],
        ["--model.net", "test_named_nets.HandsOn", "--model.net.width", "2"],
        ["--model.net", "test_named_nets.by_name", "--model.net.name", "Linear"],
        ["--model.net", "test_named_nets.by_name", "--model.net.name", "Labelled", "--model.net.num_labels", "3"],
        ["--model.net", "test_named_nets.Labelled", "--model.net.num_labels", "3"],
        ["--model.net", "test_named_nets.Lazy"],
    ],
    ids=lambda flags: " ".join(flags[1::2]),
)
def test_a_net_gets_the_number_of_classes_however_it_takes_it(flags: list[str], tmp_path: Path) -> None:
    if "timm" in flags[1]:
        pytest.importorskip("timm")
    tree = make_tree(tmp_path / "tree", ("cat", "dog", "emu"))
    args = ["--data_dir", str(tree), "--accelerator", "cpu", "--batch_size", "4", "--trainer.max_steps", "1"]
    lit_cifar.fit.main([*args, *flags])
    net, classes = load(LAST, trust=True)
    assert net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 3)
    assert tuple(classes) == ("cat", "dog", "emu")


@pytest.mark.parametrize(
    ("net", "end"),
    [
        ("Seven", "set --model.net.n_classes 10"),
        ("Fixed", "give it a parameter num_classes, or change its last layer in a function that you name as the net"),
    ],
)
def test_a_wrong_number_of_logits_names_the_setting_that_there_is(net: str, end: str) -> None:
    line = error_of(lit_cifar.fit.main, [*QUICK, "--model.net", f"test_named_nets.{net}"])
    assert line == f"{net} gives 7 logits but the data has 10 classes: {end}"


# ---- what is handed on by **kwargs ----


def test_what_timm_takes_through_kwargs_is_the_same_as_a_flag_and_in_yaml() -> None:
    pytest.importorskip("timm")
    lit_cifar.fit.main([*QUICK, *TIMM, "--model.net.drop_rate", "0.25", "--model.net.zero_init_last", "false"])
    lit_cifar.fit.main([*QUICK, "--config", "lightning_logs/version_0/config.yaml"])
    settings = {"model_name": "test_resnet", "drop_rate": 0.25, "zero_init_last": False}
    net = {"class_path": "timm.create_model", "init_args": settings}
    Path("net.yaml").write_text(yaml.safe_dump({"model": {"net": net}}))
    lit_cifar.fit.main([*QUICK, "--config", "net.yaml", "--model.net.drop_rate", "0.25"])
    for run in ("version_0", "version_1", "version_2"):
        assert net_of(run)["dict_kwargs"] == {"drop_rate": 0.25, "zero_init_last": False, "num_classes": 10}
    assert_same_run("version_0", "version_1")
    assert_same_run("version_0", "version_2")


def test_what_was_handed_on_to_one_net_is_not_handed_on_to_another() -> None:
    net = {"class_path": "test_named_nets.anything", "init_args": {"num_classes": 10, "width": 2}}
    Path("net.yaml").write_text(yaml.safe_dump({"model": {"net": net}}))
    lit_cifar.fit.main([*QUICK, "--config", "net.yaml", "--model.net", "test_named_nets.Linear"])
    assert net_of() == {"class_path": "test_named_nets.Linear", "init_args": {"num_classes": 10, "width": 4}}


def test_a_mistyped_setting_of_a_net_is_told_with_the_nearest_one() -> None:
    line = error_of(lit_cifar.fit.main, ["--model.net", "test_named_nets.untyped", "--model.net.widht", "3"])
    assert line == "--model.net: unknown key 'widht' (did you mean width?)"
    line = error_of(lit_cifar.fit.main, ["--model.net", "test_named_nets.Labelled"])
    assert line == "--model.net: it needs more settings: add --model.net.num_labels VALUE"


# ---- on what it leaves ----


def test_a_run_of_a_timm_net_is_tested_predicted_exported_and_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    lit_cifar.fit.main([*QUICK, *TIMM])
    for command, args in (
        (lit_cifar.test.main, ["--ckpt_path", LAST, "--trainer.limit_test_batches", "1"]),
        (lit_cifar.export.main, ["--ckpt_path", LAST, "--output", "net.pt2"]),
        (lit_cifar.predict.main, ["--ckpt_path", LAST, str(make_tree(Path("tree"), ("cat",)) / "test/cat/0.png")]),
        (lit_cifar.fit.main, ["--resume", "auto", "--trainer.max_steps", "4"]),
    ):
        line = error_of(command, args)
        assert "timm.create_model" in line
        assert "--trust true" in line
        command([*args, "--trust", "true"])
    assert results("version_0")["num_steps"] == 4
    lit_cifar.fit.main([*SHORT, *TIMM, "--trainer.max_steps", "4", "--trainer.limit_test_batches", "1"])
    ours, whole = weights("version_0"), weights("version_1")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


halfway = functools.partial(Linear, width=3)


@pytest.mark.parametrize("name", ["untyped", "halfway"])
def test_a_run_of_a_function_without_types_is_tested_and_resumed(name: str) -> None:
    lit_cifar.fit.main([*QUICK, "--model.net", f"test_named_nets.{name}"])
    again = ["--trust", "true", "--trainer.limit_test_batches", "1"]
    lit_cifar.test.main(["--ckpt_path", LAST, *again])
    lit_cifar.fit.main(["--resume", "auto", "--trainer.max_steps", "4", *again])
    assert net_of()["class_path"] == f"test_named_nets.{name}"


@pytest.mark.slow
def test_a_net_in_a_file_here_is_found_by_every_process(run_command: Any, tmp_path: Path) -> None:
    lines = (
        "import timm",
        "def net(num_classes):",
        "    return timm.create_model('test_resnet', num_classes=num_classes)",
    )
    (tmp_path / "my_net.py").write_text("\n".join(lines))
    pytest.importorskip("timm")
    flags = [*QUICK, "--model.net", "my_net.net", "--devices", "2"]
    done = run_command("lit_cifar.fit", *flags)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "lightning_logs/version_0")["devices"] == 2


# ---- one line ----


@pytest.mark.parametrize("weights", ["ResNet18_Weights.DEFAULT", "DEFAULT", "IMAGENET1K_V1"])
def test_weights_by_name_say_what_to_do_about_their_classes(weights: str) -> None:
    line = blamed("--model.net", "torchvision.models.resnet18", "--model.net.weights", weights)
    assert line.startswith(
        "torchvision.models.resnet18 failed to be made of its settings: ValueError: The parameter 'num"
    )
    assert "replace its last layer in a function of your own, or take timm.create_model with pretrained true" in line


def test_weights_that_cannot_be_fetched_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = blamed(
        "--model.net", "timm.create_model", "--model.net.model_name", "resnet18", "--model.net.pretrained=true"
    )
    assert line.startswith("timm.create_model failed to be made of its settings")
    assert "fetch them where there is a network" in line


def test_timm_where_it_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    blocker = SimpleNamespace(find_spec=_without_timm)
    monkeypatch.setattr(sys, "meta_path", [blocker, *sys.meta_path])
    line = error_of(lit_cifar.fit.main, [*QUICK, *TIMM])
    assert line == "--model.net: timm.create_model: timm is not installed: pip install 'lit_cifar[timm]'"


def _without_timm(name: str, path: object = None, target: object = None) -> None:
    if name == "timm":
        raise ModuleNotFoundError("No module named 'timm'", name="timm")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = undefined", "NameError at {place}:1: name 'undefined' is not defined"),
        ("def x(:", "SyntaxError: invalid syntax (mine{number}.py, line 1)"),
        ("import missing_package", "No module named 'missing_package'"),
        ("from helpers import nothing", "cannot import name 'nothing' from 'helpers'"),
        ("y = 1", "module 'mine{number}' has no attribute 'x'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_the_cause(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: "itertools.count[int]"
) -> None:
    number = next(numbers)
    monkeypatch.syspath_prepend(tmp_path)
    place = tmp_path / f"mine{number}.py"
    place.write_text(text)
    reason = reason.format(place=place, number=number)
    line = error_of(lit_cifar.fit.main, [*QUICK, "--model.net", f"mine{number}.x"])
    assert line.startswith(f"--model.net: mine{number}.x: {reason}")
    line = error_of(lit_cifar.fit.main, [*QUICK, "--model", f"mine{number}.x"])
    assert line.startswith(f"--model mine{number}.x cannot be imported: {reason}")


@pytest.fixture(scope="session")
def numbers() -> "itertools.count[int]":
    """Of modules, since one that was imported stays."""
    return itertools.count()


def test_a_net_that_was_made_already_is_refused() -> None:
    line = error_of(lit_cifar.fit.main, [*QUICK, "--model.net", "test_named_nets.made"])
    assert line == "--model.net names a net that was made already: name its class, or a function that makes one"


class ForSize(Linear):
    def __init__(self, num_classes: int = 10, img_size: int = 64) -> None:
        super().__init__(num_classes)
        self.img_size = img_size

    def forward(self, images: Tensor) -> Any:
        if images.shape[-1] != self.img_size:
            raise ValueError(f"want {self.img_size}")
        return super().forward(images)


class NeedsLabels(Linear):
    def forward(self, images: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        return super().forward(images)


class GivesOutput(Linear):
    def forward(self, images: Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(images))


class GivesDict(Linear):
    def forward(self, images: Tensor) -> Any:
        return {"out": super().forward(images), "aux": images}


class GivesComplex(Linear):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images).to(torch.complex64)


class GivesPixels(Linear):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images)[:, :, None, None]


@pytest.mark.parametrize(
    ("net", "words"),
    [
        ("ForSize", ["ForSize cannot use images of 3x32x32 (ValueError: want 64): set --model.net.img_size 32"]),
        ("NeedsLabels", ["argument: 'labels'): its forward gets the images alone, and returns logits"]),
        ("GivesOutput", ["gives SimpleNamespace, not logits, a tensor (B, K): return the logits alone"]),
        ("GivesDict", ["gives dict (out, aux), not logits, a tensor (B, K): return the logits alone"]),
        ("GivesComplex", ["torch.complex64", "return real"]),
        ("GivesPixels", ["(1, 10, 1, 1)", "return logits (B, K)"]),
    ],
)
def test_what_a_net_wants_and_gives_is_told_with_the_way_out(net: str, words: list[str]) -> None:
    line = error_of(lit_cifar.fit.main, [*QUICK, "--model.net", f"test_named_nets.{net}"])
    assert all(word in line for word in words), line


def test_a_transformer_of_timm_is_told_the_size_and_takes_it() -> None:
    pytest.importorskip("timm")
    flags = ["--model.net", "timm.create_model", "--model.net.model_name", "vit_tiny_patch16_224"]
    assert "set --model.net.img_size 32" in error_of(lit_cifar.fit.main, [*QUICK, *flags])
    lit_cifar.fit.main([*QUICK, *flags, "--model.net.img_size", "32"])
    assert net_of()["dict_kwargs"] == {"img_size": 32, "num_classes": 10}


@pytest.mark.slow
def test_a_net_of_timm_trains_by_ddp_with_adamw_and_a_scheduler_and_goes_on_on_one_device(run_command: Run) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install 'lit_cifar[timm]'")
    named = ["--model.optimizer", "AdamW", "--model.scheduler", "StepLR", "--model.scheduler.step_size", "1"]
    done = run_command("lit_cifar.fit", *QUICK, *TIMM, *named, "--lr", "0.001", "--devices", "2", "--strategy", "ddp")
    assert done.returncode == 0, done.stderr
    assert results("version_0")["devices"] == 2
    one = ["--devices", "1", "--strategy", "auto", "--accelerator", "cpu", "--trust", "true"]  # timm's is foreign code
    lit_cifar.test.main(["--ckpt_path", LAST, *one, "--trainer.limit_test_batches", "1"])
    lit_cifar.fit.main(["--resume", "auto", *one, "--max_epochs", "2", "--trainer.max_steps", "4"])
    assert (results("version_0")["devices"], results("version_0")["num_steps"]) == (1, 4)
