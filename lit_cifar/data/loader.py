"""Order, sharding and resume: turns a split's resident tensors into batches on the device. Nothing here knows files or
Lightning; augment.py changes pixels.

A batch is a pure function of (seed, epoch, position): neither the device, nor the number of ranks, nor the workers,
nor what ran before have a say in it.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from lit_cifar.data.augment import Augment, Draws
from lit_cifar.data.seeds import make_generator
from lit_cifar.data.split import Split
from lit_cifar.data.workers import Workers
from lit_cifar.errors import UserError

CHUNK = 512  # images augmented and moved at once when batches are smaller; batch 4 alone costs 4 times as much a step


@dataclass(frozen=True)
class TrainBatches:
    """The training batches of rank `rank` out of `num_ranks`: its share batch[rank::num_ranks] of each global batch.

    Args:
        num_images: size N of the training set.
        batch_size: images in the batch of one optimiser step, over all ranks.
        seed: with the epoch, decides the order.
        shuffle: a new order in each epoch; otherwise the set's own.
        drop_last: leave out the last batch of an epoch when it is shorter than the others.

    Raises:
        UserError: the ranks cannot share the batch evenly, or it is empty or larger than the set.
    """

    num_images: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.num_images:
            raise UserError(
                f"--batch_size {self.batch_size} does not fit the {self.num_images} training images: "
                f"choose 1 to {self.num_images}"
            )
        if self.batch_size % self.num_ranks:
            below = self.batch_size // self.num_ranks * self.num_ranks
            above = below + self.num_ranks
            fewer = self.batch_size - below <= above - self.batch_size or above > self.num_images
            nearest = below if below and fewer else above
            raise UserError(
                f"--batch_size {self.batch_size} cannot be shared by {self.num_ranks} devices evenly: "
                f"the nearest that works is {nearest}"
            )

    def __len__(self) -> int:
        full, rest = divmod(self.num_images, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def num_in_batch(self, batch: int) -> int:
        """Number of images in global batch `batch`, over all ranks."""
        return min(self.batch_size, self.num_images - batch * self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Indices (N,) int64 of the whole epoch, the same on every rank."""
        if not self.shuffle:
            return torch.arange(self.num_images)
        return torch.randperm(self.num_images, generator=make_generator(self.seed, epoch, "order"))

    def indices(self, epoch: int, start: int = 0) -> tuple[Tensor, list[int]]:
        """This rank's indices (n,) int64 of all batches from `start` on, and how many each has; in a short last batch a
        rank may get fewer, or none. A tensor for each batch took 0.3 KB, 0.4 GB of 1.28 million images in batches of 4.
        """
        indices = self.order(epoch)[start * self.batch_size : len(self) * self.batch_size]
        if self.num_ranks > 1:
            place = torch.arange(len(indices)) % self.batch_size
            indices = indices[place % self.num_ranks == self.rank]
        return indices, [
            len(range(self.rank, self.num_in_batch(batch), self.num_ranks)) for batch in range(start, len(self))
        ]


@dataclass(frozen=True)
class EvalBatches:
    """Every image once over all ranks, in order; equally many batches on each rank, shares within one image.

    Equal counts matter: in validation DDP broadcasts buffers in each forward and would hang on unequal ones.

    Args:
        num_images: size N of the set.
        batch_size: most images in one rank's batch.
    """

    num_images: int
    batch_size: int
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--data.eval_batch_size {self.batch_size} must be at least 1")

    def __len__(self) -> int:
        largest_share = -(-self.num_images // self.num_ranks)
        return -(-largest_share // self.batch_size)

    def indices(self, epoch: int = 0, start: int = 0) -> tuple[Tensor, list[int]]:
        """This rank's indices (n,) int64 of all batches from `start` on, and how many each has, within one."""
        mine = torch.arange(self.num_images)[self.rank :: self.num_ranks]
        size, rest = divmod(len(mine), len(self))
        sizes = [size + 1] * rest + [size] * (len(self) - rest)
        return mine[sum(sizes[:start]) :], sizes[start:]


@dataclass(frozen=True)
class Epoch:
    """What the batches of an epoch, or of the rest of one, are made from."""

    indices: Tensor  # (n,) int64 on the CPU, of all batches
    sizes: list[int]  # images of each batch
    indices_on_device: Tensor
    draws: Draws  # of all images, on the device


class DeviceLoader:
    """Yields (images, labels) of each batch on the device: images (B, 3, 32, 32) uint8, labels (B,) int64.

    The order is epoch 0's until `set_epoch` chooses another: a Trainer calls it, a loop of one's own has to.

    The split lies on the device as a whole and is indexed there. With a `transform`, images pass through it one by one
    in a standard DataLoader instead, in the same order and shares. Either way they are augmented last, on the device.

    Args:
        split: images and labels.
        batches: TrainBatches or EvalBatches, which index it.
        device: where batches are wanted.
        augment: built-in augmentation, drawn per image and epoch from (seed, epoch); None for evaluation.
        transform: maps one uint8 image (3, 32, 32) to another, for example a torchvision v2 transform.
        num_workers: processes that apply the transform.
        num_epochs: of the training run, where it is known: none after it is made ready.
        finish: makes of each batch's images what is yielded in their place.
    """

    def __init__(
        self,
        split: Split,
        batches: TrainBatches | EvalBatches,
        device: torch.device,
        augment: Augment | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        num_workers: int = 0,
        num_epochs: int | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.batches = batches
        self._finish = finish
        self.device = device
        self.augment = augment
        self._epoch = 0
        self._start = 0  # batch at which the next iteration starts; 0 again after it
        self._state = {"epoch": 0, "batch": 0}
        self._num_epochs = num_epochs
        self._ready: dict[int, Epoch] = {}  # the next epoch, by its number
        self._first_flips: Tensor | None = None  # (N,) bool on the device
        self.waited_seconds = 0.0  # that whoever iterates has spent waiting for batches
        self.num_workers = num_workers if transform is not None else None  # None: images are made on the device
        if transform is None:
            self.images, self.labels = split.images.to(device), split.labels.to(device)
            self._workers: Workers | None = None
        else:
            self.labels = split.labels
            seed = getattr(batches, "seed", 0)
            self._workers = Workers(split, transform, seed, num_workers, pin_memory=device.type == "cuda")

    def __len__(self) -> int:
        """Batches in a whole epoch, also when resuming in its middle."""
        return len(self.batches)

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for `set_epoch`."""
        # There is no `sampler` beside it, because Lightning would then try to replace it under overfit_batches, and
        # warn. It is not kept, because a cycle of references would hold images and workers until garbage is collected.
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order is given next; a position loaded for another epoch is forgotten."""
        if epoch != self._epoch:
            self._epoch, self._start = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "batch"}: batches of the epoch already given, the same on every rank."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a position from `state_dict`, on any number of ranks."""
        self._epoch, self._start = state["epoch"], state["batch"]
        self._state = dict(state)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator reads epoch and start at the first `next`: Lightning loads the state, calls iter(), and sets the
        # epoch after that (pytorch-lightning issue 21938).
        epoch, start = self._epoch, self._start
        self._start = 0
        made = self._ready.pop(epoch, None)
        self._ready.clear()
        if made is None or start:
            made = self._make(epoch, start)
        batches = self._from_device(made) if self._workers is None else self._from_workers(epoch, made)
        if finish := self._finish:
            batches = ((finish(images), labels) for images, labels in batches)
        for batch in itertools.count(start):
            asked = time.perf_counter()
            images_and_labels = next(batches, None)
            if batch + 1 == len(self.batches):
                self._make_ready(epoch + 1)
            self.waited_seconds += time.perf_counter() - asked
            if images_and_labels is None:
                return
            self._state = {"epoch": epoch, "batch": batch + 1}
            yield images_and_labels

    def _make_ready(self, epoch: int) -> None:
        # while a GPU is busy with the steps before, so that it need not wait when the epoch begins; a CPU would be kept
        # from its steps all the same, and hold two epochs
        if self.device.type == "cuda" and isinstance(self.batches, TrainBatches) and epoch != self._num_epochs:
            self._ready[epoch] = self._make(epoch)

    def _make(self, epoch: int, start: int = 0) -> Epoch:
        indices, sizes = self.batches.indices(epoch, start)
        draws = self._draws(epoch) if sizes else Draws()
        return Epoch(indices, sizes, self._send(indices), draws)

    def _send(self, tensor: Tensor) -> Tensor:
        """A tensor on the device; a GPU fetches it when its turn comes, and nobody waits."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _draws(self, epoch: int) -> Draws:
        augment = self.augment
        if augment is None or augment == Augment():  # of a million images the unused draws take time and memory
            return Draws()

        def draw(epoch: int) -> Draws:
            return augment.draw(len(self.labels), make_generator(getattr(self.batches, "seed", 0), epoch, "augment"))

        draws = draw(epoch)
        if augment.flip != "alternating":
            return draws.map(self._send)
        if self._first_flips is None:
            first = draw(0).flips if epoch else draws.flips
            assert first is not None
            self._first_flips = self._send(first)
        draws = replace(draws, flips=None).map(self._send)
        return replace(draws, flips=self._first_flips.logical_not() if epoch % 2 else self._first_flips)

    def _from_device(self, epoch: Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = epoch.sizes
        if not sizes:
            return
        per_chunk = max(1, CHUNK // max(1, sizes[0]))
        sizes_of_chunks = [sizes[first : first + per_chunk] for first in range(0, len(sizes), per_chunk)]
        indices_of_chunks = epoch.indices_on_device.split([sum(chunk) for chunk in sizes_of_chunks])
        for indices, chunk in zip(indices_of_chunks, sizes_of_chunks, strict=True):
            images, labels = self.images.index_select(0, indices), self.labels.index_select(0, indices)
            if self.augment is not None:
                images = self.augment.apply(images, epoch.draws[indices])
            yield from zip(images.split(chunk), labels.split(chunk), strict=True)

    def _from_workers(self, number: int, epoch: Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._workers is not None
        shares = list(epoch.indices.split(epoch.sizes))
        shares_on_device = epoch.indices_on_device.split(epoch.sizes)
        batches = self._workers.batches(number, shares)
        pinned = self.device.type == "cuda"  # elsewhere a copy might read what is freed by then
        for share, batch in zip(shares_on_device, batches, strict=True):
            images, labels = (part.to(self.device, non_blocking=pinned) for part in batch)
            if self.augment is not None:
                images = self.augment.apply(images, epoch.draws[share])
            yield images, labels
