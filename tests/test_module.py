"""LitClassifier against torch, torchvision and scikit-learn: the same logits, losses, gradients, counts and steps."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Asking
from lightning.pytorch import LightningDataModule, Trainer
from sklearn.metrics import confusion_matrix, recall_score  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchvision.transforms import v2

from lit_cifar.data.loader import DeviceLoader, EvalBatches, TrainBatches
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError
from lit_cifar.model.classifier import views
from lit_cifar.model.module import LitClassifier
from lit_cifar.model.optim import Group, lr_factor
from lit_cifar.nets import Net
from lit_cifar.results.report import Report
from lit_cifar.settings import HalfOpenUnitInterval, NonNegativeFloat, Side

CPU = torch.device("cpu")
CLASSES = tuple("abcdefghij")


def make_split(num_images: int = 23, classes: tuple[str, ...] = CLASSES) -> Split:
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(256, (num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(len(classes), (num_images,), generator=generator), classes)


def linear(num_classes: int) -> nn.Module:
    """A net whose predictions differ from image to image, as an untrained convolutional net's hardly do."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


# ---- forward ----


def test_the_tutorials_net_has_62006_parameters() -> None:
    assert sum(parameter.numel() for parameter in Net().parameters()) == 62_006
    assert Net(num_classes=3)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_the_tutorials_net_equals_its_layers_in_sequence() -> None:
    net = Net()
    reference = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2, 2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )
    weights = zip(reference.state_dict(), net.state_dict().values(), strict=True)
    reference.load_state_dict(dict(weights))
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(net(images), reference(images), rtol=0, atol=1e-6)


def test_forward_equals_torchvisions_scaling_and_normalising_before_the_net() -> None:
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    module = LitClassifier(Net(), mean=mean, std=std)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    images = make_split().images
    before = images.clone()
    torch.testing.assert_close(module(images), module.net(normalise(images)), rtol=0, atol=1e-6)
    assert torch.equal(images, before)


# ---- training ----


def training_losses(module: LitClassifier, split: Split, batch_size: int, num_ranks: int) -> Iterator[list[Tensor]]:
    """The ranks' losses of each batch, as each rank would compute them."""
    loaders = [
        DeviceLoader(split, TrainBatches(len(split.labels), batch_size, 3, rank=rank, num_ranks=num_ranks), CPU)
        for rank in range(num_ranks)
    ]
    for index, shares in enumerate(zip(*loaders, strict=True)):
        losses = []
        for loader, share in zip(loaders, shares, strict=True):
            module._trainer = SimpleNamespace(world_size=num_ranks, train_dataloader=loader)  # type: ignore[assignment]
            losses.append(module.training_step(share, index))
        yield losses


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_images", [12, 13, 16])  # the last batch: full; 1 image, so ranks without any; 4 images
def test_the_ranks_mean_of_loss_and_gradients_is_the_whole_batchs(
    num_images: int, num_ranks: int, label_smoothing: float
) -> None:
    split = make_split(num_images)
    torch.manual_seed(0)
    module = LitClassifier(Net(), label_smoothing=label_smoothing).double()
    parameters = list(module.parameters())
    order = TrainBatches(num_images, 6, 3).order(0).split(6)
    for indices, losses in zip(order, training_losses(module, split, 6, num_ranks), strict=True):
        expected = F.cross_entropy(
            module(split.images[indices]), split.labels[indices], label_smoothing=label_smoothing
        )
        mean = torch.stack(losses).mean()  # DDP takes the ranks' mean of gradients
        torch.testing.assert_close(mean, expected)
        torch.testing.assert_close(torch.autograd.grad(mean, parameters), torch.autograd.grad(expected, parameters))


# ---- evaluation ----


@pytest.mark.parametrize(("num_classes", "batch_size"), [(10, 1), (10, 7), (10, 500), (3, 7)])
def test_the_report_equals_scikit_learns_on_the_same_predictions(num_classes: int, batch_size: int) -> None:
    split = make_split(150, CLASSES[:num_classes])
    module = LitClassifier(linear(num_classes))
    module.set_classes(split.classes)
    report = evaluate(module, split, batch_size)
    labels = split.labels.numpy()
    logits = module(split.images).detach()
    predictions = logits.argmax(1).numpy()
    every_class = list(range(num_classes))
    assert len(np.unique(predictions)) == num_classes
    assert np.array_equal(report.confusion.numpy(), confusion_matrix(labels, predictions, labels=every_class))
    recalls = recall_score(labels, predictions, labels=every_class, average=None)
    assert list(report.per_class_accuracy.values()) == pytest.approx(recalls.tolist())
    assert report.accuracy == pytest.approx((labels == predictions).mean())
    assert report.loss == pytest.approx(F.cross_entropy(logits.double(), split.labels).item(), rel=1e-6)
    again = evaluate(module, split, batch_size)
    assert torch.equal(again.confusion, report.confusion), "counts of one evaluation do not reach the next"


class Scalars:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics = {**metrics, "step": step}


def evaluate(module: LitClassifier, split: Split, batch_size: int, **trainer: Any) -> Report:
    """Runs the hooks of a test as the Trainer does."""
    module._trainer = SimpleNamespace(
        **{"sanity_checking": False, "loggers": [], "global_step": 7, "world_size": 1, **trainer}
    )  # type: ignore[assignment]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    for index, batch in enumerate(zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)):
        module.test_step(batch, index)
    module.on_test_epoch_end()
    return module.reports["test"]


def test_loggers_get_the_reports_own_values() -> None:
    module, logger = LitClassifier(linear(10)), Scalars()
    module.set_classes(CLASSES)
    report = evaluate(module, make_split(), 5, loggers=[logger])
    assert logger.metrics == {**{f"test/{name}": value for name, value in report.scalars().items()}, "step": 7}


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_an_evaluation_that_was_broken_off_leaves_no_counts(stage: str) -> None:
    """As Ctrl-C in a notebook does, or a batch too large for the device's memory."""
    data = Data()
    data.val_dataloader = data.test_dataloader  # type: ignore[method-assign]
    module = LitClassifier(linear(10), tta="mirror")
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    evaluate_all = getattr(trainer, stage)
    evaluate_all(module, datamodule=data, verbose=False)
    reports = dict(module.reports)
    inner = module._evaluate

    def breaks_off(*given: Any) -> None:
        inner(*given)
        raise RuntimeError("out of memory")

    module._evaluate = breaks_off  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_all(module, datamodule=data, verbose=False)
    module._evaluate = inner  # type: ignore[method-assign]
    evaluate_all(module, datamodule=data, verbose=False)
    for name, report in reports.items():
        assert torch.equal(module.reports[name].confusion, report.confusion)


def test_the_check_before_training_reports_nothing_and_leaves_no_counts() -> None:
    checked, fresh = LitClassifier(linear(10)), LitClassifier(linear(10))
    for module in (checked, fresh):
        module.set_classes(CLASSES)
    with pytest.raises(KeyError):
        evaluate(checked, make_split(5), 5, sanity_checking=True)
    assert evaluate(checked, make_split(), 5).results() == evaluate(fresh, make_split(), 5).results()


# ---- what does not fit ----


def test_another_number_of_logits_names_both_numbers_and_the_way_out() -> None:
    with pytest.raises(UserError, match=r"Net gives 10 logits but the data has 7 classes.*num_classes=7"):
        LitClassifier(Net()).set_classes(CLASSES[:7])


@pytest.mark.parametrize(
    "options",
    [
        *({"lr": -0.1}, {"lr": float("nan")}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1e-4}),
        *({"label_smoothing": 1.1}, {"label_smoothing": -0.1}, {"warmup": 1.5}, {"warmup": -0.1}, {"lr": "fast"}),
        {"std": (0.5, 0.0, 0.5)},
        {"nesterov": True, "momentum": 0.0},
    ],
)
def test_a_hyperparameter_out_of_range_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(options))}[ =]"):
        LitClassifier(Net(), **options)


def test_settings_are_plain_numbers_whose_checkpoint_anyone_can_load(tmp_path: Path) -> None:
    given = {"lr": NonNegativeFloat(0.1), "momentum": HalfOpenUnitInterval(0.8), "sides": [Side(16)]}  # the parser's
    module = LitClassifier(Net(), **given)
    assert [type(value) for value in (module.lr, module.momentum, *module.sides)] == [float, float, int]
    module._trainer = stub_trainer()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimiser.pt")
    assert torch.load(tmp_path / "optimiser.pt", weights_only=True)["param_groups"][0]["lr"] == 0.1


@pytest.mark.parametrize("setting", [{"lr": -1}, {"momentum": 1}, {"weight_decay": float("nan")}])
def test_a_groups_setting_out_of_range_is_named(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"^groups: filters's {next(iter(setting))} .* is out of range"):
        LitClassifier(Net(), groups=[Group("filters", "", **setting)])  # type: ignore[arg-type]


def saved(module: LitClassifier) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_checkpoint_fits_the_net_and_classes_it_was_made_with_before_and_after_they_are_known() -> None:
    module = LitClassifier(Net(), mean=(0.1, 0.2, 0.3))
    module.set_classes(CLASSES)
    module.check_fits(saved(module))
    LitClassifier(Net()).check_fits(saved(module))
    assert torch.equal(saved(module)["state_dict"]["mean"].flatten(), torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("net.fc3.bias"), r"net\.fc3\.bias is missing in the file and \(10,\) in the net"),
        (lambda weights: weights.update({"net.fc4.bias": torch.zeros(5)}), r"net\.fc4\.bias is \(5,\) in the file"),
        (lambda weights: weights.update({"net.fc3.bias": torch.zeros(7)}), r"net\.fc3\.bias is \(7,\) in the file"),
    ],
)
def test_a_checkpoint_of_another_net_names_the_parameter(change: Any, message: str) -> None:
    checkpoint = saved(LitClassifier(Net()))
    change(checkpoint["state_dict"])
    with pytest.raises(UserError, match=rf"does not fit Net: {message}"):
        LitClassifier(Net()).on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_other_classes_names_both_lists() -> None:
    theirs, ours = LitClassifier(Net()), LitClassifier(Net())
    theirs.set_classes(CLASSES)
    ours.set_classes(CLASSES[::-1])
    with pytest.raises(UserError, match=r"\(a, b, .*, j\).*\(j, i, .*, a\)"):
        ours.on_load_checkpoint(saved(theirs))


# ---- the optimiser and its steps ----


class Data(LightningDataModule):
    """23 images in batches of 4: six batches an epoch, the last of three images."""

    classes = CLASSES
    train = test = make_split()

    def train_batches(self) -> TrainBatches:
        return TrainBatches(23, 4)

    def train_dataloader(self) -> DeviceLoader:
        return DeviceLoader(self.train, self.train_batches(), CPU)

    def test_dataloader(self) -> DeviceLoader:
        return DeviceLoader(self.test, EvalBatches(23, 10), CPU)


@pytest.mark.parametrize(
    ("options", "num_steps"),
    [
        ({"max_epochs": 2}, 12),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 2, "limit_train_batches": 100}, 12),
        ({"max_epochs": 2, "limit_train_batches": 0.6}, 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 4),
        ({"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_epochs": 1, "max_steps": 70}, 6),
        ({"max_epochs": -1, "max_steps": 8}, 8),
    ],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_the_schedule_is_as_long_as_the_training(options: dict[str, Any], num_steps: int) -> None:
    module = LitClassifier(linear(10), lr=0.01, schedule="onecycle", warmup=0.3)
    trainer = Trainer(
        **options,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Data())
    assert trainer.global_step == num_steps
    assert module._num_steps() == num_steps
    # LambdaLR's rate after the last step is that of a step more, which stays at the last one's
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.01 / 25e4)


def stub_trainer(**options: Any) -> Any:
    defaults = {"limit_train_batches": 1.0, "max_epochs": 2, "accumulate_grad_batches": 1, "max_steps": -1}
    return SimpleNamespace(**{"datamodule": Data(), "precision": "32-true", **defaults, **options})


def test_a_constant_rate_needs_no_scheduler_and_no_length() -> None:
    module = LitClassifier(Net(), lr=0.01, momentum=0.8, weight_decay=0.1, nesterov=True)
    module._trainer = stub_trainer()
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in ("lr", "momentum", "weight_decay", "nesterov", "name")} == {
        **{"lr": 0.01, "momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
        "name": "net",
    }
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in module.parameters()]


@pytest.mark.parametrize(("schedule", "warmup"), [("constant", 0.25), ("cosine", 0.0), ("onecycle", 0.3)])
def test_the_optimisers_rates_follow_the_schedule_step_by_step(schedule: Any, warmup: float) -> None:
    module = LitClassifier(Net(), lr=0.5, schedule=schedule, warmup=warmup)
    module._trainer = stub_trainer()
    configured: Any = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    for step in range(12):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * lr_factor(step, 12, schedule, warmup))
        optimizer.step()
        scheduler.step()


def test_a_schedule_without_an_end_says_how_to_set_one() -> None:
    module = LitClassifier(Net(), schedule="cosine")
    module._trainer = stub_trainer(max_epochs=-1)
    with pytest.raises(UserError, match=r"schedule='cosine' needs an end: set max_epochs"):
        module.configure_optimizers()


# ---- test-time augmentation, sides, parameter groups ----


def test_views_are_torchvisions_flip_and_reflected_shifts_and_weigh_one() -> None:
    images = make_split(3).images
    padded = v2.functional.pad(images, [1], padding_mode="reflect")
    shifted = [padded[:, :, :32, :32], padded[:, :, 2:, 2:]]
    flipped = [v2.functional.horizontal_flip(view) for view in (images, *shifted)]
    expected = [images, flipped[0], shifted[0], flipped[1], shifted[1], flipped[2]]
    given = views(images, "mirror_shift")
    for (view, _), other in zip(given, expected, strict=True):
        assert view.equal(other)
    assert [weight for _, weight in given] == [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    assert [weight for _, weight in views(images, "mirror")] == [0.5, 0.5]
    [(view, weight)] = views(images, "none")
    assert view is images
    assert weight == 1


def test_the_test_with_augmentation_reports_what_it_is_without_too() -> None:
    data = Data()
    reports = {}
    for tta in ("none", "mirror_shift"):
        module = LitClassifier(linear(10), tta=tta)  # type: ignore[arg-type]
        trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        trainer.test(module, datamodule=data, verbose=False)
        reports[tta] = module.reports
    assert set(reports["none"]) == {"test"}
    assert reports["mirror_shift"]["plain"].confusion.equal(reports["none"]["test"].confusion)
    with torch.no_grad():
        logits = sum(weight * module(view) for view, weight in views(data.test.images, "mirror_shift"))
    expected = confusion_matrix(data.test.labels, logits.argmax(1), labels=range(10))  # type: ignore[union-attr]
    assert np.array_equal(reports["mirror_shift"]["test"].confusion.numpy(), expected)


def test_a_side_shrinks_images_as_torchvision_does() -> None:
    module = LitClassifier(nn.Identity())
    images = make_split(4).images
    expected = v2.functional.resize(module(images), [20, 20], antialias=True)
    torch.testing.assert_close(module(images, side=20), expected)
    assert module(images, side=32).equal(module(images))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_sides_share_the_training_in_equal_parts_and_the_test_sees_all_pixels() -> None:
    seen: list[int] = []

    class Watched(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.shape[2])
            return super().forward(images.mean((2, 3)))

    module = LitClassifier(Watched(3, 10), sides=[16, 24, 32])
    trainer = Trainer(
        max_steps=9, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu", use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    trainer.test(module, datamodule=Data(), verbose=False)
    assert seen[1:10] == [16, 16, 16, 24, 24, 24, 32, 32, 32]  # the first call counted the logits
    assert set(seen[10:]) == {32}


def test_a_net_that_asks_for_it_is_initialised_from_training_images_before_training() -> None:
    module = LitClassifier(Asking(3, 10))
    module.trainer = SimpleNamespace(datamodule=Data(), world_size=1)  # type: ignore[assignment]
    module.setup("test")
    assert module.net.images is None
    module.setup("fit")
    torch.testing.assert_close(module.net.images, make_split().images / 127.5 - 1)


@pytest.mark.parametrize("sides", [[], [4], [40]])
def test_sides_out_of_range_are_refused(sides: list[int]) -> None:
    with pytest.raises(UserError, match="sides"):
        LitClassifier(nn.Identity(), sides=sides)
