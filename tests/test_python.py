"""LitClassifier in anybody's script: a plain Trainer, plain loaders of any data set, other optimisers, subclasses."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, Asking, error_of, results, weights
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.transforms import v2

import lit_cifar.export
import lit_cifar.fit
from lit_cifar import CIFAR10DataModule, LitClassifier, load
from lit_cifar.data.augment import Augment
from lit_cifar.model.optim import Group
from lit_cifar.model.saved import net_settings
from lit_cifar.nets import Net, ResNet18, SpeedNet

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
NUM_IMAGES, CLASSES = 24, tuple("abcdefghij")
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
PIXELS = torch.randint(256, (NUM_IMAGES, 3, 32, 32), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
LABELS = torch.arange(NUM_IMAGES) * 7 % 10
TO_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
NORMALISE = v2.Compose([TO_FLOAT, v2.Normalize(MEAN, STD)])


def plain_trainer(**options: Any) -> Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    return Trainer(**{**defaults, "enable_progress_bar": False, "enable_model_summary": False, **options})


def classifier(**options: Any) -> LitClassifier:
    torch.manual_seed(1)
    return LitClassifier(Net(), **{"lr": 0.01, "mean": MEAN, "std": STD, **options})


class Photos(Dataset[Any]):
    """PIL images with names of classes, as torchvision's data sets have them."""

    def __init__(self, transform: Callable[[Any], Any] | None, classes: tuple[str, ...] = CLASSES) -> None:
        self.transform, self.classes = transform, list(classes)

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(PIXELS[index].permute(1, 2, 0).numpy())
        return self.transform(image) if self.transform else image, int(LABELS[index])


DATASETS: dict[str, tuple[Callable[[], Any], tuple[str, ...] | None]] = {
    "uint8": (lambda: TensorDataset(PIXELS, LABELS), None),
    "float": (lambda: TensorDataset(PIXELS / 255, LABELS), None),
    "normalised": (lambda: TensorDataset(NORMALISE(PIXELS), LABELS), None),
    "0..255 as float": (lambda: TensorDataset(PIXELS.float(), LABELS), None),
    "double": (lambda: TensorDataset(PIXELS.double() / 255, LABELS.int()), None),
    "half": (lambda: TensorDataset((PIXELS / 255).half(), LABELS[:, None]), None),
    "one-hot": (lambda: TensorDataset(PIXELS, F.one_hot(LABELS, 10)), None),
    "PIL": (lambda: Photos(NORMALISE), CLASSES),
    "PIL to uint8": (lambda: Photos(v2.PILToTensor()), CLASSES),
    "subset": (lambda: Subset(Photos(TO_FLOAT), range(NUM_IMAGES)), CLASSES),
    "split": (lambda: random_split(Photos(TO_FLOAT), [NUM_IMAGES, 0])[0], CLASSES),
    "concatenated": (
        lambda: ConcatDataset([Subset(Photos(TO_FLOAT), part) for part in (range(9), range(9, 24))]), CLASSES
    ),
}  # fmt: skip


@pytest.mark.parametrize("dataset", DATASETS)
def test_plain_loaders_of_any_data_set_fit_validate_test_and_predict(dataset: str) -> None:
    make, classes = DATASETS[dataset]
    loader = DataLoader(make(), 8)
    images_before = next(iter(loader))[0].clone()
    trainer, module = plain_trainer(), classifier(tta="mirror")
    trainer.fit(module, loader, loader)
    (tested,) = trainer.test(module, loader, verbose=False)
    (validated,) = trainer.validate(module, loader, verbose=False)
    predicted: Any = trainer.predict(module, loader)
    assert module.classes == (classes or tuple("0123456789"))
    assert next(iter(loader))[0].equal(images_before)
    # by way of the embedded pipeline's uint8 images
    reference = classifier(tta="mirror")
    plain_trainer().fit(reference, DataLoader(TensorDataset(PIXELS, LABELS), 8))
    for weight, expected in zip(module.parameters(), reference.parameters(), strict=True):
        if dataset == "split":
            break  # in another order
        torch.testing.assert_close(weight, expected, atol=2e-3 if dataset == "half" else 1e-5, rtol=1e-3)
    predictions = torch.cat([batch["predictions"] for batch in predicted])
    labels = torch.cat([batch[1] for batch in loader])
    labels = labels.argmax(1) if dataset == "one-hot" else labels.flatten()
    assert tested["test/accuracy"] == pytest.approx(float((predictions == labels).double().mean()))
    assert validated["val/loss"] == tested["test/loss"]
    assert predicted[0]["classes"] == [module.classes[index] for index in predictions[:8].tolist()]
    torch.testing.assert_close(predicted[0]["probabilities"], predicted[0]["logits"].softmax(1))


def test_predictions_take_images_alone_and_average_the_views() -> None:
    module = classifier(tta="mirror")
    trainer = plain_trainer()
    for loader in (DataLoader(PIXELS, 8), DataLoader(TensorDataset(PIXELS), 8), DataLoader(Photos(NORMALISE), 8)):
        batches: Any = trainer.predict(module, loader)
        with torch.no_grad():
            expected = (module(PIXELS[:8]) + module(PIXELS[:8].flip(3))) / 2
        torch.testing.assert_close(batches[0]["logits"], expected, atol=1e-5, rtol=1e-4)


def test_forward_takes_float_images_outside_a_trainer() -> None:
    module = classifier()
    expected = module(PIXELS)
    for images in (PIXELS / 255, NORMALISE(PIXELS), PIXELS.float()):
        before = images.clone()
        torch.testing.assert_close(module(images), expected, atol=1e-5, rtol=1e-4)
        assert images.equal(before)


def test_pictures_of_mistakes_show_float_images_as_they_are() -> None:
    reports = []
    for images in (PIXELS, NORMALISE(PIXELS)):
        module = classifier()
        plain_trainer().test(module, DataLoader(TensorDataset(images, LABELS), 8), verbose=False)
        reports.append(module.reports["test"])
    assert reports[1].mistakes.images.dtype == torch.uint8
    assert reports[1].mistakes.images.equal(reports[0].mistakes.images)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(PIXELS, LABELS, strict=True)


def test_a_schedule_counts_the_batches_of_the_trainers_own_loader() -> None:
    loader = DataLoader(TensorDataset(PIXELS, LABELS), 5)
    for options, num_steps in (({}, 5), ({"limit_train_batches": 3}, 3), ({"limit_train_batches": 0.4}, 2)):
        module = classifier(schedule="cosine")
        trainer = plain_trainer(**options)
        trainer.fit(module, loader)
        assert (trainer.global_step, module._num_steps()) == (num_steps, num_steps)
    module = classifier(schedule="cosine")
    plain_trainer(max_epochs=-1, max_steps=4).fit(module, DataLoader(Endless(), 5))
    assert module.plan_steps() == 4
    message = error_of(plain_trainer().fit, classifier(schedule="cosine"), DataLoader(Endless(), 5))
    assert "schedule='cosine' needs an end" in message


def test_a_net_is_initialised_from_a_loaders_images_and_random_states_stay() -> None:
    seen = []
    for net in (Asking(3, 10), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))):
        drawn: list[Tensor] = []

        class Keeps(Callback):
            def on_train_batch_start(
                self, trainer: Any, module: Any, batch: Any, batch_idx: int, to: Any = drawn
            ) -> None:
                to.append(batch[1])

        torch.manual_seed(3)
        loader = DataLoader(Photos(v2.Compose([v2.RandomHorizontalFlip(0), TO_FLOAT])), 8, shuffle=True)
        plain_trainer(callbacks=[Keeps()]).fit(LitClassifier(net), loader)
        seen.append(torch.cat(drawn))
        if isinstance(net, Asking):
            torch.testing.assert_close(net.images, PIXELS / 127.5 - 1)
    assert seen[0].equal(seen[1]), "the shuffle's draws moved"


class Foreign(LightningDataModule):
    """Somebody's data module, which knows nothing of this project, and has hyperparameters of its own."""

    def __init__(self, lr: float = 3.0, mean: tuple[float, ...] = MEAN) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Photos(NORMALISE), batch_size=8)  # by position, Lightning 2.6 cannot predict with it

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def test_a_foreign_data_module_works_and_its_hyperparameters_stand_beside_ours() -> None:
    trainer, module = plain_trainer(logger=CSVLogger("."), callbacks=[]), classifier(schedule="linear")
    trainer.fit(module, datamodule=Foreign())
    assert module.classes == CLASSES
    assert trainer.test(module, datamodule=Foreign(), verbose=False)[0].keys() >= {"test/accuracy", "test/loss"}
    assert len(trainer.predict(module, datamodule=Foreign()) or []) == 3
    noted = Path(trainer.loggers[0].log_dir, "hparams.yaml").read_text()  # type: ignore[arg-type]
    assert "lr: 3.0" in noted
    assert "model/lr: 0.01" in noted
    # a Trainer remembers the data module of an earlier call
    unnamed = DataLoader(TensorDataset(PIXELS, LABELS), 8)
    other = classifier()
    trainer.test(other, unnamed, verbose=False)
    assert other.classes == tuple("0123456789")


def test_the_data_module_of_this_project_works_in_a_plain_trainer_twice() -> None:
    data = CIFAR10DataModule(dataset="shapes", batch_size=500, num_val=500)
    module = classifier(schedule="onecycle", warmup=0.3)
    for _ in range(2):
        trainer = plain_trainer(limit_train_batches=2)
        trainer.fit(module, datamodule=data)
        (tested,) = trainer.test(module, datamodule=data, verbose=False)
        assert tested["test/accuracy"] == module.reports["test"].accuracy
        assert module.reports["test"].confusion.sum() == 2000
    assert module.classes == data.classes


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((NORMALISE(PIXELS) * 3, LABELS), "images go from .* normalised with other numbers .* leave Normalize out"),
        ((PIXELS[:, :1], LABELS), r"images are 1x32x32, but LitClassifier takes 3x32x32: .*Resize.*RGB"),
        ((PIXELS[:, :, :28, :28], LABELS), r"images are 3x28x28"),
        ((PIXELS, LABELS / 2), r"labels are torch.float32 \(24,\): want integers"),
        ((PIXELS, torch.zeros(24, 3)), r"labels are torch.float32 \(24, 3\): want integers"),
        ((PIXELS, LABELS + 1), "labels go from 1 to 10, but there are 10 classes"),
        ((PIXELS, LABELS, LABELS), "a batch is a list of Tensor, Tensor, Tensor; want a pair"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_what_does_not_fit_is_said_in_one_line(batch: tuple[Tensor, ...], message: str, stage: str) -> None:
    loader = DataLoader(TensorDataset(*batch), 24)
    assert re.search(message, error_of(getattr(plain_trainer(), stage), classifier(), loader))


def test_batches_that_are_no_pair_are_named() -> None:
    named: Any = [{"image": image, "label": label} for image, label in zip(PIXELS, LABELS, strict=True)]
    assert "a batch is a dict of image, label; want a pair" in error_of(
        plain_trainer().fit, classifier(), DataLoader(named, 8)
    )
    assert "a batch is a Tensor of images alone" in error_of(plain_trainer().fit, classifier(), DataLoader(PIXELS, 8))
    few = DataLoader(Photos(TO_FLOAT, ("a", "b", "c")), 8)
    assert "Net gives 10 logits but the data has 3 classes" in error_of(plain_trainer().fit, classifier(), few)


def test_mixed_labels_train_and_their_largest_share_is_tested() -> None:
    mixup = v2.MixUp(num_classes=10)
    loader = DataLoader(
        TensorDataset(PIXELS / 255, LABELS),
        8,
        collate_fn=lambda samples: mixup(*torch.utils.data.default_collate(samples)),
    )
    module = classifier(label_smoothing=0.1)
    trainer = plain_trainer()
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert module.reports["val"].confusion.sum() == NUM_IMAGES


# ---- values ----


def events(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_test_returns_its_numbers_prints_them_and_each_logger_gets_them_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loggers = [TensorBoardLogger(".", default_hp_metric=False), CSVLogger(".")]
    trainer, module = plain_trainer(logger=loggers, max_epochs=2, log_every_n_steps=1), classifier(tta="mirror")
    loader = DataLoader(Photos(TO_FLOAT), 8)
    trainer.fit(module, loader, loader)
    (tested,) = trainer.test(module, loader)
    expected = {f"test/{name}": value for name, value in module.reports["test"].scalars().items()}
    expected |= {f"test_without_tta/{name}": value for name, value in module.reports["plain"].scalars().items()}
    assert tested == expected
    printed = capsys.readouterr().out
    assert "test/accuracy/a" in printed
    assert str(tested["test/loss"]) in printed
    found = events(loggers[0].log_dir)
    assert {tag: values for tag, values in found.items() if tag.startswith("test")} == {
        tag: [(6, pytest.approx(value))] for tag, value in tested.items()
    }
    assert [step for step, _ in found["val/loss"]] == [3, 6]
    assert [step for step, _ in found["train/loss"]] == [0, 1, 2, 3, 4, 5]
    assert all(len({step for step, _ in values}) == len(values) for tag, values in found.items() if tag != "epoch")
    assert len(found["epoch"]) == 6, "Lightning's own, with the loss of each step and nothing more"


def test_the_loss_is_there_for_callbacks_without_the_commands_progress() -> None:
    losses: list[float] = []

    class Watches(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))
            assert losses[-1] == pytest.approx(float(outputs["loss"]))

    loader = DataLoader(TensorDataset(PIXELS, LABELS), 8)
    callbacks = [Watches(), EarlyStopping("train/loss", check_on_train_epoch_end=True), EarlyStopping("val/loss")]
    plain_trainer(max_epochs=2, callbacks=callbacks).fit(classifier(), loader, loader)
    assert len(losses) == 6


# ---- checkpoints ----


def test_a_checkpoint_from_python_says_how_it_is_made() -> None:
    groups: Any = [{"name": "filters", "pattern": "conv.*weight"}, Group("rest", "", lr=0.5)]
    module = classifier(tta="mirror_shift", groups=groups, sides=[32], label_smoothing=0.1)
    trainer = plain_trainer()
    trainer.fit(module, DataLoader(Photos(TO_FLOAT), 8))
    module.lr = 0.25  # as a search does
    trainer.save_checkpoint("a.ckpt")
    checkpoint = torch.load("a.ckpt", weights_only=True)
    settings = checkpoint["lit_cifar"]["config"]["model"]
    assert settings["net"] == {"class_path": "lit_cifar.nets.Net", "init_args": {"num_classes": 10}}
    assert (settings["tta"], settings["lr"], settings["groups"][1]["lr"]) == ("mirror_shift", 0.25, 0.5)
    net, classes = load("a.ckpt")
    again = LitClassifier.load_from_checkpoint("a.ckpt")
    other = LitClassifier.load_from_checkpoint("a.ckpt", net=Net(), tta="none")
    assert tuple(classes) == again.classes == CLASSES
    assert (again.tta, again.lr, again.sides, again.label_smoothing) == ("mirror_shift", 0.25, [32], 0.1)
    assert again.groups == module.groups
    assert (other.tta, again.training) == ("none", True)
    with torch.no_grad():
        assert again.eval()(PIXELS).equal(module.eval()(PIXELS))
        assert other.eval()(PIXELS).equal(module(PIXELS))
        assert (
            net(PIXELS)
            .argmax(1)
            .equal(
                torch.cat([batch["predictions"] for batch in trainer.predict(module, DataLoader(PIXELS, 8)) or []])  # type: ignore[index]
            )
        )
    assert again.hparams["schedule"] == "constant"


class Remade(nn.Sequential):
    """A net whose arguments can be read from its attributes; `rate` only where it is kept."""

    def __init__(self, num_classes: int, width: int = 4, rate: float = 0.5, keeps: bool = True) -> None:
        norm, dropout = nn.BatchNorm1d(width), nn.Dropout(rate)
        super().__init__(nn.Flatten(), nn.Linear(3072, width), norm, dropout, nn.Linear(width, num_classes))
        self.num_classes, self.width, self.keeps = num_classes, width, keeps
        if keeps:
            self.rate = rate


@pytest.mark.parametrize(
    ("make", "init_args"),
    [
        (lambda: Net(3), {"num_classes": 3}),
        (lambda: ResNet18(7), {"num_classes": 7}),
        (
            lambda: SpeedNet(5, (8, 16, 16), 3, "silu", 0.2),
            {"num_classes": 5, "widths": [8, 16, 16], "depth": 3, "activation": "silu", "momentum": 0.2},
        ),
        (lambda: Remade(3, 5, 0.2), {"num_classes": 3, "width": 5, "rate": 0.2, "keeps": True}),
        (lambda: Remade(3, 5, 0.2, keeps=False), None),  # dropout would be another
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), None),
        (lambda: torchvision.models.resnet18(num_classes=3), None),
    ],
)
def test_a_net_is_named_only_if_it_can_be_made_again(make: Any, init_args: dict[str, Any] | None) -> None:
    net = make()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()
    found = net_settings(net)
    assert (found and found["init_args"]) == init_args
    assert torch.get_rng_state().equal(random_state)
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


def test_a_net_that_a_file_does_not_name_or_that_is_a_strangers_is_given_by_the_user() -> None:
    trainer = plain_trainer()
    for module, way_out in ((LitClassifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))), "which net"),
                            (LitClassifier(Remade(10)), "trust")):  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(PIXELS, LABELS), 8))
        trainer.save_checkpoint("a.ckpt")
        assert way_out in error_of(LitClassifier.load_from_checkpoint, "a.ckpt")
        again = LitClassifier.load_from_checkpoint("a.ckpt", net=module.net)
        assert again.net is module.net
    assert isinstance(LitClassifier.load_from_checkpoint("a.ckpt", trust=True).net, Remade)


def test_classes_that_data_do_not_name_come_from_the_checkpoint() -> None:
    trainer, module = plain_trainer(), classifier()
    trainer.fit(module, DataLoader(Photos(TO_FLOAT), 8))
    trainer.save_checkpoint("a.ckpt")
    fresh = classifier()
    trainer.test(fresh, DataLoader(TensorDataset(PIXELS, LABELS), 8), ckpt_path="a.ckpt", verbose=False)
    assert fresh.classes == CLASSES
    other = DataLoader(Photos(TO_FLOAT, CLASSES[::-1]), 8)
    assert "another order" in error_of(lambda: trainer.test(fresh, other, ckpt_path="a.ckpt"))


# ---- subclasses and other optimisers ----


class Adam(LitClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.003, weight_decay=0.3, betas=(0.8, 0.99))


class Groups(LitClassifier):
    def configure_optimizers(self) -> Any:
        filters = [weight for weight in self.net.parameters() if weight.ndim == 4]
        rest = [weight for weight in self.net.parameters() if weight.ndim != 4]
        return torch.optim.SGD([{"params": filters, "lr": 0.01}, {"params": rest, "lr": 0.002, "momentum": 0.5}])


class OneCycle(LitClassifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.001)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=13)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Plateau(LitClassifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


class Two(LitClassifier):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        *body, head = self.net.children()
        bodies = [weight for layer in body for weight in layer.parameters()]
        return torch.optim.SGD(bodies, lr=0.01), torch.optim.AdamW(head.parameters(), lr=0.001)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.log("train/loss", loss)


@pytest.mark.parametrize("kind", [Adam, Groups, OneCycle, Plateau, Two])
def test_a_subclass_with_its_own_optimiser_is_left_alone_and_resumes_to_the_bit(kind: type[LitClassifier]) -> None:
    loader = DataLoader(TensorDataset(NORMALISE(PIXELS), LABELS), 6)

    def run(num_epochs: int, ckpt_path: str | None = None) -> tuple[list[list[dict[str, Any]]], dict[str, Tensor]]:
        torch.manual_seed(1)
        module = kind(Net(), lr=0.5, momentum=0.1, weight_decay=0.7, mean=MEAN, std=STD)
        trainer = plain_trainer(max_epochs=num_epochs)
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
        trainer.save_checkpoint("a.ckpt")
        groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in trainer.optimizers]
        return groups, module.state_dict()

    run(1)
    resumed = run(3, "a.ckpt")
    whole = run(3)
    assert resumed[0] == whole[0]
    assert all(torch.equal(weight, whole[1][name]) for name, weight in resumed[1].items())
    settings = [group for groups in whole[0] for group in groups]
    expected = {
        Adam: [(0.003, 0.3)], Groups: [(0.01, 0), (0.002, 0)], OneCycle: [(pytest.approx(8e-8), 0.01)],
        Plateau: [(0.0025, 0)], Two: [(0.01, 0), (0.001, 0.01)],
    }[kind]  # fmt: skip
    assert [(group["lr"], group["weight_decay"]) for group in settings] == expected


class Distils(LitClassifier):
    """A subclass of somebody: arguments of its own, a loss, a forward without sides, values that it logs."""

    def __init__(self, alpha: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters(ignore=["net"])

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images.flip(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.hparams["alpha"] * super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_epoch=True)
        self.log("mine", 1.0)
        return loss


def test_a_subclass_keeps_its_arguments_forward_and_logged_values() -> None:
    loader = DataLoader(TensorDataset(PIXELS / 255, LABELS), 8)
    trainer = plain_trainer(logger=CSVLogger("."))
    module = Distils(alpha=0.5, net=Net(), lr=0.03, tta="mirror")
    trainer.fit(module, loader, loader)
    assert {"train/loss", "train/loss_epoch", "mine", "val/accuracy"} <= trainer.callback_metrics.keys()
    assert dict(module.hparams) == {"alpha": 0.5, "lr": 0.03, "tta": "mirror"}
    trainer.save_checkpoint("a.ckpt")
    again = Distils.load_from_checkpoint("a.ckpt", net=Net())
    assert (again.hparams["alpha"], again.lr, again.tta) == (0.5, 0.03, "mirror")
    with torch.no_grad():
        assert again.eval()(PIXELS).equal(LitClassifier.forward(module.eval(), PIXELS.flip(3)))


def test_a_subclass_with_steps_of_its_own_gets_its_batches_as_they_are() -> None:
    seen: list[Any] = []

    class Own(LitClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch)
            return F.cross_entropy(self(batch["image"]), batch["label"])

    named: Any = [{"image": image, "label": label} for image, label in zip(PIXELS, LABELS, strict=True)]
    plain_trainer().fit(Own(Net()), DataLoader(named, 8))
    assert [set(batch) for batch in seen] == [{"image", "label"}] * 3


def test_settings_may_be_numpys() -> None:
    module = LitClassifier(Net(), mean=np.array(MEAN), std=torch.tensor(STD), lr=np.float32(0.5))  # type: ignore[arg-type]
    assert module.mean.dtype == torch.float32
    assert module.hparams["mean"] == list(MEAN)
    assert type(module.hparams["lr"]) is float


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "schedule='cosin' is none of constant, linear, cosine, onecycle"),
        ({"tta": "mirrors"}, "tta='mirrors' is none of none, mirror, mirror_shift"),
        ({"groups": [Group("a", "", kind="adam")]}, "a's kind 'adam' is none of sgd, muon"),  # type: ignore[arg-type]
        ({"groups": [Group("a", ["conv"])]}, "a's pattern ['conv'] is no text"),  # type: ignore[arg-type]
        ({"groups": [{"name": "a", "patern": ""}]}, "is no group: want Group(...), or a dict of name, pattern, kind"),
        ({"groups": ["conv"]}, "'conv' is no group"),
        ({"optimizer": "AdamW"}, "optimizer='AdamW' is no class, such as torch.optim.AdamW"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "is no class, such as torch.optim.AdamW"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR, "scheduler_interval": "batch"}, "is none of step, epoch"),
        ({"mean": (0.5,)}, "mean (0.5,): give 3 numbers, one for each channel"),
        ({"mean": 0.5}, "mean=0.5 is no list"),
        ({"std": "0.5"}, "std='0.5' is no list"),
        ({"mean": np.zeros((3, 1, 1))}, "mean [[0.0]] is not a number"),
        ({"lr": "0.1"}, "lr='0.1' is not a number"),
        ({"lr": True}, "lr=True is not a number"),
        ({"momentum": {}}, "momentum {} is not a number"),
        ({"compile": "yes"}, "compile='yes' is not True or False"),
        ({"compile": 1}, "compile=1 is not True or False"),
        ({"tf32": "high"}, "tf32='high' is not True or False"),
        ({"nesterov": []}, "nesterov=[] is not True or False"),
        ({"sides": 24}, "sides=24 is no list"),
        ({"sides": [24.0]}, "sides=24.0 is not a whole number"),
        ({"sides": np.array([4, 32])}, "sides=4 is out of range"),
        ({"tta": True}, "tta=True is none of none, mirror, mirror_shift"),
        ({"schedule": ["cosine"]}, "schedule=['cosine'] is none of constant"),
        ({"groups": {}}, "groups {} is no list"),
        ({"groups": "conv"}, "groups='conv' is no list"),
        ({"groups": [{"name": "a", "pattern": "", "lr": "fast"}]}, "groups: a's lr 'fast' is not a number"),
        ({"groups": [Group("a", "", nesterov=3)]}, "groups: a's nesterov 3 is not True or False"),  # type: ignore[arg-type]
        ({"scheduler": 3}, "scheduler=3 is no class"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR, "scheduler_monitor": 3}, "scheduler_monitor=3 is no text"),
        ({"net": Net}, "net gives type, no torch.nn.Module"),
        ({"lr": 10**400}, "is out of range: int too large to convert to float"),
        ({"optimizer": {"class_path": "torch.optim.AdamW", "init_args": [0.1]}}, "is no class, such as"),
    ],
)
def test_settings_that_the_parser_would_refuse_are_refused_in_python(options: dict[str, Any], message: str) -> None:
    assert message in error_of(lambda: LitClassifier(**{"net": Net(), **options}))


@dataclass(frozen=True)
class Noted(Group):
    note: str = ""


def test_a_group_may_be_of_a_class_of_ones_own() -> None:
    (group,) = classifier(groups=[Noted("all", "", lr=0.5, note="mine")]).groups
    assert (group.name, group.lr) == ("all", 0.5)


def test_a_transform_that_is_no_module_is_told_what_is_wanted() -> None:
    message = error_of(lambda: CIFAR10DataModule(transform=torchvision.transforms.Compose([])))  # type: ignore[arg-type]
    assert message == "transform of Compose is no list of torch.nn.Module"


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_a_named_optimiser_is_made_again_from_a_checkpoint() -> None:
    loader = DataLoader(TensorDataset(PIXELS, LABELS), 8)
    named: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, weight_decay=0.05, betas=(0.8, 0.9)),
        "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1),
        "scheduler_interval": "step",
        "groups": [Group("muon", "conv.*weight", kind="muon", lr=0.02), Group("rest", "")],
        "lr": 0.002,
    }
    whole = classifier(**named)
    plain_trainer(max_epochs=2).fit(whole, loader)
    trainer = plain_trainer()
    trainer.fit(classifier(**named), loader)
    trainer.save_checkpoint("a.ckpt")
    again = LitClassifier.load_from_checkpoint("a.ckpt")
    arguments = again.hparams["optimizer"]["init_args"]
    assert (arguments["weight_decay"], arguments["betas"], arguments["eps"]) == (0.05, [0.8, 0.9], 1e-8)
    own = LitClassifier.load_from_checkpoint("a.ckpt", net=Net())
    for module in (again, own):
        plain_trainer(max_epochs=2).fit(module, loader, ckpt_path="a.ckpt")
        assert all(map(torch.equal, module.state_dict().values(), whole.state_dict().values()))


def test_commands_go_on_with_and_export_a_checkpoint_of_a_plain_trainer() -> None:
    adamw = partial(torch.optim.AdamW, weight_decay=0.05)
    module = classifier(lr=None, optimizer=adamw, scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    trainer = plain_trainer(limit_train_batches=2)
    trainer.fit(module, datamodule=CIFAR10DataModule(dataset="shapes", batch_size=100, num_val=100))
    trainer.save_checkpoint("a.ckpt")
    lit_cifar.export.main(["--ckpt_path", "a.ckpt", "--output", "a.safetensors"])
    assert Path("a.safetensors").is_file()
    limits = ["--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "1", "--log_level", "warning"]
    again = ["--resume", "a.ckpt", "--dataset", "shapes", "--batch_size", "100", "--data.num_val", "100", *limits]
    message = error_of(lit_cifar.fit.main, [*again, "--model.optimizer.weight_decay", "0.3"])
    assert message.startswith("--resume: --model.optimizer.weight_decay was 0.05 and is now 0.3")
    lit_cifar.fit.main([*again, "--max_epochs", "2", "--accelerator", "cpu"])
    assert results("version_0")["num_steps"] == 4


def test_a_command_goes_on_with_the_batches_of_a_checkpoint_from_python() -> None:
    def data() -> CIFAR10DataModule:
        augment = Augment(flip="random")
        return CIFAR10DataModule(dataset="shapes", batch_size=50, num_val=100, seed=3, drop_last=True, augment=augment)

    few: dict[str, Any] = {"limit_train_batches": 3, "limit_val_batches": 1}
    trainer, module = plain_trainer(**few), classifier()
    trainer.fit(module, datamodule=data())
    trainer.save_checkpoint("a.ckpt")
    plain_trainer(**few, max_epochs=2).fit(module, datamodule=data(), ckpt_path="a.ckpt", weights_only=True)
    limits = ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--log_level", "warning"]
    limits += ["--trainer.limit_test_batches", "1"]
    lit_cifar.fit.main(["--resume", "a.ckpt", "--max_epochs", "2", "--accelerator", "cpu", *limits])
    assert results("version_0")["batch_size"] == 50
    ours = module.net.state_dict()
    assert all(weights("version_0")[f"net.{name}"].equal(ours[name]) for name in ours)
    message = error_of(lit_cifar.fit.main, ["--resume", "a.ckpt", "--seed", "4", *limits])
    assert message.startswith("--resume: --seed was 3 and is now 4")


def test_commands_go_on_with_what_was_saved_after_a_test_as_with_what_was_saved_before() -> None:
    trainer, module = plain_trainer(limit_train_batches=2, limit_test_batches=1), classifier()
    trainer.fit(module, datamodule=CIFAR10DataModule(dataset="shapes", batch_size=100, num_val=100))
    trainer.save_checkpoint("before.ckpt")
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    trainer.save_checkpoint("after.ckpt")
    limits = ["--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "1", "--log_level", "warning"]
    limits += ["--dataset", "shapes", "--batch_size", "100", "--data.num_val", "100", "--accelerator", "cpu"]
    for name in ("before", "after"):
        lit_cifar.fit.main(["--resume", f"{name}.ckpt", "--max_epochs", "2", *limits])
    assert all(map(torch.equal, weights("version_0").values(), weights("version_1").values()))


@pytest.mark.parametrize("optimizer", [None, lambda weights: torch.optim.AdamW(weights, lr=0.002)])
def test_what_a_checkpoint_cannot_hold_is_said_and_not_replaced(
    optimizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = DataLoader(TensorDataset(PIXELS, LABELS), 8)
    made: dict[str, Any] = {"optimizer": optimizer, "scheduler": step_lr, "scheduler_interval": "step"}
    trainer = plain_trainer()
    trainer.fit(classifier(lr=None, **made), loader)
    trainer.save_checkpoint("a.ckpt")
    again = LitClassifier.load_from_checkpoint("a.ckpt")
    assert "own scheduler, which it was trained with: give it again" in capsys.readouterr().err
    message = error_of(lambda: plain_trainer(max_epochs=2).fit(again, loader, ckpt_path="a.ckpt"))
    assert "give LitClassifier the same to go on" in message
    plain_trainer().test(again, loader, verbose=False)
    given = LitClassifier.load_from_checkpoint("a.ckpt", **made)
    assert capsys.readouterr().err == ""
    plain_trainer(max_epochs=2).fit(given, loader, ckpt_path="a.ckpt")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_checkpoints_of_lightnings_own_callback_resume_in_a_plain_trainer() -> None:
    loader = DataLoader(TensorDataset(PIXELS / 255, LABELS), 6)
    weights = []
    for ckpt_path in (None, "best"):
        saves = ModelCheckpoint("resumed" if ckpt_path else "saved", "{epoch}", monitor="val/accuracy", save_top_k=-1)
        trainer = plain_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saves])
        module = classifier(schedule="cosine", momentum=0.8)
        path = next(Path("saved").glob("epoch=0*.ckpt")) if ckpt_path else None
        trainer.fit(module, loader, loader, ckpt_path=path)
        weights.append(module.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.filterwarnings("ignore:The `.*` does not have many workers")
def test_the_documents_examples_run_in_turn() -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs/in-your-own-code.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "in_your_own_code"}
    for example in examples:
        exec(example, names)
    assert names["results"][0].keys() >= {"test/accuracy", "test_without_tta/accuracy"}
    with torch.no_grad():
        assert names["again"].eval()(PIXELS).equal(names["model"].eval()(PIXELS))


# ---- several processes ----

PROCESSES = """
import sys, torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from lit_cifar import LitClassifier
from lit_cifar.nets import Net
if __name__ == "__main__":
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.rand(24, 3, 32, 32), torch.arange(24) % 10), 3)
    module = LitClassifier(Net(), lr=0.01, schedule="cosine")
    before = module.net.fc3.bias.detach().clone()
    trainer = Trainer(
        strategy=sys.argv[1], accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    (tested,) = trainer.test(module, loader, verbose=False)
    trained = bool((module.net.fc3.bias != before).any())
    print(trained, tested["test/accuracy"] * 24, float(trainer.callback_metrics["test/accuracy"]) * 24)
"""


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("ddp_notebook", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")),
        pytest.param("ddp_spawn", marks=pytest.mark.slow),
    ],
)
def test_two_processes_that_a_notebook_or_script_starts(strategy: str, tmp_path: Path) -> None:
    Path("script.py").write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, "script.py", strategy],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained, returned, logged = done.stdout.split()[-3:]
    assert trained == "True"
    assert float(returned) == round(float(returned))
    assert float(logged) == pytest.approx(float(returned))
