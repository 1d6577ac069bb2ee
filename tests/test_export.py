"""export: what stands at --output gives the net's logits, read by somebody else, or nothing new stands there."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, error_of
from PIL import Image
from torch import Tensor, nn

import lit_cifar.export
import lit_cifar.fit
from lit_cifar import load
from lit_cifar.data.shapes import draw_shapes
from lit_cifar.errors import UserError
from lit_cifar.export import FORMATS, compare

Predict = Callable[[Tensor], Tensor]


def export(checkpoint: Path, output: str, *args: str) -> None:
    for package in FORMATS[Path(output).suffix].packages:
        pytest.importorskip(package, reason=f"{package} is missing; it comes with the extra `export`")
    lit_cifar.export.main(["--ckpt_path", str(checkpoint), "--output", output, *args])


def read_onnx(path: str) -> tuple[Predict, dict[str, Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 3, 32, 32])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    settings = {key: json.loads(texts[key]) for key in ("classes", "tta", "config", "lit_cifar")}
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), settings


def read_program(path: str) -> tuple[Predict, dict[str, Any]]:
    texts = {"lit_cifar.json": ""}
    program = torch.export.load(path, extra_files=texts)
    return program.module(), json.loads(texts["lit_cifar.json"])


def read_weights(path: str) -> tuple[Predict, dict[str, Any]]:
    from safetensors import safe_open

    net, _ = load("net.ckpt")
    with safe_open(path, "pt") as file:
        settings = {key: json.loads(value) for key, value in file.metadata().items()}
        assert set(file.keys()) == set(net.state_dict())
        assert all(torch.equal(file.get_tensor(name), weight) for name, weight in net.state_dict().items())
        net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return net, settings


READERS = {"net.onnx": read_onnx, "net.pt2": read_program, "net.safetensors": read_weights}
NETS = {
    "Net": [],
    "SpeedNet": ["--config", "speedrun94", "--data.eval_batch_size", "10"],
    "ResNet18": ["--model.net", "ResNet18"],
    "torchvision": ["--model.net", "torchvision.models.resnet18", "--model.net.num_classes", "10"],
}


@pytest.mark.parametrize("output", READERS)
@pytest.mark.parametrize(
    "name", ["Net", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SpeedNet", "ResNet18", "torchvision"))]
)
@pytest.mark.filterwarnings("ignore")  # of what reads the files here; the command's own are silenced in it
def test_a_written_file_gives_the_nets_logits_for_any_batch(
    name: str, output: str, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = trained / "checkpoints" / "last.ckpt" if name == "Net" else _train(name)
    Path("net.ckpt").write_bytes(path.read_bytes())
    named, where = [], "2,000 test images of the embedded shapes"
    if name != "Net":  # the others take a minute for as many
        _draw_tree()
        named, where = ["--data_dir", "tree"], "300 test images of tree"
    capfd.readouterr()
    export(Path("net.ckpt"), output, *named)
    told = capfd.readouterr()
    assert told.err == "" or named  # which are decoded first
    compared, exported = told.out.splitlines()
    assert compared.startswith(f"Compared on {where}: ")
    assert f" the net predict the same class for {where.split()[0]}, " in compared
    assert exported.startswith(f"Exported {output}: images uint8 (batch, 3, 32, 32) to logits (batch, 10), ")

    net, classes = load("net.ckpt")
    predict, settings = READERS[output](output)
    images = draw_shapes(train=False).images
    with torch.inference_mode():
        for batch in (images[:1], images[5:8], images[:129]):
            assert torch.allclose(predict(batch), net(batch), rtol=0, atol=1e-4)
    assert settings["classes"] == list(classes)
    assert settings["tta"] == net.tta == {"Net": "mirror_shift", "SpeedNet": "mirror_shift"}.get(name, "none")
    assert settings["config"] == torch.load("net.ckpt", weights_only=True)["lit_cifar"]["config"]
    assert sorted(path.name for path in Path().glob("net*")) == ["net.ckpt", output]


def _draw_tree() -> None:
    for split, number in (("train", 2), ("test", 300)):
        for index, image in enumerate(draw_shapes(train=False).images[:number]):
            folder = Path(f"tree/{split}/{'even' if index % 2 == 0 else 'odd'}")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")


def _train(name: str) -> Path:
    flags = [str(ROOT / "configs" / f"{flag}.yaml") if flag.startswith("speedrun") else flag for flag in NETS[name]]
    flags = [flag.replace("ResNet18", "lit_cifar.nets.ResNet18") for flag in flags]
    few = ["--batch_size", "16", "--trainer.max_steps", "3", "--trainer.limit_test_batches", "1"]
    lit_cifar.fit.main([*flags, *few, "--dataset", "shapes", "--compile", "false"])
    return Path("lightning_logs/version_0/checkpoints/last.ckpt")


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("change", [2e-4, float("nan")])
def test_a_file_that_disagrees_is_not_written_and_the_old_one_stays(
    checkpoint: Path, change: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = FORMATS[".safetensors"]

    def read(data: bytes, net: Any) -> Predict:
        return lambda images: net(images) + change

    monkeypatch.setitem(FORMATS, ".safetensors", replace(weights, read=read, largest_difference=1e-4))
    Path("old.safetensors").write_text("old")
    before = sorted(Path().iterdir())
    for output in ("old.safetensors", "new/net.safetensors"):
        with pytest.raises(UserError, match=rf"^{output} is not written; it was compared on 2,000 test images of the"):
            export(checkpoint, output, "--tta", "none")
    assert sorted(Path().iterdir()) == before
    assert Path("old.safetensors").read_text() == "old"
    monkeypatch.setitem(FORMATS, ".safetensors", weights)
    export(checkpoint, "old.safetensors", "--tta", "none")
    assert Path("old.safetensors").stat().st_size > 1000


def test_compare_counts_classes_and_finds_the_largest_difference(checkpoint: Path) -> None:
    net, _ = load(checkpoint, tta="none")
    images = draw_shapes(train=False).images[:600]
    with torch.inference_mode():
        logits = net(images)
    assert compare(net, net, images) == (600, 0.0)
    other = logits.clone()
    other[[3, 599], logits[[3, 599]].argmax(1)] -= torch.tensor([100.0, 200.0])
    table = {image.numpy().tobytes(): row for image, row in zip(images, other, strict=True)}
    found = compare(lambda batch: torch.stack([table[image.numpy().tobytes()] for image in batch]), net, images)
    assert found == (598, pytest.approx(200.0, abs=1e-3))
    assert compare(lambda batch: net(batch) * float("nan"), net, images)[1] == float("inf")


def test_it_says_when_the_runs_images_are_not_here_and_downloads_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["lit_cifar"]["config"]["data"].update(dataset="cifar10", data_dir="far/away")
    torch.save(content, "moved.ckpt")

    def fail(*args: Any) -> None:
        raise AssertionError("it downloads")

    monkeypatch.setattr("lit_cifar.data.download.fetch_folder", fail)
    export(Path("moved.ckpt"), "net.safetensors", "--tta", "none")
    told = "on 2,000 test images of the embedded shapes (the run's, in far/away, are not on this machine): torch and"
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match="--data_dir not/here holds no images"):
        export(Path("moved.ckpt"), "net.safetensors", "--data_dir", "not/here")
    assert not Path("far").exists()


def test_it_compares_on_the_images_that_are_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _draw_tree()
    export(checkpoint, "net.safetensors", "--data_dir", "tree", "--tta", "none")
    assert "Compared on 300 test images of tree: " in capsys.readouterr().out


class Branching(nn.Module):
    """A net that no exporter can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits if float(logits.sum()) > 0 else -logits


def test_a_net_that_cannot_be_exported_is_told_and_its_weights_can(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["lit_cifar"]["config"]["model"]["net"] = {"class_path": "test_export.Branching"}
    content["state_dict"] = {f"net.{name}": weight for name, weight in Branching().state_dict().items()} | {
        name: content["state_dict"][name] for name in ("mean", "std")
    }
    torch.save(content, "branching.ckpt")
    with pytest.raises(UserError, match=r"Branching cannot be exported as \.pt2 \("):
        export(Path("branching.ckpt"), "net.pt2", "--trust", "true")
    assert not Path("net.pt2").exists()
    export(Path("branching.ckpt"), "net.safetensors", "--trust", "true")


@pytest.mark.parametrize("output", ["net.bin", "net", "net.onnx.gz"])
def test_a_name_of_no_known_format_names_those_there_are(output: str) -> None:
    with pytest.raises(UserError, match=r"ends in \.onnx, \.pt2, \.safetensors$"):
        lit_cifar.export.main(["--ckpt_path", "gone.ckpt", "--output", output])


def test_an_output_that_cannot_be_written_is_told(checkpoint: Path) -> None:
    Path("file").write_text("")
    Path("folder.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        export(checkpoint, "folder.safetensors")
    with pytest.raises(UserError, match=r"^file/net\.safetensors cannot be written \(.*\): .* with --output$"):
        export(checkpoint, "file/net.safetensors", "--tta", "none")


def test_an_output_is_written_where_it_leads_or_refused_before_the_work(checkpoint: Path) -> None:
    longest = f"{'n' * 243}.safetensors"
    Path("link.safetensors").symlink_to("nowhere.safetensors")
    for output in (longest, "link.safetensors"):
        export(checkpoint, output, "--tta", "none")
        assert Path(output).stat().st_size > 1000
    assert Path("link.safetensors").is_symlink()
    assert Path("nowhere.safetensors").is_file()
    # before the checkpoint is read
    for output, reason in ((f"n{longest}", "File name too long"), ("nowhere.safetensors/a.safetensors", "")):
        assert f"{output} cannot be written ({reason}" in error_of(export, Path("gone.ckpt"), output)


def test_paths_begin_at_home_and_are_not_urls(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("net.ckpt").write_bytes(checkpoint.read_bytes())
    monkeypatch.setenv("HOME", str(Path.cwd()))
    flags = ["--tta=none", "--ckpt_path=~/net.ckpt"]
    lit_cifar.export.main([*flags, "--output=~/net.safetensors"])
    assert sorted(path.name for path in Path().iterdir()) == ["net.ckpt", "net.safetensors"]
    for flag in ("--ckpt_path", "--output", "--data_dir"):
        args = [*flags, "--output", "new.safetensors", f"{flag}=s3://bucket/net.safetensors"]
        assert error_of(lit_cifar.export.main, args).startswith(f"{flag} s3://bucket/net.safetensors: ")
    assert len(list(Path().iterdir())) == 2


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in FORMATS[".onnx"].packages:
        pytest.importorskip(needed)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'lit_cifar\[export\]'"):
        lit_cifar.export.main(["--ckpt_path", "gone.ckpt", "--output", "net.onnx"])
