"""What each rank does: its device and shapes, and which one keeps the others waiting. watch.py decides what is
too slow."""

import socket
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.training.lines import warn, write
from lit_cifar.training.speed import waited_seconds
from lit_cifar.training.watch import Watch


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


class SlowRank(Callback):
    """Warns when one rank keeps the others waiting, which nothing else shows: all ranks' steps take equally long.

    Each rank measures what it does of a step by itself, up to the backward pass, in which gradients are exchanged:
    waiting for images, and the forward pass. On a GPU the latter is the device's own time, of one step in each window,
    so that nothing waits for the device between logging steps.
    """

    def __init__(self) -> None:
        self._watch = Watch()
        self._hosts: list[str] = []
        self._events: tuple[Any, Any] | None = None
        self._restart(0.0)

    def _restart(self, waited_seconds: float) -> None:
        self._began = time.perf_counter()
        self._waited_seconds = waited_seconds
        self._forward_began = self._forward_seconds = 0.0
        self._num_batches = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch = Watch()
        self._hosts = [socket.gethostname()] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(self._hosts, socket.gethostname())
        if pl_module.device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(waited_seconds(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._events:
            self._events[0].record()
        self._forward_began = time.perf_counter()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._forward_seconds += time.perf_counter() - self._forward_began
        self._num_batches += 1
        if self._events:
            self._events[1].record()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        log_every = int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if trainer.world_size == 1 or not log_every or (batch_idx + 1) % log_every or not self._num_batches:
            return
        forward_ms = 1000 * self._forward_seconds / self._num_batches
        if self._events:
            self._events[1].synchronize()
            forward_ms = self._events[0].elapsed_time(self._events[1])
        wait_ms = 1000 * (waited_seconds(trainer) - self._waited_seconds) / self._num_batches
        step_ms = 1000 * (time.perf_counter() - self._began) / self._num_batches
        mine = torch.zeros(trainer.world_size, device=pl_module.device)  # and a place for each other rank's
        mine[trainer.global_rank] = wait_ms + forward_ms
        own_ms = trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        self._restart(waited_seconds(trainer))
        if trainer.is_global_zero:
            warning = self._watch.ranks(trainer.global_step, own_ms, step_ms, self._hosts)
            if warning:
                warn(trainer, warning)
