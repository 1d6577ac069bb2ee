"""load in somebody's script: images in any form that people have them in, checkpoints from any Trainer, and one line
where it cannot be done."""

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from helpers import ROOT, error_of
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn

from lit_cifar import CIFAR10DataModule, LitClassifier, load
from lit_cifar.data.images import decode_image
from lit_cifar.data.shapes import CLASSES
from lit_cifar.model.classifier import Classifier, to_batch
from lit_cifar.nets import Net

IMAGES = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LARGE = np.random.RandomState(0).randint(0, 256, (40, 52, 3)).astype(np.uint8)
HWC = IMAGES.permute(0, 2, 3, 1).numpy()
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "F")


@pytest.fixture(scope="module")
def net() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Net(), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5), "mirror").eval()


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


# ---- the package ----


def test_its_names_are_listed_and_imported_by_a_star_and_a_look_at_them_costs_no_import_of_torch() -> None:
    code = "import sys, lit_cifar; print(*dir(lit_cifar)); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    names: dict[str, Any] = {}
    exec("from lit_cifar import *", names)
    assert {"CIFAR10DataModule", "LitClassifier", "load"} <= set(run.stdout.split()) & names.keys()


# ---- images ----


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (IMAGES[0], IMAGES[:1]),
        (HWC[0], IMAGES[:1]),
        (HWC, IMAGES),
        (IMAGES.numpy(), IMAGES),
        (IMAGES[0].numpy(), IMAGES[:1]),
        (read_only(HWC), IMAGES),
        (HWC[:, :, ::-1], IMAGES.flip(3)),
        (Image.fromarray(HWC[0]), IMAGES[:1]),
        ([Image.fromarray(HWC[0]), IMAGES[1], HWC[2]], IMAGES[:3]),
        ((HWC[:2], IMAGES[2:4]), IMAGES[:4]),
        (IMAGES[:0], IMAGES[:0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_images_give_the_same_logits_in_whatever_form_they_come(net: Classifier, images: Any, expected: Tensor) -> None:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(net(images), net(expected))


@pytest.mark.parametrize("form", ["jpeg", "turned", "png", "grey16", "transparent", "palette", "gif", "tiff"])
def test_an_image_that_pillow_opened_has_the_logits_of_predict_to_the_bit(net: Classifier, form: str) -> None:
    photo, options = Image.fromarray(LARGE), {}
    suffix = {"jpeg": "JPEG", "turned": "JPEG", "gif": "GIF", "tiff": "TIFF"}.get(form, "PNG")
    if form == "turned":
        photo.getexif()[274] = 6
        options["exif"] = photo.getexif()
    if form.startswith("grey"):
        photo = Image.fromarray(LARGE[..., 0].astype(np.uint16) * 257)
    if form == "transparent":
        photo.putalpha(Image.fromarray(LARGE[..., 1]))
    if form in ("palette", "gif"):
        photo = photo.quantize(16)
    if form == "tiff":
        photo = Image.fromarray(LARGE[..., 0].astype(np.float32) / 255)
    file = io.BytesIO()
    photo.save(file, suffix, **options)
    data = file.getvalue()
    pixels = decode_image(data)[0]
    expected = net(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, 3, 32, 32))
    image = Image.open(io.BytesIO(data))
    assert torch.equal(net(image), expected)
    assert torch.equal(net([image, image])[1:], net([image, image])[:1])
    image.load()
    assert torch.equal(net(image), expected)


def test_arrays_and_tensors_of_other_sizes_are_resized_as_predict_does_it(net: Classifier) -> None:
    expected = net(Image.fromarray(LARGE))
    assert not torch.equal(expected, net(Image.fromarray(LARGE[:32, :32])))
    tensor = torch.from_numpy(LARGE).permute(2, 0, 1)
    for images in (LARGE, LARGE[None], tensor, tensor[None], LARGE.transpose(2, 0, 1)):
        assert torch.equal(net(images), expected)
    assert len(net([LARGE, HWC[0], Image.new("L", (7, 90))])) == 3


@pytest.mark.parametrize("mode", MODES)
def test_pil_images_of_any_mode_are_taken_and_left_as_they_are(mode: str) -> None:
    image = Image.new(mode, (40, 50))
    before = image.tobytes()
    assert to_batch(image).shape == (1, 3, 32, 32)
    assert image.tobytes() == before
    assert image.mode == mode


def test_a_later_frame_is_taken_where_somebody_went_to_it() -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(
        file, "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32), "lime")], duration=1
    )
    image = Image.open(file)
    image.seek(1)
    assert to_batch(image)[0, :, 0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.float() / 255, r"float32 \(6, 3, 32, 32\) given; want torch.uint8 .* normalises .*255 \* images"),
        (HWC / 255, "float64 .*want torch.uint8"),
        (IMAGES.float() * float("nan"), "float32"),
        (HWC.astype(np.uint16), "uint16 .* scale other values"),
        (IMAGES.long(), "int64 .* scale other values"),
        (HWC[0, :, :, 0], r"uint8 \(32, 32\) given; .* RGB"),
        (np.zeros((32, 32, 4), np.uint8), r"uint8 \(32, 32, 4\) given; .* RGB"),
        (torch.from_numpy(HWC), r"\(6, 32, 32, 3\) given; .* first axis"),
        (np.zeros((3, 32, 3), np.uint8), "which axis has the colours"),
        (np.zeros((0, 9, 3), np.uint8), "want"),
        (np.array(None), "object"),
        ([], "the list is empty"),
        ([HWC[0], HWC[0] / 255], r"images\[1\]: float64"),
        ("photo.jpg", r"str is no image; .*PIL\.Image\.open"),
        ([Path("photo.jpg")], r"images\[0\]: .*Path is no image"),
        (None, "NoneType is no image"),
        (Image.fromarray(np.full((32, 32), np.nan, np.float32)), "images: the image has values from nan"),
        (Image.fromarray(np.full((32, 32), 900, np.uint16)), "not known which is white"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,  # no address, for xdist
)
def test_what_is_no_image_is_told_in_one_line(net: Classifier, images: Any, message: str) -> None:
    line = error_of(net, images)
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match=message):
        net(images)
    assert len(line) < 300


def test_an_image_whose_file_is_closed_or_damaged_is_told(tmp_path: Path) -> None:
    Image.fromarray(LARGE).save("photo.png")
    with Image.open("photo.png") as image:
        pass
    assert error_of(to_batch, image) == "images: the image cannot be decoded as an image"
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:900])
    with Image.open("cut.png") as image:
        assert error_of(to_batch, [LARGE, image]) == "images[1]: the image cannot be decoded as an image"


def test_the_net_is_still_traced_compiled_and_exported(net: Classifier) -> None:
    expected = net(IMAGES)
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(IMAGES), expected)
    program = torch.export.export(net, (IMAGES,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    assert torch.equal(program.module()(IMAGES[:2]), net(IMAGES[:2]))
    assert (
        sum("_to_copy" in str(node.target) or str(node.target) == "aten.to.dtype" for node in program.graph.nodes) <= 2
    )


# ---- checkpoints ----


class Unnamed(nn.Sequential):
    """A net that no config can name: it is made of layers."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 5, 4), nn.Flatten(), nn.LazyLinear(10))


class WithMore(LitClassifier):
    """A subclass with weights beside its net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, mean=(0.4, 0.5, 0.6), tta="mirror")
        self.temperature = nn.Parameter(torch.ones(1))


def saved_by_lightning(module: LitClassifier) -> Path:
    """The checkpoint of a plain Trainer's own ModelCheckpoint."""
    keep = ModelCheckpoint("kept", monitor="val/accuracy", mode="max", save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, limit_train_batches=2, callbacks=[keep], **quiet)
    trainer.fit(module, datamodule=CIFAR10DataModule(dataset="shapes", batch_size=8, num_val=100))
    return Path(keep.best_model_path)


@pytest.mark.filterwarnings("ignore")  # Lightning's, on few workers and short epochs
@pytest.mark.parametrize("kind", [LitClassifier, WithMore])
def test_a_checkpoint_of_lightnings_own_callback_gives_its_net(kind: Any) -> None:
    module = kind(Unnamed())
    path = saved_by_lightning(module)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lit_cifar"]["config"] = {"model": {"lr": 0.001, "tta": module.tta}}  # as of a net without a name
    torch.save(checkpoint, path)
    assert error_of(load, path).startswith(f"{path} does not say which net it holds")
    net, classes = load(path, net=Unnamed())
    assert classes == CLASSES
    module.eval()
    with torch.inference_mode():
        views = (IMAGES, IMAGES.flip(3)) if module.tta == "mirror" else (IMAGES,)
        assert torch.allclose(net(IMAGES), sum(module(view) for view in views) / len(views), atol=1e-6)
    assert net.net.training is False


def made(weights: dict[str, Tensor], **model: Any) -> Path:
    mine = {"classes": list(CLASSES), "config": {"model": model}}
    torch.save(
        {"state_dict": weights, "lit_cifar": mine, "pytorch-lightning_version": "2.6.6", "global_step": 1}, "made.ckpt"
    )
    return Path("made.ckpt")


def test_weights_of_a_wrapped_net_fit_the_net_itself_and_its_wrapper() -> None:
    module = LitClassifier(Net())
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    assert "net._orig_mod.conv1.weight" in module.state_dict()
    path = made(module.state_dict(), net={"class_path": "lit_cifar.nets.Net"})
    for net, _ in (load(path), load(path, net=Net()), load(path, net=torch.compile(Net(), backend="eager"))):
        assert torch.equal(net(IMAGES), module.eval()(IMAGES))


def test_a_net_given_takes_the_place_of_one_that_is_not_trusted() -> None:
    path = made(LitClassifier(Net()).state_dict(), net={"class_path": "elsewhere.Net"}, tta="mirror")
    assert "names the class elsewhere.Net" in error_of(load, path)
    net, _ = load(path, net=Net())
    assert net.tta == "mirror"


@pytest.mark.parametrize("given", [io.BytesIO(), b"made.ckpt", None, 3])
def test_what_is_no_path_is_told(given: Any) -> None:
    assert (
        error_of(load, given)
        == f"load takes the path of a checkpoint, not a {type(given).__name__}; write it to a file first"
    )


def test_a_net_that_is_none_or_another_or_not_whole_is_told() -> None:
    weights = LitClassifier(Net()).state_dict()
    assert "net is a str; give a torch.nn.Module" in error_of(lambda: load(made(weights), net="Net"))  # type: ignore[arg-type]
    line = error_of(lambda: load(made(weights), net=Unnamed()))
    assert line.startswith("the checkpoint does not fit Unnamed: net.0.bias is missing")
    assert line.endswith("name the file's net with net=...")
    del weights["net.fc3.bias"]
    assert "net.fc3.bias is missing in the file" in error_of(lambda: load(made(weights), net=Net()))
