"""Fills TensorBoard's pages. results/pictures.py draws; model/module.py and progress.py log the scalars."""

import re
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from lit_cifar import clock
from lit_cifar.model.check import unchanged
from lit_cifar.model.classifier import Classifier
from lit_cifar.model.data import data_of
from lit_cifar.model.kernels import shrunk
from lit_cifar.model.module import LitClassifier
from lit_cifar.results import pictures
from lit_cifar.results.report import MOST_LISTED, commit, versions
from lit_cifar.text import printable
from lit_cifar.training.lines import write

NUM_TRAINING_IMAGES = 32  # in the picture of what the net is given
CLASSES_PER_CHART = 10  # more lines cannot be told apart


class Dashboard(Callback):
    """Fills TensorBoard's pages, so that they tell a run's story without being configured.

    Text and graph come at the start, pictures after each validation and after the test, then the hyperparameters with
    the test's metrics and the table of classes. A Trainer without a TensorBoard logger gets nothing.

    Args:
        command: the command line that started the run.
    """

    def __init__(self, command: str = "") -> None:
        self.command = command
        self._images: list[tuple[Tensor, Tensor]] = []  # of this epoch's first batches, on the device
        self._num_images = 0
        self._side: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensorboard = _tensorboard(trainer)
        if tensorboard is None or trainer.ckpt_path:
            return  # a resumed run has them
        assert isinstance(pl_module, LitClassifier)
        writer = tensorboard.experiment
        config = yaml.safe_dump(pl_module.config, sort_keys=False)
        writer.add_text("config", _verbatim(config))
        writer.add_text("run", self._origin())
        stages = ["val", "test"] if data_of(trainer).num_val else ["test"]
        writer.add_custom_scalars(charts(stages, pl_module.classes))
        black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=pl_module.device)
        try:
            with clock.timed("graph"), unchanged(pl_module.net, pl_module.device), torch.no_grad():
                pl_module.net.eval()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the tracer, about branches it cannot see
                    # torch's tracer would walk from LitClassifier into the Trainer
                    writer.add_graph(Classifier(pl_module.net, pl_module.mean, pl_module.std), black)
        except Exception as error:  # a net that cannot be traced trains all the same
            write(trainer, f"TensorBoard has no graph of this net: {str(error).splitlines()[0]}")

    def _origin(self) -> str:
        rows = {"command": _code(self.command), "commit": commit() or "unknown", **versions()}
        return "\n".join(["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._num_images = [], 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._num_images < NUM_TRAINING_IMAGES:
            assert isinstance(pl_module, LitClassifier)
            images, labels = batch
            missing = NUM_TRAINING_IMAGES - self._num_images
            self._images.append((pl_module.as_pixels(images[:missing]).clone(), labels[:missing].clone()))
            self._num_images += len(images)
            self._side = pl_module.side()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensorboard = _tensorboard(trainer)
        if tensorboard is None:
            return
        assert isinstance(pl_module, LitClassifier)
        self._draw(trainer, pl_module, "test")
        writer = tensorboard.experiment
        report = pl_module.reports["test"]
        writer.add_text("test/classes", _verbatim("\n".join([report.table(), *report.warnings()])), trainer.global_step)
        # TensorBoard finds the values under these tags, where the test logged them; logger.log_hyperparams would log
        # them once more
        tags = dict.fromkeys(("test/accuracy", "test/loss", "test/calibration_error"), 0.0)
        for summary in hparams(hyperparameters(pl_module.config), tags):
            writer._get_file_writer().add_summary(summary)
        tensorboard.save()

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        tensorboard = _tensorboard(trainer)
        if tensorboard is None:
            return
        assert isinstance(pl_module, LitClassifier)
        report = pl_module.reports[stage]
        drawn = {
            f"{stage}/confusion": pictures.confusion_matrix(report),
            f"{stage}/mistakes": pictures.mistakes(report.mistakes, report.classes),
            f"{stage}/reliability": pictures.reliability(report.calibration),
        }
        if self._images:
            images, labels = (torch.cat(parts) for parts in zip(*self._images, strict=True))
            seen = shrunk(images.float(), self._side).round().to(torch.uint8)
            drawn["train/images"] = pictures.training_images(seen.cpu(), labels.cpu(), report.classes)
            self._images = []
        first = next((layer for layer in pl_module.net.modules() if isinstance(layer, torch.nn.Conv2d)), None)
        if first is not None and first.weight.shape[1] == 3:
            drawn["net/filters"] = pictures.filters(first.weight)
        for tag, picture in drawn.items():
            tensorboard.experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")


def _tensorboard(trainer: Trainer) -> TensorBoardLogger | None:
    """The first TensorBoard logger of a Trainer, wherever it stands among its loggers; None on other ranks than 0."""
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def _verbatim(lines: str) -> str:
    """Lines as a block of Markdown that shows them as they are; a fenced one would end at ``` in a class's name."""
    return textwrap.indent(lines, "    ")


def _code(text: str) -> str:
    """A line as code in a cell of a Markdown table, whatever it contains."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{' ' * ('`' in text)}{printable(text)}{' ' * ('`' in text)}{fence}"


def charts(stages: Sequence[str], classes: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's Custom Scalars page; one pattern of one chart matches each tag.

    Patterns name no more of a run than they must: TensorBoard joins equal charts of several runs, and no others. More
    than MOST_LISTED classes have no curves.
    """
    accuracy = {}
    classes = [printable(name) for name in classes]
    for stage in stages if len(classes) <= MOST_LISTED else ():
        if len(classes) <= CLASSES_PER_CHART:
            accuracy[f"{stage}: accuracy of each class"] = ["Multiline", [f"^{stage}/accuracy/.+$"]]
            continue
        for first in range(0, len(classes), CLASSES_PER_CHART):
            of_chart = classes[first : first + CLASSES_PER_CHART]
            title = f"{stage}: accuracy of each class, {of_chart[0]} to {of_chart[-1]}"
            accuracy[title] = ["Multiline", [f"^{stage}/accuracy/{re.escape(name)}$" for name in of_chart]]
    return {
        **({"accuracy": accuracy} if accuracy else {}),
        "loss": {"training and validation loss": ["Multiline", ["^train/loss$", "^val/loss$"]]},
        "learning rates": {"learning rate of each parameter group": ["Multiline", ["^lr/.+$"]]},
    }


def hyperparameters(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings that decide a run's result, by short name, for TensorBoard's HParams page."""
    model, data, trainer = (config.get(section, {}) for section in ("model", "data", "trainer"))
    chosen = {
        "net": model.get("net", {}).get("class_path", "").rsplit(".", 1)[-1],
        **{key: value for key, value in model.items() if key not in ("net", "mean", "std", "compile")},
        **{key: data.get(key) for key in ("dataset", "batch_size", "num_val")},
        "augment": _summary(data.get("augment", {})),
        **{key: trainer.get(key) for key in ("max_epochs", "devices", "precision")},
        "seed": config.get("seed_everything"),
    }
    return {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in chosen.items()}


def _summary(augment: dict[str, Any]) -> str:
    """The augmentation in a few words: one column of the page instead of six."""
    chosen = {key: value for key, value in augment.items() if value not in (0, "none")}
    if "crop" not in chosen:
        chosen.pop("pad", None)
    return ", ".join(f"{key} {value}" for key, value in chosen.items()) or "none"
