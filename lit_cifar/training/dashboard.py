"""Fills TensorBoard's pages, and gives other loggers what they can take of them. results/pictures.py draws;
model/module.py and progress.py log the scalars."""

import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
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
from lit_cifar.run.chosen import attempt
from lit_cifar.text import printable
from lit_cifar.training.lines import write

NUM_TRAINING_IMAGES = 32  # in the picture of what the net is given
CLASSES_PER_CHART = 10  # more lines cannot be told apart


class Dashboard(Callback):
    """Fills TensorBoard's pages, so that they tell a run's story without being configured, for each TensorBoard logger
    wherever it stands.

    Text and graph come at the start, pictures after each validation and after the test, then the hyperparameters with
    the test's metrics and the table of classes. Other loggers get the hyperparameters at the start, and text and
    pictures if they can take them.

    Args:
        command: the command line that started the run.
    """

    def __init__(self, command: str = "") -> None:
        self.command = command
        self._images: list[tuple[Tensor, Tensor]] = []  # of this epoch's first batches, on the device
        self._num_images = 0
        self._side: int | None = None
        self._logs_settings: bool | None = None  # as --trainer.enable_autolog_hparams says

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._logs_settings is None:
            self._logs_settings = trainer.enable_autolog_hparams
        # or Lightning would log those of the module and the data module, under other names; it asks after this
        trainer.enable_autolog_hparams = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitClassifier)
        for logger in _loggers(trainer):
            if getattr(logger, "is_resumed", trainer.ckpt_path):
                continue  # it has them
            log_text(logger, "config", _verbatim(yaml.safe_dump(pl_module.config, sort_keys=False)))
            log_text(logger, "run", self._origin())
            if isinstance(logger, TensorBoardLogger):
                self._begin(trainer, pl_module, logger)
            elif self._logs_settings:
                logger.log_hyperparams(hyperparameters(pl_module.config))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()  # first: a run that goes on from this state does not log what led to it again

    def _begin(self, trainer: Trainer, pl_module: LitClassifier, tensorboard: TensorBoardLogger) -> None:
        writer = tensorboard.experiment
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
        assert isinstance(pl_module, LitClassifier)
        self._draw(trainer, pl_module, "test")
        report = pl_module.reports["test"]
        for logger in _loggers(trainer):
            table = _verbatim("\n".join([report.table(), *report.warnings()]))
            log_text(logger, "test/classes", table, trainer.global_step)
            if isinstance(logger, TensorBoardLogger) and self._logs_settings:
                # TensorBoard finds the values under these tags, where the test logged them; logger.log_hyperparams
                # would log them once more
                tags = dict.fromkeys(("test/accuracy", "test/loss", "test/calibration_error"), 0.0)
                for summary in hparams(hyperparameters(pl_module.config), tags):
                    logger.experiment._get_file_writer().add_summary(summary)
            logger.save()

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        shows = [show for logger in _loggers(trainer) if (show := _shows(logger))]
        if not shows:
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
        for show in shows:
            for tag, picture in drawn.items():
                show(tag, picture, trainer.global_step)


def _loggers(trainer: Trainer) -> list[Logger]:
    """The loggers of a Trainer; none on other ranks than 0."""
    return trainer.loggers if trainer.is_global_zero else []


# What a logger can take is asked of itself, so that no package has to be there: W&B's has methods for pictures and
# text, MLflow's leaves them to its client.


def _shows(logger: Any) -> Callable[[str, pictures.Picture, int], object] | None:
    """What shows a picture (H, W, 3) uint8 under a tag, at a step; None if the logger takes none."""
    if isinstance(logger, TensorBoardLogger):
        return lambda tag, picture, step: logger.experiment.add_image(tag, picture, step, dataformats="HWC")
    if callable(getattr(logger, "log_image", None)):
        return lambda tag, picture, step: logger.log_image(tag, [picture], step)
    if show := _of_client(logger, "log_image"):
        return lambda tag, picture, step: attempt(logger, show, logger.run_id, picture, key=tag, step=step)
    return None


def log_text(logger: Any, tag: str, markdown: str, step: int = 0) -> None:
    """Gives a logger a text in Markdown, if it takes text."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, markdown, step)
    elif callable(getattr(logger, "log_text", None)):
        logger.log_text(tag, columns=["text"], data=[[markdown]], step=step)
    elif log := _of_client(logger, "log_text"):
        attempt(logger, log, logger.run_id, markdown, f"{tag}.md")


def _of_client(logger: Any, name: str) -> Callable[..., object] | None:
    method = getattr(getattr(logger, "experiment", None), name, None)
    return method if callable(method) and hasattr(logger, "run_id") else None


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
    """The settings that decide a run's result, by short name, for all loggers."""
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
