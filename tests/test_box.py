"""The net that comes with the package: by its name it is loaded, tested, exported and used; its card is true. Nets that
`export` wrote as .safetensors, one's own and strangers', are read by the same road."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import JPEG, ROOT, SHORT, error_of, make_tree
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lit_cifar.export
import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.test
from lit_cifar import LitClassifier, load
from lit_cifar.cli.configs import recipes
from lit_cifar.data.shapes import draw_shapes
from lit_cifar.model.classifier import Classifier
from lit_cifar.nets import SpeedNet
from lit_cifar.run.read import TRAINED, read_checkpoint, trained_nets
from lit_cifar.run.trust import of_person

NAME = "speedrun94"
FILE = TRAINED / f"{NAME}.safetensors"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FIGURES = ("accuracy", "accuracy_without_tta", "calibration_error", "loss")


def metadata(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return {key: json.loads(text) for key, text in opened.metadata().items()}


def dozen() -> Tensor:
    """Images (12, 3, 32, 32) uint8: shapes, noise, black and white."""
    noise = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32)
    return torch.cat([draw_shapes(train=False).images[:7], noise, plain])


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of an image for each class, which is enough to export by."""
    return make_tree(tmp_path_factory.mktemp("few"), CLASSES, num_images=1)


@pytest.fixture
def wrote(trained: Path, few: Path) -> Callable[..., Path]:
    """Writes the net of the short run on shapes as net.safetensors."""

    def write(*args: str, output: str = "net.safetensors") -> Path:
        flags = ["--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), "--output", output, "--data_dir", str(few)]
        lit_cifar.export.main([*flags, *args])
        return Path(output)

    return write


# ---- by its name ----


def test_the_net_is_loaded_by_its_name_as_its_recipe_says() -> None:
    net, classes = load(NAME)
    assert tuple(classes) == CLASSES
    recipe = yaml.safe_load(recipes()[NAME].read_text())["model"]
    assert net.tta == recipe["tta"] != "none"
    assert type(net.net).__name__ == "SpeedNet"
    assert net.mean.flatten().tolist() == pytest.approx(recipe["mean"], abs=1e-7)  # which float16 does not hold
    assert net.std.flatten().tolist() == pytest.approx(recipe["std"], abs=1e-7)
    assert not net.training
    assert {weight.dtype for weight in net.state_dict().values() if weight.is_floating_point()} == {torch.float32}
    assert load(NAME, tta="none")[0].tta == "none"


@torch.inference_mode()
def test_a_dozen_images_get_the_same_classes_on_every_run_and_in_every_form() -> None:
    images = dozen()
    net, classes = load(NAME)
    logits = net(images)
    assert logits.shape == (12, 10)
    assert logits.isfinite().all()
    assert len(set(classes[logits.argmax(1)])) > 1, "it tells images apart"
    assert torch.equal(load(NAME)[0](images), logits)
    arrays = images.permute(0, 2, 3, 1).numpy()
    forms = (arrays, [Image.fromarray(array) for array in arrays], list(images), images.numpy())
    assert all(torch.equal(net(form), logits) for form in forms)
    plain = load(NAME, tta="none")[0](images)
    assert torch.allclose(plain, net.net((images / 255 - net.mean) / net.std), atol=1e-3)
    assert not torch.equal(plain, logits)


def test_predict_without_a_checkpoint_uses_it_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for number, image in enumerate(dozen()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{number:02}.png")
    lit_cifar.predict.main(["--ckpt_path", NAME, ".", "--json"])
    named = capsys.readouterr()
    assert named.err == ""
    assert len(named.out.splitlines()) == 12
    Path(NAME).write_text("no net")  # not what a command without --ckpt_path means
    lit_cifar.predict.main([".", "--json"])
    alone = capsys.readouterr()
    assert alone.out == named.out
    (line,) = alone.err.splitlines()
    assert NAME in line
    assert ", ".join(CLASSES) in line


def test_torch_hub_finds_it() -> None:
    net = torch.hub.load(str(ROOT), "classifier", source="local")
    assert tuple(net.classes) == CLASSES
    images = dozen()
    with torch.inference_mode():
        assert torch.equal(net(images), load(NAME)[0](images))


def test_it_is_tested_and_exported_by_its_name(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.test.main(["--ckpt_path", NAME, "--data_dir", str(few), "--accelerator", "cpu"])
    report = json.loads(Path(f"test-{NAME}.json").read_text())
    net, _ = load(NAME)
    black = net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).argmax()
    confusion = torch.tensor(report["confusion_matrix"])
    assert confusion.sum() == confusion[:, black].sum() == 10
    assert report["num_steps"] == metadata(FILE)["num_steps"]
    assert "left to you" not in capsys.readouterr().err
    for output, flags in (("net.safetensors", []), ("half.safetensors", ["--half"])):
        lit_cifar.export.main(["--ckpt_path", NAME, "--data_dir", str(few), "--output", output, *flags])
        weights = load(output)[0].state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in net.state_dict().items())
    assert Path("half.safetensors").stat().st_size < 0.6 * Path("net.safetensors").stat().st_size


def test_lightning_module_is_made_of_it() -> None:
    module = LitClassifier.load_from_checkpoint(NAME)
    net, classes = load(NAME)
    assert module.classes == classes
    assert module.hparams["label_smoothing"] == 0.2
    assert all(torch.equal(weight, module.state_dict()[name]) for name, weight in net.state_dict().items())


# ---- what its name means ----


def test_a_file_of_its_name_is_preferred_and_a_folder_is_not(wrote: Callable[..., Path]) -> None:
    Path(NAME).mkdir()
    assert tuple(load(NAME)[1]) == CLASSES
    Path(NAME).rmdir()
    wrote().rename(NAME)
    assert "circle" in load(NAME)[1]
    Path(NAME).write_text("seed: 7")
    assert error_of(load, NAME).startswith(f"{NAME} is no checkpoint")


@pytest.mark.parametrize("name", ["speedrun93", "resnet"])
def test_a_name_that_is_neither_file_nor_net_names_the_nets(name: str) -> None:
    message = error_of(load, name)
    assert message.startswith(f"no checkpoint {name}")
    assert message.endswith(f"a net that comes with lit_cifar: {', '.join(trained_nets())}")
    assert (f"did you mean {NAME}?" in message) == (name == "speedrun93")
    assert error_of(lit_cifar.predict.main, ["--ckpt_path", name, "a.png"]) == message
    assert error_of(lit_cifar.test.main, ["--ckpt_path", name]) == message
    assert error_of(lit_cifar.export.main, ["--ckpt_path", name, "--output", "net.pt2"]) == message


def test_no_run_goes_on_from_a_net_alone(wrote: Callable[..., Path], trained: Path) -> None:
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "lit_cifar", "global_step", "pytorch-lightning_version")
    torch.save({key: content[key] for key in kept}, "weights.ckpt")  # as with save_weights_only
    for path in (NAME, str(wrote()), "weights.ckpt"):
        message = error_of(lit_cifar.fit.main, [*SHORT, "--resume", path])
        assert message.startswith(f"--resume {path}: it is a net alone")
    assert not Path("lightning_logs").exists()


# ---- a file that export wrote ----


def test_a_file_that_export_wrote_is_tested_as_the_checkpoint_is(wrote: Callable[..., Path], trained: Path) -> None:
    for path in (str(wrote()), str(trained / "checkpoints" / "last.ckpt")):
        lit_cifar.test.main(["--ckpt_path", path, "--accelerator", "cpu", "--output", f"{Path(path).suffix[1:]}.json"])
    ours, theirs = (json.loads(Path(f"{name}.json").read_text()) for name in ("safetensors", "ckpt"))
    for key in ("confusion_matrix", "accuracy_without_tta", "loss", "num_steps", "dataset"):
        assert ours[key] == theirs[key], key


def test_a_net_exported_again_is_the_same_file_and_keeps_its_augmentation(
    wrote: Callable[..., Path], few: Path
) -> None:
    data = wrote("--tta", "mirror").read_bytes()
    for number in range(3):
        args = ["--ckpt_path", "net.safetensors", "--output", f"{number}.safetensors", "--data_dir", str(few)]
        lit_cifar.export.main(args)
        assert Path(f"{number}.safetensors").read_bytes() == data
    assert load("net.safetensors")[0].tta == "mirror"


def test_rounded_weights_are_those_of_float16(wrote: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_file(wrote())
    half = load_file(wrote("--half"))
    assert re.search(r"Rounded to float16: on 10 test images of .* same class for (9|10), ", capsys.readouterr().out)
    for name, weight in whole.items():
        expected = weight if name in ("mean", "std") else weight.half()
        assert half[name].dtype == expected.dtype
        assert torch.equal(half[name], expected)


def test_norms_that_a_net_keeps_precise_are_not_rounded_in_the_file() -> None:
    speednet = SpeedNet(widths=(8, 8, 8))
    for name, buffer in speednet.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    rounded = lit_cifar.export._rounded(Classifier(speednet, *torch.full((2, 3, 1, 1), 0.3)).eval())
    read = lit_cifar.export._read_weights(lit_cifar.export._dump_weights(rounded, {"half": True}), rounded)
    images = draw_shapes(False).images[:50]
    assert torch.equal(read(images), rounded(images))


def test_what_float16_cannot_hold_is_not_rounded(wrote: Callable[..., Path], trained: Path) -> None:
    assert error_of(lambda: wrote("--half", output="net.onnx")).startswith("--half net.onnx: only .safetensors")
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    next(weight for name, weight in content["state_dict"].items() if name.startswith("net."))[0] = 1e5
    torch.save(content, "large.ckpt")
    args = ["--ckpt_path", "large.ckpt", "--output", "large.safetensors", "--half"]
    assert error_of(lit_cifar.export.main, args).startswith("--half: weights of this net are too large for float16")
    assert not Path("large.safetensors").exists()


# ---- files from strangers ----


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.3, 0.9999])
def test_a_net_cut_short_is_named(wrote: Callable[..., Path], share: float) -> None:
    path = wrote()
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert error_of(load, path).startswith(f"{path} is no checkpoint, or was cut short or damaged")


def test_a_flipped_bit_is_found(wrote: Callable[..., Path]) -> None:
    data = wrote().read_bytes()
    for place in (50, data.index(b"triangle"), data.index(b'"F32"') + 1, len(data) // 2, len(data) - 1):
        Path("flipped.safetensors").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert "was cut short or damaged" in error_of(load, "flipped.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, facts: facts.clear(), "is not a checkpoint of lit_cifar"),
        (lambda weights, facts: facts.update(classes=5), "is not a checkpoint of lit_cifar"),
        (lambda weights, facts: facts.update(config=[1]), "is not a checkpoint of lit_cifar"),
        (lambda weights, facts: facts.update(num_steps="x"), "is not a checkpoint of lit_cifar"),
        (lambda weights, facts: facts["config"].pop("model"), "does not say which net it holds"),
        (lambda weights, facts: weights.pop("net.fc3.bias"), "does not fit Net: net.fc3.bias is missing in the file"),
        (lambda weights, facts: weights.update({"net.fc3.bias": torch.zeros(7)}), "does not fit Net: net.fc3.bias"),
        (lambda weights, facts: weights.update({"net.\x1b[2J": torch.zeros(7)}), "does not fit Net: 'net.\\x1b[2J'"),
        (
            lambda weights, facts: facts["config"]["model"].update(net={"class_path": "os.system"}),
            "names the class os.system",
        ),
        (
            lambda weights, facts: facts["config"]["model"].update(net={"class_path": "timm.create_model"}),
            "names the class timm.create_model",
        ),
    ],
)
def test_a_strangers_net_decides_weights_net_and_preprocessing_alone(
    wrote: Callable[..., Path], change: Callable[[dict[str, Tensor], dict[str, Any]], object], message: str
) -> None:
    path = wrote()
    weights, facts = load_file(path), metadata(path)
    del facts["crc32"]
    change(weights, facts)
    save_file(weights, path, {key: json.dumps(value) for key, value in facts.items()} or {"format": "pt"})
    assert message in error_of(load, path)
    if "names the class" in message:
        for command, flags in (
            (lit_cifar.predict, ["a.png"]),
            (lit_cifar.test, []),
            (lit_cifar.export, ["--output", "a.pt2"]),
        ):
            assert message in error_of(command.main, ["--ckpt_path", str(path), *flags])


@pytest.mark.parametrize("header", [b'{"a": 1', b"{" * 5000, b'{"__metadata__": {"config": "' + b"[" * 9999 + b'"}}'])
def test_a_header_that_no_one_writes_is_told(header: bytes) -> None:
    for length in (len(header), 2**23, 2**63):
        Path("net.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        assert error_of(read_checkpoint, Path("net.safetensors")).startswith("net.safetensors is no")


# ---- its card ----


def test_the_file_is_small_and_holds_float16_and_nothing_of_the_machine_that_trained_it() -> None:
    assert FILE.stat().st_size <= 5_000_000
    stored = load_file(FILE)
    precise = {name for name, weight in stored.items() if weight.dtype == torch.float32}
    assert all("norm" in name or name in ("mean", "std") for name in precise)
    config = metadata(FILE)["config"]
    del config["seed_everything"]
    assert config.keys() == {"trainer", "model", "data"}
    assert not [key for section in config for key in config[section] if of_person(section, key)]
    header = FILE.read_bytes()[: 2**14].split(b'"net.')[0]
    assert not re.search(rb"[\"' ](/|[A-Z]:|~)\w", header), "it names a path"


def test_the_card_has_the_figures_of_the_file_and_all_that_a_user_must_know() -> None:
    card, text = metadata(FILE)["card"], FILE.with_suffix(".md").read_text()
    assert card["recipe"] == NAME
    assert card["seed"] == 0
    assert card["num_test"] == 10_000
    assert set(FIGURES) <= card.keys() & card["file"].keys()
    for figures in (card, card["file"]):
        assert all(f" {100 * figures[key]:.2f} % |" in text for key in FIGURES[:2])
        assert all(f" {figures[key]:.4f} |" in text for key in FIGURES[2:])
    assert abs(card["accuracy"] - card["file"]["accuracy"]) <= 0.001
    for said in (card["commit"], card["data"], f"{FILE.stat().st_size:,} bytes", "MIT", "no\nlicence", *CLASSES):
        assert said in text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["How good it is", "What it is not good for", "Licence"]


@pytest.mark.slow
@pytest.mark.skipif(not JPEG.is_file(), reason=f"{JPEG.name} is not there; LIT_CIFAR_JPEG can name it")
def test_it_is_as_accurate_as_its_card_says() -> None:
    card = metadata(FILE)["card"]
    assert card["data"] == JPEG.name
    lit_cifar.test.main(["--ckpt_path", NAME, "--data_dir", str(JPEG), "--accelerator", "cpu"])
    report = json.loads(Path(f"test-{NAME}.json").read_text())
    for figures in (card, card["file"]):
        assert report["accuracy"] == pytest.approx(figures["accuracy"], abs=0.001)
        assert report["accuracy_without_tta"] == pytest.approx(figures["accuracy_without_tta"], abs=0.001)
