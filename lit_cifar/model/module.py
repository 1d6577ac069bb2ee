"""LitClassifier: forward, the steps and the metrics of a training run. Its optimiser is in optimised.py, what its
checkpoints say in saved.py, the net without the Trainer in classifier.py; layers are in nets/, pictures in results/.

B images in a batch, K classes. Images are (B, 3, 32, 32), uint8 0..255 or floats, until LitClassifier.forward.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import MLFlowLogger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_cifar import clock
from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.errors import UserError, calls_chosen
from lit_cifar.model import kernels
from lit_cifar.model.batch import Intake, images_of
from lit_cifar.model.check import count_logits, shape_lazy_layers
from lit_cifar.model.chosen import MakeOptimizer, MakeScheduler
from lit_cifar.model.classifier import TTA, normalise, views
from lit_cifar.model.data import data_of, some_batches
from lit_cifar.model.named import way_to_classes
from lit_cifar.model.optim import Group, Schedule
from lit_cifar.model.optimised import Interval
from lit_cifar.model.saved import SavedModule, made_again
from lit_cifar.results.metrics import Tally
from lit_cifar.results.report import Report
from lit_cifar.settings import (
    ClosedUnitInterval,
    HalfOpenUnitInterval,
    NonNegativeFloat,
    PositiveFloat,
    Side,
    checked_arguments,
)

Batch = tuple[Tensor, Tensor]
STAGES = ("val", "test", "plain")  # 'plain' is the test without its augmentation
STEPS = {stage: f"{stage}_step" for stage in ("test", "predict")}
STEPS |= {"train": "training_step", "validate": "validation_step", "sanity_check": "validation_step"}
NUM_FIRST_IMAGES = 5000  # training images that a net which asks for it is initialised from


class LitClassifier(SavedModule):
    """Any net that maps images to logits, with cross-entropy, SGD or another optimiser, and exact metrics.

    Args:
        net: maps normalised images (B, 3, 32, 32) to logits (B, K).
        lr: base learning rate, 0 or more. None: 0.001, or the default of the `optimizer` that is named.
        momentum: momentum of SGD and Muon, 0 to below 1. None: 0.9. With an `optimizer` of your own this and the next
            two are for those that have them, and None leaves them alone.
        weight_decay: L2 penalty of SGD, 0 or more. None: 0.
        nesterov: Nesterov's form of momentum. None: false.
        label_smoothing: share of the target spread evenly over all classes, 0 to 1 (arXiv 1512.00567).
        schedule: course of the learning rate over all steps: 'constant', 'linear' or 'cosine' to 0, or 'onecycle'.
        warmup: share of the steps in which the rate rises, 0 to 1.
        mean: subtracted from pixels scaled to [0, 1], per channel; travels in the checkpoint.
        std: then divides them, above 0; travels in the checkpoint.
        compile: compile the net, with what scales and shrinks its images, by torch.compile, for all shapes before the
            first step; names in the checkpoint stay the same.
        tf32: on CUDA GPUs, round the factors of float32 products to TF32's 10 bits, in convolutions and matrices alike.
            The commands' default is false: 32-true means float32. None: as torch is set.
        groups: parameter groups with settings of their own, and of kind 'sgd' or 'muon'; none: one for all parameters.
        sides: side of the images in equal parts of the training run, in pixels, 8 to 32: [24, 32] trains the first half
            on images of 24x24. None: always as they are. Tests always see them as they are.
        tta: test-time augmentation, whose views' logits are averaged: 'none', 'mirror', or 'mirror_shift' (6 views).
        optimizer: in the place of SGD: a class of torch.optim or of your own, by its path; in Python also a partial of
            one, or any callable that makes an optimiser of parameters or of groups of them.
        scheduler: in the place of `schedule`: a class of torch.optim.lr_scheduler or of your own, by its path; in
            Python also a partial, or any callable that makes a scheduler of an optimiser.
        scheduler_interval: whether the scheduler is called after each 'step' or 'epoch'. None: step for OneCycleLR and
            CyclicLR, epoch for others.
        scheduler_monitor: the logged value that ReduceLROnPlateau follows. None: val/loss.

    Raises:
        UserError: a setting is out of its range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        lr: NonNegativeFloat | None = None,
        momentum: HalfOpenUnitInterval | None = None,
        weight_decay: NonNegativeFloat | None = None,
        nesterov: bool | None = None,
        label_smoothing: ClosedUnitInterval = 0.0,
        schedule: Schedule = "constant",
        warmup: ClosedUnitInterval = 0.0,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5),
        compile: bool = False,
        tf32: bool | None = None,
        groups: list[Group] | None = None,
        sides: list[Side] | None = None,
        tta: TTA = "none",
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        scheduler_interval: Interval | None = None,
        scheduler_monitor: str | None = None,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        given |= {"optimizer": made_again(optimizer), "scheduler": made_again(scheduler)}
        given = checked_arguments(LitClassifier.__init__, given, "--model.")
        # not as arrays: save_hyperparameters compares what it finds in this frame
        mean, std, sides = given["mean"], given["std"], given["sides"]
        if sides == []:
            raise UserError("--model.sides [] names no side; leave it out to train on images as they are")
        super().__init__()
        shape_lazy_layers(net)
        self.net = net
        self.take_settings(given)
        self.label_smoothing: float = given["label_smoothing"]
        self.sides: list[int] = sides or []
        self.tta: TTA = tta
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        # constants; DDP would broadcast them before each forward (7 % of a step: the tutorial's net, 2 processes)
        self._ddp_params_and_buffers_to_ignore = ["mean", "std"]
        self.compile_net = compile
        self.tf32 = tf32
        self._is_compiled = False  # not before it is warmed up
        self.classes: tuple[str, ...] = ()
        self.tallies = nn.ModuleDict()  # a Tally for each stage, made when the classes are known
        self.running_loss: float | None = None  # mean over the newest steps, for whoever shows it
        self.images_per_second = 0.0  # over the same steps, all ranks together
        self.reports: dict[str, Report] = {}  # newest of each stage
        self.example_input_array = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)  # for Lightning's summary
        self.describe(given, is_whole=type(self).__init__ is LitClassifier.__init__)
        self._intake = Intake()
        self._logs_loss = False  # where no callback does
        self._loss: Tensor | None = None  # of the newest step
        self._returned: list[dict[str, Any]] = []  # what the Trainer will return of this evaluation

    @calls_chosen("on images")
    def forward(self, images: Tensor, side: int | None = None) -> Tensor:
        """Maps images (B, 3, 32, 32) uint8 0..255 to logits (B, K): scales, normalises, applies the net.

        Float images may be scaled to [0, 1] as by ToTensor, or normalised by this module's mean and std. With a `side`
        the net sees them shrunk to side x side pixels.

        Raises:
            UserError: float images are normalised with other numbers.
        """
        if images.dtype != torch.uint8:
            images = self.as_pixels(images)
        to_logits = kernels.compiled(kernels.BACKEND) if self._is_compiled else kernels.to_logits
        return to_logits(self.net, images, self.mean, self.std, side)

    def as_pixels(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) on the scale 0..255: float ones as new floats, integers as they are."""
        return self._intake.pixels(images, _stage(self._trainer), self.mean, self.std)

    def _apply_batch_transfer_handler(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Brings batches to the steps, where these are this class's own; after all hooks of a subclass or data module.

        The lean loop, whose batches fit, does not call it.
        """
        moved, stage = super()._apply_batch_transfer_handler(batch, *args, **kwargs), _stage(self._trainer)
        step = STEPS.get(stage, "")
        is_own = getattr(type(self), step, None) is getattr(LitClassifier, step, self)
        takes = is_own and batch is not self.example_input_array  # of Lightning's summary
        return self._intake.batch(moved, stage, len(self.classes)) if takes else moved

    @calls_chosen("when it was set up")
    def setup(self, stage: str) -> None:
        """Takes the classes from the data and makes a tally for each stage.

        Raises:
            UserError: there are no data, or the net gives another number of logits than there are classes.
        """
        self._intake = Intake()
        self.set_classes(data_of(self.trainer).classes)
        self.share_loggers()
        if stage == "fit" and "trainer" not in self.config:
            self.describe_net()  # before a strategy takes it into parts
        if stage == "test":  # Lightning calls no hook more where --trainer.limit_test_batches is 0
            self.reports["test"] = Report.of_nothing(self.classes)
        init_from_images = getattr(self.net, "init_from_images", None)
        if stage == "fit" and callable(init_from_images):  # a resumed run's checkpoint is loaded after it
            images = torch.cat([images_of(batch) for batch in some_batches(self.trainer, NUM_FIRST_IMAGES)])
            with clock.timed("whitening", self.mean.device):
                init_from_images(normalise(self.as_pixels(images.to(self.mean.device)), self.mean, self.std))
            self._intake = Intake()
        if stage == "fit" and self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda":
            self.synchronise_norms()  # not available on the CPU
        if self.tf32 is not None and self.trainer.strategy.root_device.type == "cuda":
            kernels.set_tf32(self.tf32)

    def on_fit_start(self) -> None:
        self._loss = None
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._logs_loss = not (self.trainer.barebones or any(getattr(each, "logs_loss", False) for each in callbacks))
        self._warm_up("train", "val")  # after the callbacks: TensorBoard's graph is traced, searches are done

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._warm_up("val")

    def on_test_start(self) -> None:
        self._warm_up("test")

    @calls_chosen("on images")
    def _warm_up(self, *stages: str) -> None:
        """Compiles for all batches of the stages, so that no step waits for it."""
        if not self.compile_net:
            return
        with clock.timed("compile", self.device):
            self._is_compiled = True
            kernels.warm_up(self, stages)

    def synchronise_norms(self) -> None:
        """Makes BatchNorm's statistics those of the whole batch, as on one device.

        They are equal on all ranks then, so that DDP need not broadcast them before each forward pass. Norms of a class
        that computes in its own way stay as they are.
        """
        for parent in list(self.modules()):
            for name, norm in parent.named_children():
                if isinstance(norm, _BatchNorm) and type(norm).forward is _BatchNorm.forward:
                    setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(norm))
        for path, norm in self.named_modules():
            if isinstance(norm, nn.SyncBatchNorm) and norm.process_group is None:
                self._ddp_params_and_buffers_to_ignore += [f"{path}.{name}" for name, _ in norm.named_buffers()]

    def set_classes(self, classes: tuple[str, ...]) -> None:
        """Names the K classes; called again with the same ones it changes nothing.

        Without any, they stay as they are if there are K, or become '0' to 'K - 1'.

        Raises:
            UserError: the net gives another number of logits.
        """
        if classes and classes == self.classes:
            return
        num_logits = count_logits(self)
        if not classes:
            classes = self.classes if len(self.classes) == num_logits else tuple(map(str, range(num_logits)))
        if num_logits != len(classes):
            raise UserError(
                f"{type(self.net).__name__} gives {num_logits} logits but the data has {len(classes)} classes: "
                + way_to_classes(self.net, self.config.get("model", {}).get("net", {}), len(classes))
            )
        self.classes = classes
        self.tallies = nn.ModuleDict({stage: Tally(len(classes)) for stage in STAGES}).to(self.mean.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of this rank's share, scaled so that the ranks' mean is the mean over the whole batch."""
        images, labels = batch
        side = self.side()
        logits = self(images) if side is None else self(images, side)  # a subclass's forward may know no sides
        if self.trainer.world_size == 1:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        else:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")
            loss = loss / self._mean_share(labels, batch_idx)
        if self._logs_loss:
            self._loss = loss.detach()
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        """Logs the loss, unless a subclass did in its training step. The lean loop calls no hook of the module."""
        if self._loss is not None and "training_step.train/loss" not in (self.trainer._results or {}):
            self.log("train/loss", self._loss, sync_dist=True)

    def side(self) -> int | None:
        """Side in pixels that this step's images are shrunk to; None: none."""
        if not self.sides:
            return None
        return self.sides[min(len(self.sides) * self.trainer.global_step // self.plan_steps(), len(self.sides) - 1)]

    def _mean_share(self, labels: Tensor, batch_idx: int) -> float:
        # DDP averages gradients over ranks, whose shares of a short last batch differ by one
        num_ranks, loader = self.trainer.world_size, self.trainer.train_dataloader
        if not isinstance(loader, DeviceLoader):
            return len(labels)
        assert isinstance(loader.batches, TrainBatches)
        return loader.batches.num_in_batch(batch_idx) / num_ranks

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_start(self) -> None:
        self._tally("val").reset()  # an evaluation that an error ended left its counts

    def on_test_epoch_start(self) -> None:
        for stage in ("test", "plain"):
            self._tally(stage).reset()

    def on_validation_epoch_end(self) -> None:
        self._report("val")
        if self.trainer.state.fn == "fit" and self.trainer.is_last_batch:
            self.follow("val/")  # before states are saved

    def on_test_epoch_end(self) -> None:
        self._report("test")
        if self.tta != "none":
            self._report("plain")

    def on_validation_end(self) -> None:
        self._return("val")

    def on_test_end(self) -> None:
        self._return("test", "plain")

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """What the net says of images, with test-time augmentation if it has any: `logits` (B, K), `probabilities`
        (B, K), `predictions` (B,) int64, and the names of the predicted `classes`, a list of B."""
        logits = self._logits_of_views(batch)[0]
        predictions = logits.argmax(1)
        classes = [self.classes[index] for index in predictions.tolist()]
        probabilities = logits.float().softmax(1)
        return {"logits": logits, "probabilities": probabilities, "predictions": predictions, "classes": classes}

    def _logits_of_views(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K), averaged over the views of test-time augmentation, and those of the images themselves."""
        logits_of_views = [(self(view), weight) for view, weight in views(images, self.tta)]
        return sum(logits * weight for logits, weight in logits_of_views), logits_of_views[0][0]

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        logits, plain_logits = self._logits_of_views(images)
        if images.dtype != torch.uint8:
            images = self.as_pixels(images).round().clamp(0, 255).to(torch.uint8)  # for pictures of mistakes
        if stage == "test" and self.tta != "none":
            self._tally("plain").update(plain_logits, images, labels)
        self._tally(stage).update(logits, images, labels)

    def _tally(self, stage: str) -> Tally:
        tally = self.tallies[stage]
        assert isinstance(tally, Tally)
        return tally

    @calls_chosen("when figures were logged")
    def _report(self, stage: str) -> None:
        confusion, loss, calibration, mistakes = self._tally(stage).take()
        if self.trainer.sanity_checking:
            return
        self.reports[stage] = Report(confusion, loss, self.classes, calibration, mistakes)
        scalars = self._scalars(stage)
        # Lightning would move each number to the device, and back for whoever reads it; only ranks exchange them there
        values = torch.tensor(list(scalars.values())).to(self.device if self.trainer.world_size > 1 else "cpu")
        # every rank has the same values: max is exact where Lightning's mean over ranks would round
        self.log_dict(dict(zip(scalars, values.unbind(), strict=True)), logger=False, sync_dist=True, reduce_fx="max")
        for logger in self.loggers:
            logger.log_metrics(named_for(logger, scalars), step=self.trainer.global_step)
        self._returned = getattr(getattr(self.trainer, "_evaluation_loop", None), "_logged_outputs", [])

    def _return(self, *stages: str) -> None:
        """Lets trainer.validate and trainer.test return, and print, the values that loggers got.

        By log_dict they would reach the loggers a second time, with Lightning's own step and a tag `epoch`.
        """
        for outputs in self._returned:
            for stage in stages:
                outputs.update(self._scalars(stage) if stage in self.reports else {})
        self._returned = []

    def _scalars(self, stage: str) -> dict[str, float]:
        prefix = "test_without_tta" if stage == "plain" else stage
        return {f"{prefix}/{name}": value for name, value in self.reports[stage].scalars().items()}


def named_for(logger: Any, scalars: dict[str, float]) -> dict[str, float]:
    """Values by the names that a logger takes: MLflow's folders cannot have both a file and a folder val/accuracy."""
    if isinstance(logger, MLFlowLogger):
        return {re.sub("(?<=/)(.*?)/", r"\1.", name): value for name, value in scalars.items()}
    return scalars


def _stage(trainer: Any) -> str:
    """'train', 'validate', 'test', ... where the Trainer is; '' outside of one."""
    stage = getattr(getattr(trainer, "state", None), "stage", None)
    return str(stage.value) if stage else ""
