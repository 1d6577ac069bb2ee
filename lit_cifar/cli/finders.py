"""Lightning's searches before a training run, LearningRateFinder and BatchSizeFinder: what they need, and how what they
find becomes the run's settings. `sweep` searches with whole runs."""

import functools
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import lr_finder
from lightning.pytorch.utilities.seed import isolate_rng
from tqdm import tqdm

from lit_cifar import log
from lit_cifar.cli import machine
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.errors import UserError
from lit_cifar.files import write_durably, writing
from lit_cifar.model import steps
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.folder import Run

FINDERS = (LearningRateFinder, BatchSizeFinder)


def keep_found(settings: Namespace, before: dict[str, Any]) -> None:
    """Leaves the finders out of a run that is resumed: it keeps what they found, whatever the settings say now.

    Args:
        settings: of the command; they are changed.
        before: the config of the checkpoint.
    """
    callbacks = settings["trainer"]["callbacks"]
    for callback in [callback for callback in as_list(callbacks) if _is_finder(callback)]:
        name, arguments = callback["class_path"].rsplit(".", 1)[-1], callback.get("init_args") or {}
        if name == BatchSizeFinder.__name__:
            section, key = "data", arguments.get("batch_arg_name") or "batch_size"
        else:
            section, key = "model", arguments.get("attr_name") or "lr"
        found = before.get(section, {}).get(key)
        if isinstance(found, (int, float)) and isinstance(settings[section].get(key), (int, float)):
            settings[section][key] = found
            log.tell(f"{name} searches where a run begins: this one goes on with --{section}.{key} {found}")
    settings["trainer"]["callbacks"] = without_finders(callbacks)


def without_finders(callbacks: Any) -> Any:
    """The setting trainer.callbacks without its finders; as it is where it has none."""
    others = [callback for callback in as_list(callbacks) if not _is_finder(callback)]
    return callbacks if len(others) == len(as_list(callbacks)) else others or None


def _is_finder(callback: Any) -> bool:
    path = str(callback["class_path"])
    return path.startswith("lightning.") and path.rsplit(".", 1)[-1] in [finder.__name__ for finder in FINDERS]


def as_list(value: Any) -> list[Any]:
    """What the Trainer takes one or several of, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def check_finders(trainer: Trainer, model: LitClassifier, data: CIFAR10DataModule) -> None:
    """Checks that a Trainer's finders can search, and keeps batches within the training images.

    Args:
        data: set up for 'fit'.

    Raises:
        UserError: a finder cannot search, or what it would find would change nothing.
    """
    # its bar, on a terminal only: \r makes no lines in a file
    lr_finder.tqdm = functools.partial(tqdm, disable=None if log.is_said("info") else True)  # type: ignore[attr-defined,assignment]
    for finder in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(finder, LearningRateFinder):
            if finder._attr_name and not hasattr(model, finder._attr_name):
                raise UserError(f"LearningRateFinder: the model has no {finder._attr_name}; leave attr_name out")
            if model.groups and all(group.lr is not None for group in model.groups) and not finder._attr_name:
                raise UserError(
                    "LearningRateFinder finds --model.lr, and each group of --model.groups has an lr of its own: leave "
                    "it out in one, or leave out the finder"
                )
            if model.sets_rates_itself and not finder._attr_name:
                raise UserError(
                    "LearningRateFinder finds --model.lr, and --model.scheduler has its max_lr: leave one out"
                )
            _warn_of_few_steps(trainer, finder, len(data.train_batches()))
        if isinstance(finder, BatchSizeFinder):
            # the run's draws begin after a search where they would without, as LearningRateFinder sees to by itself
            finder.scale_batch_size = isolate_rng()(finder.scale_batch_size)  # type: ignore[method-assign]
            if not isinstance(trainer.strategy, SingleDeviceStrategy):
                raise UserError(
                    "BatchSizeFinder searches on one device only: search with --devices 1, then train with the "
                    "--batch_size that it found"
                )
            if not hasattr(data, finder._batch_arg_name):
                raise UserError(f"BatchSizeFinder: the data have no {finder._batch_arg_name}; leave batch_arg_name out")
            num_images = len(data.train.labels)
            if finder._init_val > num_images:
                raise UserError(f"BatchSizeFinder: init_val {finder._init_val} is more than {num_images} images")
            finder._max_val = min(finder._max_val, num_images)
            if finder._mode == "power":  # it doubles beyond max_val before it looks
                num_doublings = (num_images // finder._init_val).bit_length() - 1
                finder._max_trials = min(finder._max_trials, num_doublings + 1)


def _warn_of_few_steps(trainer: Trainer, finder: LearningRateFinder, num_batches: int) -> None:
    num_steps = steps.steps_at_end(trainer, steps.limited(num_batches, trainer.limit_train_batches))
    if num_steps is not None and num_steps < finder._num_training_steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        log.warn(
            f"LearningRateFinder raises the rate over {finder._num_training_steps} steps, and the training run has "
            f"{num_steps}: large rates are not tried; give it num_training_steps {num_steps}"
        )


class Found(Callback):
    """Ends the searches once they are done, before the first step: what is trained with is what the run says of itself.

    Args:
        run: whose config.yaml is written anew; None where there is none.
    """

    def __init__(self, run: Run | None) -> None:
        self.run = run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitClassifier)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if type(callback) not in FINDERS]
        searched = len(others) < len(callbacks)
        if searched:
            trainer.callbacks = others  # type: ignore[attr-defined]  # or they would search again before the test
            trainer.ckpt_path = None  # a file that is gone, from which Lightning restored the state
            pl_module.reports.clear()
        if not pl_module.note_settings() and not searched:
            return
        config = pl_module.config
        config["trainer"]["callbacks"] = without_finders(config["trainer"]["callbacks"])
        num_parameters = sum(parameter.numel() for parameter in pl_module.net.parameters())
        machine.suit_cpu(config["data"]["batch_size"] * num_parameters)
        if self.run is not None and trainer.is_global_zero:
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            with writing(self.run.config, "make room or fix the folder"):
                write_durably(self.run.config, text.encode())
