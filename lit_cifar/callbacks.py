"""What a person sees while a net trains: running loss, each device's share, the progress bar. Training logic is not
here, and callbacks do not know one another."""

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from lit_cifar.errors import UserError
from lit_cifar.loader import DeviceLoader, TrainBatches
from lit_cifar.module import Classifier, LitClassifier


class RunningLoss(Callback):
    """Logs `train/loss` and `lr`, prints the running loss, and stops a training whose loss is no longer finite.

    Losses stay on the device until they are logged, so that nothing waits for the device between logging steps. Each
    mean is over all ranks and all steps since the one before.

    Args:
        every_n_steps: steps of an epoch between two printed lines; shorter epochs print one at their end.
    """

    def __init__(self, every_n_steps: int = 2000) -> None:
        if every_n_steps < 1:
            raise UserError(f"--running_loss.every_n_steps {every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._losses = torch.empty(0)  # (log_every_n_steps,) on the device: losses not yet summed
        self._num_losses = 0
        self._logged = [0.0, 0]  # sum and count since the last time, summed over ranks, in float64
        self._printed = [0.0, 0]
        self._logged_step = 0
        self.train_started = 0.0  # on time.perf_counter's clock
        self.first_step_seconds = 0.0  # with what comes with it once: warming up, compiling

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_every = int(trainer.log_every_n_steps) or self.every_n_steps  # type: ignore[attr-defined]
        self._losses = torch.empty(self._log_every, device=pl_module.device)
        self._logged_step = trainer.global_step
        run = Path(trainer.log_dir or ".")  # asked for on every rank: rank 0 broadcasts it
        if trainer.is_global_zero:
            num_parameters = sum(parameter.numel() for parameter in pl_module.parameters())
            write(trainer, f"training {num_parameters:,} parameters; run folder {run}")
        self.train_started, self.first_step_seconds = time.perf_counter(), 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.first_step_seconds:
            self.first_step_seconds = time.perf_counter() - self.train_started
        self._losses[self._num_losses] = outputs["loss"]
        self._num_losses += 1
        step_in_epoch, num_steps = batch_idx + 1, int(trainer.num_training_batches)
        prints = step_in_epoch % self.every_n_steps == 0 or (trainer.is_last_batch and num_steps < self.every_n_steps)
        step = trainer.global_step
        logs = step % self._log_every == 0 or (trainer.is_last_batch and num_steps < self._log_every)
        logs = logs and step != self._logged_step  # with accumulated gradients a step has several batches
        if prints or logs or self._num_losses == len(self._losses) or trainer.is_last_batch:
            self._collect(trainer, batch_idx)
        if logs:
            self._log(trainer)
        if prints:
            assert isinstance(pl_module, LitClassifier)
            running_loss = pl_module.running_loss = self._printed[0] / self._printed[1]
            self._printed = [0.0, 0]
            if trainer.is_global_zero:
                width = len(f"{num_steps:,}")
                write(
                    trainer,
                    f"epoch {trainer.current_epoch + 1}  step {step_in_epoch:>{width},} of {num_steps:,}  "
                    f"loss {running_loss:.3f}",
                )

    def _collect(self, trainer: Trainer, batch_idx: int) -> None:
        num_losses, self._num_losses = self._num_losses, 0
        if not num_losses:
            return
        losses = self._losses[:num_losses]
        precise = losses if losses.device.type == "mps" else losses.double()  # mps has no float64
        total = float(trainer.strategy.reduce(precise.sum(), reduce_op="sum")) / trainer.world_size
        total *= trainer.accumulate_grad_batches  # by which Lightning has divided the loss of each batch
        if not torch.isfinite(torch.tensor(total)):
            self._stop(trainer, losses, batch_idx)
        for window in (self._logged, self._printed):
            window[0] += total
            window[1] += num_losses

    def _stop(self, trainer: Trainer, losses: Tensor, batch_idx: int) -> None:
        finite = losses.isfinite()
        first = int(finite.long().argmin()) if not bool(finite.all()) else len(losses)
        steps_ago = trainer.strategy.reduce(
            torch.tensor(float(len(losses) - 1 - first), device=losses.device), reduce_op="max"
        )
        step = trainer.global_step - int(steps_ago)
        kept = Path(trainer.log_dir or ".") / "checkpoints" / "last.ckpt"
        way_out = f"go on from {kept} with --resume and a smaller --lr" if kept.is_file() else "choose a smaller --lr"
        raise UserError(
            f"the loss is not finite at step {step} (epoch {trainer.current_epoch + 1}, batch "
            f"{batch_idx + 1 - int(steps_ago)}): {way_out}"
        )

    def _log(self, trainer: Trainer) -> None:
        self._logged_step = trainer.global_step
        metrics = {"train/loss": self._logged[0] / self._logged[1]}
        for group in trainer.optimizers[0].param_groups:
            name = "lr" if len(trainer.optimizers[0].param_groups) == 1 else f"lr/{group['name']}"
            metrics[name] = group["lr"]
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._logged = [0.0, 0]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # called on every rank: what is on the devices is summed, so that a resumed run's means are those of the whole
        self._collect(trainer, trainer.fit_loop.epoch_loop.batch_idx)
        checkpoint["running_loss"] = {"logged": self._logged, "printed": self._printed}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("running_loss", {"logged": [0.0, 0], "printed": [0.0, 0]})
        self._logged, self._printed = list(state["logged"]), list(state["printed"])


class DeviceShapes(Callback):
    """Prints once, on each rank, its device and the shapes of its share, as the tutorial's DataParallel example did."""

    def __init__(self) -> None:
        self._told = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._told:
            return
        self._told = True
        rank, world_size = trainer.global_rank, trainer.world_size
        loader = trainer.train_dataloader
        whole = ""
        if isinstance(loader, DeviceLoader) and isinstance(loader.batches, TrainBatches):
            whole = f", global batch {loader.batches.num_in_batch(batch_idx)}"

        def tell(module: LightningModule, args: tuple[Tensor], logits: Tensor) -> None:
            handle.remove()
            write(
                trainer,
                f"rank {rank} of {world_size} on {logits.device}: input {tuple(args[0].shape)}, "
                f"output {tuple(logits.shape)}{whole}",
            )

        handle = pl_module.register_forward_hook(tell)


class Dashboard(Callback):
    """Gives TensorBoard the run's config, the net's graph, and its hyperparameters with the test's metrics."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero or trainer.ckpt_path:
            return  # a resumed run has them
        assert isinstance(pl_module, LitClassifier)
        config = yaml.safe_dump(pl_module.config, sort_keys=False)
        trainer.logger.experiment.add_text("config", f"```yaml\n{config}```")
        training = pl_module.net.training
        pl_module.net.eval()
        try:
            with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the tracer, about branches it cannot see
                # torch's tracer would walk from LitClassifier into the Trainer
                classifier = Classifier(pl_module.net, pl_module.mean, pl_module.std)
                trainer.logger.experiment.add_graph(classifier, pl_module.example_input_array)
        except Exception as error:  # a net that cannot be traced trains all the same
            write(trainer, f"TensorBoard has no graph of this net: {str(error).splitlines()[0]}")
        pl_module.net.train(training)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LitClassifier)
        # TensorBoard finds the values under these tags, where the test logged them; logger.log_hyperparams would log
        # them once more
        tags = dict.fromkeys(("test/accuracy", "test/loss"), 0.0)
        for summary in hparams(hyperparameters(pl_module.config), tags):
            trainer.logger.experiment._get_file_writer().add_summary(summary)
        trainer.logger.save()


def hyperparameters(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """Those settings of a run that decide its result, by short name, for TensorBoard's HParams page."""
    model, data, trainer = (config.get(section, {}) for section in ("model", "data", "trainer"))
    chosen = {
        "net": model.get("net", {}).get("class_path", "").rsplit(".", 1)[-1],
        **{key: value for key, value in model.items() if key not in ("net", "mean", "std", "compile")},
        **{key: data.get(key) for key in ("dataset", "batch_size", "num_val")},
        **data.get("augment", {}),
        **{key: trainer.get(key) for key in ("max_epochs", "devices", "precision")},
        "seed": config.get("seed_everything"),
    }
    return {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in chosen.items()}


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the running loss, which costs no synchronisation beyond that of the logged loss."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}")  # as lines count

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, LitClassifier)
        return {} if pl_module.running_loss is None else {"loss": f"{pl_module.running_loss:.3f}"}


def write(trainer: Trainer, line: str) -> None:
    """Writes a whole line to standard output at once, above the progress bar where there is one."""
    if isinstance(trainer.progress_bar_callback, TQDMProgressBar) and trainer.progress_bar_callback.is_enabled:
        trainer.progress_bar_callback.print(line)
    else:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
