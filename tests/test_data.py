"""The data module: which source a folder stands for, the validation split, and loaders that give uint8."""

import copy
import hashlib
import math
import os
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import yaml
from helpers import error_of, write_official
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import lit_cifar.fit
from lit_cifar import LitClassifier
from lit_cifar.data import tree
from lit_cifar.data.archives import ARCHIVES, CIFAR10, CIFAR100, Archive
from lit_cifar.data.augment import CUTOUT_FILL, Augment
from lit_cifar.data.cache import cache_dir
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.data.loader import DeviceLoader
from lit_cifar.data.official import read_official
from lit_cifar.data.seeds import make_generator
from lit_cifar.data.split import Split, split_validation
from lit_cifar.errors import UserError


def make_split(*per_class: int) -> Split:
    """A set of so many images of each class, in a mixed order, each image filled with its own number."""
    labels = torch.repeat_interleave(torch.tensor(per_class))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    images = torch.arange(len(labels)).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    return Split(images, labels, tuple(f"class{label}" for label in range(len(per_class))))


def numbers(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def gathered(loader: Any) -> tuple[Tensor, Tensor]:
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    return images, labels


# ---- the validation split ----


@pytest.mark.parametrize("num_val", [1, 30, 33, 59])
def test_the_validation_split_is_disjoint_complete_and_stratified(num_val: int) -> None:
    whole = make_split(40, 20, 30)
    train, val = split_validation(make_split(40, 20, 30), num_val, seed=0)
    assert len(val.labels) == num_val
    assert sorted(numbers(train) + numbers(val)) == numbers(whole)
    for part in (train, val):
        assert part.classes == whole.classes
        assert numbers(part) == sorted(numbers(part)), "in the set's own order"
        assert torch.equal(part.labels, whole.labels[numbers(part)])
    shares = torch.bincount(val.labels, minlength=3)
    assert int(shares.max() - shares.min()) <= 1


def test_the_validation_split_follows_from_the_seed() -> None:
    torch.manual_seed(1)
    first = [numbers(split_validation(make_split(30, 30), 20, seed)[1]) for seed in range(4)]
    torch.manual_seed(2)
    assert first == [numbers(split_validation(make_split(30, 30), 20, seed)[1]) for seed in range(4)]
    assert len(set(map(tuple, first))) == 4


@pytest.mark.parametrize(("num_val", "class_name"), [(40, "class1"), (10_000, "class0"), (-3, "class0")])
def test_a_validation_split_that_leaves_a_class_empty_is_refused(num_val: int, class_name: str) -> None:
    with pytest.raises(UserError, match=rf"num_val={num_val} .*'{class_name}'"):
        split_validation(make_split(30, 20), num_val, seed=0)


# ---- from end to end ----


@pytest.fixture(scope="module")
def shapes() -> CIFAR10DataModule:
    """The embedded set with a validation split, without a Trainer."""
    data = CIFAR10DataModule(dataset="shapes", batch_size=64, num_val=1000, augment=Augment(crop=4, flip="random"))
    data.prepare_data()
    for stage in ("fit", "validate", "test"):
        data.setup(stage)
    return data


def test_the_embedded_sets_loaders_give_every_image_once_as_uint8(shapes: CIFAR10DataModule) -> None:
    assert len(shapes.classes) == 10
    for loader, num_images in (
        (shapes.train_dataloader(), 9_000),
        (shapes.val_dataloader(), 1_000),
        (shapes.test_dataloader(), 2_000),
    ):
        images, labels = gathered(loader)
        assert (images.dtype, images.shape) == (torch.uint8, (num_images, 3, 32, 32))
        assert torch.bincount(labels).tolist() == [num_images // 10] * 10


def test_only_training_images_are_augmented(shapes: CIFAR10DataModule) -> None:
    assert torch.equal(gathered(shapes.test_dataloader())[0], shapes.test.images)
    loader = shapes.train_dataloader()
    images, _ = next(iter(loader))
    originals = shapes.train.images[shapes.train_batches().order(0)[:64]]
    assert not torch.equal(images, originals)
    loader.augment = None
    assert torch.equal(next(iter(loader))[0], originals)


def test_the_test_set_stays_unread_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def draw(train: bool) -> Split:
        read.append(train)
        return make_split(20, 20)

    monkeypatch.setattr("lit_cifar.data.shapes.draw_shapes", draw)
    data = CIFAR10DataModule(dataset="shapes")
    data.setup("fit")
    data.setup("fit")
    assert data.val_dataloader() == [], "num_val is 0"
    assert read == [True]
    data.setup("test")
    assert read == [True, False]


def test_a_validation_split_takes_no_second_copy_of_the_images() -> None:
    whole = make_split(200, 200)
    train, _ = split_validation(whole, 50, seed=0)
    assert train.images.data_ptr() == whole.images.data_ptr()


def test_the_built_in_augmentation_follows_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_cifar.data.shapes.draw_shapes", lambda train: make_split(100, 100))
    transform = [v2.RandomInvert(p=1.0), v2.RandomPosterize(bits=1, p=1.0)]
    augment = Augment(cutout=20)
    data = CIFAR10DataModule(dataset="shapes", augment=augment, transform=transform, num_workers=0)
    data.setup("fit")
    images, _ = gathered(data.train_dataloader())
    order = data.train_batches().order(0)
    transformed = (255 - data.train.images[order]) & 128
    draws = augment.draw(200, make_generator(0, 0, "augment"))[order]
    assert torch.equal(images, augment.apply(transformed, draws)), "in turn"
    assert (images == CUTOUT_FILL).any()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"augment": Augment(pad="reflect")}, "augment.pad='reflect' has no effect without augment.crop"),
        ({"num_workers": 8}, "num_workers=8 has no effect without transform"),
        ({"mirrors": ["file:///mnt"]}, "mirrors has no effect: nothing is downloaded for these data"),
        ({"dataset": "cifar100"}, "dataset='cifar100' has no effect: tree holds images in folders of their classes"),
        ({"dataset": "shapes"}, "data_dir tree has no effect with dataset='shapes', which is embedded"),
    ],
)
def test_a_setting_without_effect_is_said_once(
    settings: dict[str, Any], line: str, pixels: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    data = CIFAR10DataModule(**{"data_dir": "tree", **settings})
    for stage in ("fit", "test"):
        data.setup(stage)
    (warning,) = [said for said in capsys.readouterr().err.splitlines() if "warning" in said]
    assert warning == f"lit_cifar: warning: {line}"


def test_settings_with_effect_are_not_spoken_of(pixels: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    augment, transform = Augment(crop=2, pad="reflect"), [v2.RandomInvert()]
    CIFAR10DataModule("tree", augment=augment, transform=transform, num_workers=3).setup("fit")
    CIFAR10DataModule("tree", num_workers=0).setup("fit")
    CIFAR10DataModule("tree", augment=Augment(pad="reflect"), num_workers=4).setup("test")
    CIFAR10DataModule(dataset="shapes").setup("test")
    assert "warning" not in capsys.readouterr().err


def test_a_tree_beside_the_official_files_is_not_passed_over_in_silence(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_official(Path("tree"), "cifar10", monkeypatch)
    CIFAR10DataModule("tree").setup("fit")
    assert "tree holds images in train/ and test/ too, which are not used" in capsys.readouterr().err


def test_an_empty_list_of_mirrors_does_not_mean_the_public_ones() -> None:
    with pytest.raises(UserError, match=r"^mirrors names none"):
        CIFAR10DataModule(mirrors=[])


def test_a_trainers_rank_decides_the_share(shapes: CIFAR10DataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
    loaders: list[DeviceLoader] = []
    for rank in range(2):
        trainer = SimpleNamespace(global_rank=rank, world_size=2, overfit_batches=0.0, max_epochs=1, strategy=strategy)
        monkeypatch.setattr(shapes, "trainer", trainer)
        loaders.append(shapes.test_dataloader())
        assert len(next(iter(shapes.train_dataloader()))[1]) == 32
    assert sum(len(gathered(loader)[1]) for loader in loaders) == 2_000


@pytest.mark.parametrize("overfit", [0.0, 2, 0.5])
def test_overfitting_takes_the_same_batches_in_each_epoch(
    shapes: CIFAR10DataModule, monkeypatch: pytest.MonkeyPatch, overfit: float
) -> None:
    trainer = SimpleNamespace(global_rank=0, world_size=1, overfit_batches=overfit)
    monkeypatch.setattr(shapes, "trainer", trainer)
    orders = [shapes.train_batches().order(epoch) for epoch in range(2)]
    assert torch.equal(*orders) == bool(overfit)


# ---- which source a folder stands for ----


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would have been downloaded."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("lit_cifar.data.download.fetch_folder", lambda *args: calls.append(args))
    return calls


@pytest.mark.parametrize(
    "fill",
    [
        lambda folder: None,
        lambda folder: folder.mkdir(),
        lambda folder: (folder.mkdir(), (folder / f".{CIFAR10.name}.part").touch(), (folder / ".lock").touch()),
    ],
    ids=["missing", "empty", "left by an interrupted download"],
)
def test_a_folder_without_data_is_downloaded_into(
    fill: Callable[[Path], object], tmp_path: Path, fetched: list[tuple[Any, ...]]
) -> None:
    folder = tmp_path / "here"
    fill(folder)
    CIFAR10DataModule(data_dir=str(folder)).prepare_data()
    CIFAR10DataModule(data_dir=str(folder), mirrors=["file:///mnt/mirror"]).prepare_data()
    CIFAR10DataModule(data_dir=str(folder), dataset="cifar100").prepare_data()
    assert fetched == [(folder, CIFAR10, None), (folder, CIFAR10, ["file:///mnt/mirror"]), (folder, CIFAR100, None)]


def test_a_folder_with_other_things_is_left_alone_and_told_what_was_looked_for(
    tmp_path: Path, fetched: list[tuple[Any, ...]]
) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(
        UserError, match=r"holds neither CIFAR-10 \(cifar-10-batches-py/\) nor .*train/<class>/"
    ) as raised:
        CIFAR10DataModule(data_dir=str(tmp_path)).prepare_data()
    assert str(raised.value).isprintable()
    assert not fetched


def test_the_default_folder_may_hold_other_things(
    tmp_path: Path, fetched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").touch()
    (tmp_path / "data" / CIFAR10.folder).mkdir()
    CIFAR10DataModule(dataset="cifar100").prepare_data()
    assert fetched == [(Path("data"), CIFAR100, None)]


def unpacked(folder: Path, spec: Archive) -> None:
    (folder / spec.folder).mkdir(parents=True)


def packed(folder: Path, spec: Archive) -> None:
    folder.mkdir(exist_ok=True)
    (folder / spec.name).touch()


@pytest.mark.parametrize("hold", [unpacked, packed])
@pytest.mark.parametrize(("wanted", "held"), [("cifar100", "cifar10"), ("cifar10", "cifar100")])
def test_a_folder_with_the_other_dataset_names_the_flag(
    tmp_path: Path, wanted: str, held: str, hold: Callable[[Path, Archive], None], fetched: list[tuple[Any, ...]]
) -> None:
    folder = tmp_path / "here"
    hold(folder, ARCHIVES[held])
    data = CIFAR10DataModule(data_dir=str(folder), dataset=wanted)
    titles = f"{ARCHIVES[held].title}, not {ARCHIVES[wanted].title}"
    with pytest.raises(UserError, match=f"here holds {titles}: add dataset='{held}', or name other data"):
        data.prepare_data()
    assert not fetched
    packed(folder, ARCHIVES[wanted])  # both may lie in one folder
    data.prepare_data()
    assert fetched == [(folder, ARCHIVES[wanted], None)]


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_an_official_archive_is_unpacked_into_the_cache_once(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_official(tmp_path / "official", dataset, monkeypatch)
    archive = tmp_path / "given.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files, files.name)
    sha256, num_bytes = hashlib.sha256(archive.read_bytes()).hexdigest(), archive.stat().st_size
    monkeypatch.setitem(ARCHIVES, dataset, replace(ARCHIVES[dataset], sha256=sha256, num_bytes=num_bytes))
    for _ in range(2):
        data = CIFAR10DataModule(data_dir=str(archive), dataset=dataset)
        assert data.count_classes() == (10 if dataset == "cifar10" else 100)
        data.prepare_data()
        data.setup("test")
        assert torch.equal(data.test.images, read_official(files, dataset, train=False).images)
        monkeypatch.setattr("lit_cifar.data.archives.unpack", lambda *_: pytest.fail("unpacked again"))
    assert (cache_dir() / dataset / files.name).is_dir()
    other = "cifar10" if dataset == "cifar100" else "cifar100"
    with pytest.raises(UserError, match=f"add dataset='{dataset}'"):
        CIFAR10DataModule(data_dir=str(archive), dataset=other).prepare_data()


@pytest.fixture
def pixels(tmp_path: Path) -> np.ndarray:
    """Pixels (2 splits, 2 classes, 4 images, 32, 32, 3) uint8 that lie as PNG files in tmp_path / 'tree'."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 4, 32, 32, 3), dtype=np.uint8)
    for split, of_split in zip(("train", "test"), pixels, strict=True):
        for class_name, images in zip(("ant", "bee"), of_split, strict=True):
            folder = tmp_path / "tree" / split / class_name
            folder.mkdir(parents=True)
            for index, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{index}.png")
    return pixels


def test_a_tree_of_images_is_read_class_by_class(
    tmp_path: Path, pixels: np.ndarray, fetched: list[tuple[Any, ...]]
) -> None:
    data = CIFAR10DataModule(data_dir=str(tmp_path / "tree"), batch_size=3, eval_batch_size=3)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert data.classes == ("ant", "bee")
    assert [len(labels) for _, labels in data.train_dataloader()] == [3, 3, 2]
    images, labels = gathered(data.test_dataloader())
    assert torch.equal(images, torch.from_numpy(pixels[1].reshape(8, 32, 32, 3)).permute(0, 3, 1, 2))
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert not fetched


def test_a_prepared_tree_is_listed_once(tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    list_tree = tree._list_tree
    monkeypatch.setattr(tree, "_list_tree", lambda path: listed.append(path) or list_tree(path))
    data = CIFAR10DataModule(data_dir=str(tmp_path / "tree"), batch_size=3)
    for stage in ("fit", "test"):
        data.prepare_data()
        data.setup(stage)
    assert len(listed) == 1


def test_a_cache_damaged_after_it_was_prepared_is_decoded_again(tmp_path: Path, pixels: np.ndarray) -> None:
    data = CIFAR10DataModule(data_dir=str(tmp_path / "tree"), batch_size=3)
    data.prepare_data()
    (cache_file,) = cache_dir().glob("*.zip")
    cache_file.write_bytes(cache_file.read_bytes()[:2000])
    data.setup("test")
    assert torch.equal(data.test.images, torch.from_numpy(pixels[1].reshape(8, 32, 32, 3)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_a_tree_decides_its_classes(tmp_path: Path, pixels: np.ndarray, dataset: str) -> None:
    data = CIFAR10DataModule(data_dir=str(tmp_path / "tree"), dataset=dataset)
    assert data.count_classes() == 2
    data.setup("fit")
    assert data.classes == ("ant", "bee")


def test_what_another_data_module_found_leaves_the_mirrors_to_this_one(
    tmp_path: Path, fetched: list[tuple[Any, ...]]
) -> None:
    other = CIFAR10DataModule(data_dir=str(tmp_path / "none"))
    other.count_classes()
    data = CIFAR10DataModule(data_dir=str(tmp_path / "none"), mirrors=["file:///mnt/mirror"])
    data.adopt_prepared(other)
    data.prepare_data()
    assert fetched == [(tmp_path / "none", CIFAR10, ["file:///mnt/mirror"])]


def test_a_tilde_is_the_home_folder(tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIT_CIFAR_CACHE", "~/decoded")
    assert CIFAR10DataModule(data_dir="~/tree").count_classes() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoded", "tree"]


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/cifar", "hf://datasets/cifar10", "https://host/cifar.tar.gz", "gs://cifar/x", "file:///mnt/cifar"],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_no_data_dir(url: str, kind: type) -> None:
    with pytest.raises(
        UserError, match=r"^data_dir='[a-z0-9]+:.*cifar.* is not supported here; name a path on this machine"
    ):
        CIFAR10DataModule(data_dir=kind(url))
    assert list(Path().iterdir()) == []


def test_the_cache_folder_is_no_url(tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_CIFAR_CACHE", "s3://bucket/cache")
    with pytest.raises(UserError, match="LIT_CIFAR_CACHE s3://bucket/cache: s3:// is not supported here"):
        CIFAR10DataModule(data_dir=str(tmp_path / "tree")).prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch_size", "0"),
        ("--data.eval_batch_size", "0"),
        ("--data.num_val", "-1"),
        ("--data.num_workers", "-1"),
        ("--data.augment.crop", "-1"),
        ("--data.augment.cutout", "-1"),
        ("--data.augment.brightness", "-0.1"),
        ("--data.augment.contrast", "-0.1"),
    ],
)
def test_a_number_out_of_range_ends_in_one_line_before_anything_happens(
    flag: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_cifar.data.datamodule.find_source", lambda *_: pytest.fail("looked for data"))
    with pytest.raises(UserError) as raised:
        lit_cifar.fit.main(["--dataset", "shapes", "--trainer.max_steps", "1", flag, value])
    assert str(raised.value).startswith(f"{flag}: ")
    assert value in str(raised.value)
    assert str(raised.value).isprintable()
    assert list(Path().iterdir()) == []


def test_classes_are_counted_without_a_download(tmp_path: Path, fetched: list[tuple[Any, ...]]) -> None:
    for dataset, num_classes in (("cifar10", 10), ("cifar100", 100), ("shapes", 10)):
        assert CIFAR10DataModule(data_dir=str(tmp_path / "none"), dataset=dataset).count_classes() == num_classes
    assert not fetched
    assert list(tmp_path.iterdir()) == []


# ---- in somebody's script ----


class Foreign(L.LightningModule):
    """Takes float32 images, as torchvision gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

    def step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        assert batch[0].dtype == torch.float32
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    training_step = validation_step = test_step = predict_step = step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def trainer(**settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    limits = {f"limit_{stage}_batches": 1 for stage in ("train", "val", "test", "predict")}
    return L.Trainer(**{**quiet, **limits, "enable_model_summary": False, "max_epochs": 1, **settings})


@pytest.mark.parametrize("stage", [None, "fit", "validate", "test", "predict"])
def test_the_data_module_alone_gives_its_loaders(stage: str | None) -> None:
    data = CIFAR10DataModule(dataset="shapes", batch_size=32, num_val=100)
    data.setup(stage)
    if stage in (None, "fit", "validate"):
        assert sum(len(labels) for _, labels in data.train_dataloader()) == 9900
        assert sum(len(labels) for _, labels in data.val_dataloader()) == 100
    if stage in (None, "test", "predict"):
        for loader in (data.test_dataloader(), data.predict_dataloader()):
            assert sum(len(labels) for _, labels in loader) == 2000
    for other in (pickle.loads(pickle.dumps(data)), copy.deepcopy(data)):
        assert other.classes == data.classes


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("numbers", [{}, {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)}])
def test_normalised_batches_are_torchvisions(num_ranks: int, numbers: dict[str, Any]) -> None:
    settings = {"dataset": "shapes", "batch_size": 300, "num_val": 100, "num_workers": 0}
    settings |= {"augment": {"crop": 4, "flip": "random"}, "transform": v2.RandomInvert()}
    mean, std = numbers.get("mean", (0.5,) * 3), numbers.get("std", (0.5,) * 3)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    for rank in range(num_ranks):
        strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda value: value)
        place = SimpleNamespace(global_rank=rank, world_size=num_ranks, strategy=strategy, overfit_batches=0)
        plain, normalised = CIFAR10DataModule(**settings), CIFAR10DataModule(**settings, normalised=True, **numbers)
        for data in (plain, normalised):
            data.setup()
            data.trainer = SimpleNamespace(**vars(place), max_epochs=1, state=SimpleNamespace(fn="fit"))
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            images, labels = next(iter(getattr(plain, name)()))
            floats, same = next(iter(getattr(normalised, name)()))
            assert floats.dtype == torch.float32
            assert torch.allclose(floats, reference(images), atol=1e-6, rtol=0)
            assert torch.equal(labels, same)


@pytest.mark.filterwarnings("ignore")  # Lightning's, on what these Trainers are
def test_somebody_elses_module_trains_and_the_data_module_goes_from_trainer_to_trainer() -> None:
    data = CIFAR10DataModule(dataset="shapes", batch_size=32, num_val=100, normalised=True)
    first = trainer()
    first.fit(Foreign(), datamodule=data)
    for stage in ("validate", "test", "predict"):
        getattr(trainer(), stage)(Foreign(), datamodule=first.datamodule)
    trainer(overfit_batches=1, max_epochs=2).fit(Foreign(), datamodule=data)
    trainer(reload_dataloaders_every_n_epochs=1, max_epochs=2).fit(Foreign(), datamodule=data)
    line = error_of(lambda: trainer().fit(LitClassifier(nn.Flatten()), datamodule=data))
    assert line.startswith("LitClassifier normalises uint8 images itself")
    line = error_of(lambda: trainer().validate(Foreign(), datamodule=CIFAR10DataModule(dataset="shapes")))
    assert line == "there are no images for validation: set num_val above 0"


@pytest.mark.filterwarnings("ignore")
def test_somebody_elses_module_may_have_settings_of_the_same_names() -> None:
    module, csv = Foreign(), CSVLogger(".")
    module.save_hyperparameters({"batch_size": 3, "mean": (0.1, 0.2, 0.3), "width": 7})
    trainer(logger=csv).fit(module, datamodule=CIFAR10DataModule(dataset="shapes", batch_size=32, normalised=True))
    noted = yaml.full_load(Path(csv.log_dir, "hparams.yaml").read_text())
    assert (noted["batch_size"], noted["data/batch_size"], noted["num_val"], noted["width"]) == (3, 32, 0, 7)


@pytest.mark.filterwarnings("ignore")
def test_the_first_rank_alone_says_which_settings_have_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        data = CIFAR10DataModule(dataset="shapes", num_workers=7)
        data.trainer = SimpleNamespace(global_rank=rank, lightning_module=Foreign())  # type: ignore[assignment]
        data.setup("fit")
    assert capsys.readouterr().err.count("num_workers=7 has no effect") == 1


RANKS = """
import sys
import lightning as L
import torch
from torchvision.transforms import v2
from lit_cifar import CIFAR10DataModule
from test_data import Foreign

if __name__ == "__main__":
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", devices=2, max_epochs=2, limit_train_batches=3, **quiet)
    settings = {"dataset": "shapes", "batch_size": 64, "num_val": 101, "num_workers": 1}
    data = CIFAR10DataModule(transform=v2.RandomInvert(), normalised=True, **settings)
    module = Foreign()
    for stage in (trainer.fit, trainer.validate, trainer.test):
        stage(module, datamodule=data)
    seen = sum(len(labels) for loader in (data.val_dataloader(), data.test_dataloader()) for _, labels in loader)
    weight = trainer.strategy.reduce(module.net[1].weight.detach().clone(), reduce_op="max")
    print(f"<{seen} {torch.equal(weight, module.net[1].weight)}>", flush=True)
"""


@pytest.mark.slow
def test_somebody_elses_module_trains_on_two_processes() -> None:
    Path("ranks.py").write_text(RANKS)
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    done = subprocess.run(
        [sys.executable, "ranks.py"], env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"<(\d+ \w+)>", done.stdout)) == ["1050 True", "1051 True"]


def test_no_rank_of_somebody_elses_module_gets_a_batch_without_images() -> None:
    data = CIFAR10DataModule(dataset="shapes", batch_size=9998, num_val=1, normalised=True)
    data.setup()
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, overfit_batches=0)  # type: ignore[assignment]
    assert data.train_batches().indices(0)[1] == [4999]


def test_its_settings_are_plain_values_and_make_it_again() -> None:
    data = CIFAR10DataModule(
        dataset="shapes", batch_size=np.int64(8), augment=Augment(crop=2), transform=[nn.Identity()]
    )
    assert data.hparams["batch_size"] == 8
    assert not {"mean", "std", "normalised"} & data.hparams.keys()  # which LitClassifier may have other values of
    data = CIFAR10DataModule(dataset="shapes", augment=Augment(crop=2), normalised=True)
    torch.save(dict(data.hparams), "hparams.pt")
    again = CIFAR10DataModule(**torch.load("hparams.pt", weights_only=True))
    assert again.hparams == data.hparams
    assert again.augment == data.augment


@pytest.mark.parametrize(
    "setting",
    [
        *({"batch_size": 0}, {"batch_size": True}, {"num_val": "5"}, {"num_workers": -1}, {"eval_batch_size": 0}),
        *(
            {"seed": 1.5},
            {"dataset": "cifar"},
            {"drop_last": "no"},
            {"mirrors": "host"},
            {"mirrors": []},
            {"augment": 3},
        ),
        *({"transform": [1]}, {"transform": "RandAugment"}, {"augment": {"crops": 1}}, {"augment": {"crop": 0.5}}),
        *({"augment": {"flip": "x"}}, {"mean": 0.5}, {"std": (0, 1, 1)}, {"data_dir": None}, {"normalised": 1}),
        *({"batch_size": "64"}, {"num_val": 0.1}, {"augment": None}, {"normalised": "yes"}, {"mean": (math.nan,) * 3}),
        *({"std": (1, 1, math.inf)}, {"mirrors": ""}, {"batch_size": np.array([4])}, {"dataset": np.array(["a", "b"])}),
    ],
    ids=str,
)
def test_a_wrong_setting_in_python_is_one_line_that_names_it(setting: dict[str, Any]) -> None:
    line = error_of(lambda: CIFAR10DataModule(**{"dataset": "shapes", **setting}))
    assert line.startswith(next(iter(setting)))
    assert line.isprintable()


def test_images_that_nobody_has_read_and_stages_that_are_none_are_told() -> None:
    data = CIFAR10DataModule(dataset="shapes")
    for ask in (data.train_dataloader, data.test_dataloader, lambda: data.classes):
        assert "call setup(" in error_of(ask)
    assert "there is no stage 'train'" in error_of(data.setup, "train")
