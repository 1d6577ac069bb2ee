"""load: a checkpoint alone gives the net that the run's test scored, and nothing in it runs unasked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch import Tensor, nn

import lit_cifar
import lit_cifar.fit
from lit_cifar import load
from lit_cifar.data import shapes
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.errors import UserError
from lit_cifar.model.classifier import views
from lit_cifar.model.module import LitClassifier
from lit_cifar.nets import Net, SpeedNet

IMAGES = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw_test_images() -> tuple[Tensor, Tensor]:
    split = shapes.draw_shapes(train=False)
    return split.images, split.labels


def save(module: LitClassifier, net: Any, **settings: Any) -> Path:
    """A checkpoint as a run writes it, of a module whose net a config describes."""
    config = {"model": {"net": net, "tta": "none", **settings}}
    mine = {"classes": [f"class {label}" for label in range(10)], "config": config}
    by_lightning = {"pytorch-lightning_version": "2.6.6", "global_step": 1}
    torch.save({"state_dict": module.state_dict(), "lit_cifar": mine, **by_lightning}, "made.ckpt")
    return Path("made.ckpt")


@pytest.mark.parametrize(("tta", "reported"), [(None, "accuracy"), ("none", "accuracy_without_tta")])
def test_a_checkpoint_alone_has_the_accuracy_that_its_run_reported(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tta: Any, reported: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--net", "no.such.Net"])  # of whatever calls load
    shutil.copy(trained / "checkpoints" / "last.ckpt", "alone.ckpt")
    net, classes = load("alone.ckpt", tta=tta)
    images, labels = draw_test_images()
    with torch.inference_mode():
        right = torch.cat([net(batch) for batch in images.split(500)]).argmax(1) == labels
    results = json.loads((trained / "results.json").read_text())
    assert right.sum().item() / len(labels) == results[reported]
    assert results["accuracy"] != results["accuracy_without_tta"]  # or nobody could tell which one it was
    assert classes == shapes.CLASSES
    assert not net.training


def test_logits_are_those_of_the_module_averaged_over_the_views(trained: Path) -> None:
    path = trained / "checkpoints" / "last.ckpt"
    module = LitClassifier(Net())
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    net, _ = load(path)
    with torch.inference_mode():
        expected = sum(module.eval()(view) * weight for view, weight in views(IMAGES, "mirror_shift"))
        assert torch.equal(net(IMAGES), expected)
        assert torch.equal(load(path, tta="none")[0](IMAGES), module(IMAGES))


def test_classes_name_a_tensor_of_indices(trained: Path) -> None:
    _, classes = load(trained / "checkpoints" / "last.ckpt")
    assert classes[torch.tensor([9, 0, 9])] == [shapes.CLASSES[9], shapes.CLASSES[0], shapes.CLASSES[9]]
    assert classes[torch.tensor([[1], [2]]).flatten()] == list(shapes.CLASSES[1:3])
    assert classes[torch.tensor(3)] == classes[3] == shapes.CLASSES[3]
    assert classes[:2] == shapes.CLASSES[:2]


def test_a_net_that_a_function_of_torchvision_makes_is_made_again() -> None:
    flags = [
        "--dataset",
        "shapes",
        "--batch_size",
        "8",
        "--trainer.max_steps",
        "1",
        "--trainer.limit_test_batches",
        "1",
    ]
    resnet = ["--model.net", "torchvision.models.resnet18", "--model.net.num_classes", "10"]
    lit_cifar.fit.main([*flags, *resnet])
    path = Path("lightning_logs/version_0/checkpoints/last.ckpt")
    weights = torch.load(path, weights_only=True)["state_dict"]
    net, _ = load(path)
    assert type(net.net).__module__ == "torchvision.models.resnet"
    assert net.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in net.state_dict().items())


def test_a_checkpoint_written_under_syncbatchnorm_and_compile_loads() -> None:
    settings = {"class_path": "lit_cifar.nets.SpeedNet", "init_args": {"widths": [8, 8, 8]}}
    module = LitClassifier(SpeedNet(widths=(8, 8, 8)), mean=(0.1, 0.2, 0.3))
    with torch.no_grad():
        module(IMAGES)  # moves the running statistics
        expected = module.eval()(IMAGES)
    module.net = nn.SyncBatchNorm.convert_sync_batchnorm(module.net)
    module.net.compile()
    net, _ = load(save(module, settings))
    with torch.no_grad():
        assert torch.equal(net(IMAGES), expected)


@pytest.mark.parametrize(
    "net",
    [
        {"class_path": "my_nets.Mine"},
        "my_nets.Mine",
        {"class_path": "torch.nn.Sequential", "init_args": {"args": [{"class_path": "my_nets.Mine"}]}},
        {"class_path": "torchvision.models.mobilenet_v2", "init_args": {"norm_layer": "my_nets.Mine"}},
    ],
)
def test_code_of_other_packages_runs_only_when_trusted(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_nets.py").write_text("from lit_cifar.nets import Net\nclass Mine(Net): pass\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    path = save(LitClassifier(Net()), net)
    with pytest.raises(UserError, match=r"names the class my_nets\.Mine"):
        load(path)
    assert "my_nets" not in sys.modules
    if net == {"class_path": "my_nets.Mine"}:
        assert type(load(path, trust=True)[0].net).__name__ == "Mine"
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)


def test_what_else_a_run_was_made_of_needs_no_trust() -> None:
    path = save(LitClassifier(Net()), {"class_path": "lit_cifar.nets.Net"})
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lit_cifar"]["config"]["trainer"] = {"callbacks": [{"class_path": "other.Callback"}]}
    torch.save(checkpoint, path)
    load(path)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ({"class_path": "lit_cifar.nets.Net", "init_args": {"num_classes": 3}}, r"does not fit Net: net\.fc3"),
        ({"class_path": "lit_cifar.nets.Net", "init_args": {"size": 3}}, "cannot be made: .*'size' is not accepted"),
        ({"class_path": "lit_cifar.nets.Gone"}, "cannot be made: .*Gone"),
    ],
)
def test_a_net_that_is_not_the_weights_own_is_told(net: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(save(LitClassifier(Net()), net))


def test_an_unknown_augmentation_is_told(trained: Path) -> None:
    with pytest.raises(UserError, match="augmentation 'mirrored'; choose one of none, mirror, mirror_shift"):
        load(trained / "checkpoints" / "last.ckpt", tta="mirrored")  # type: ignore[arg-type]


def test_a_checkpoint_without_a_config_is_told() -> None:
    path = save(LitClassifier(Net()), {})
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "lit_cifar": {"classes": [], "config": {}}}, path)
    with pytest.raises(UserError, match="does not say which net"):
        load(path)


@pytest.mark.parametrize("images", [IMAGES.float() / 255, IMAGES.permute(0, 2, 3, 1)])
def test_images_of_another_kind_are_refused(trained: Path, images: Tensor) -> None:
    with pytest.raises(UserError, match=r"want torch\.uint8 \(B, 3, 32, 32\)"):
        load(trained / "checkpoints" / "last.ckpt")[0](images)


def test_the_package_has_load_module_and_data_and_nothing_that_it_has_not() -> None:
    assert lit_cifar.load is load
    assert lit_cifar.LitClassifier is LitClassifier
    assert lit_cifar.CIFAR10DataModule is CIFAR10DataModule
    with pytest.raises(AttributeError, match="no attribute 'save'"):
        lit_cifar.save  # noqa: B018


def test_torch_hub_finds_the_net(trained: Path, tmp_path: Path) -> None:
    path = trained / "checkpoints" / "last.ckpt"
    torch.save(IMAGES, "images.pt")
    code = (
        "import sys, torch; root, path = sys.argv[1:]; "
        "net = torch.hub.load(root, 'classifier', source='local', ckpt_path=path, tta='none'); "
        "import lit_cifar; assert lit_cifar.__file__.startswith(root), lit_cifar.__file__; "
        "torch.save((net(torch.load('images.pt')).detach(), list(net.classes)), 'out.pt')"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)], cwd=tmp_path, env=env, check=True)
    logits, classes = torch.load("out.pt")
    net, names = load(path, tta="none")
    assert torch.allclose(logits, net(IMAGES), atol=1e-6)
    assert classes == list(names)
