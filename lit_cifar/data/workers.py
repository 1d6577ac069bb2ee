"""A transform of one's own, applied by worker processes: their batches, and what is wrong with a transform or a worker.
loader.py decides which images make each batch."""

import contextlib
import multiprocessing
import pickle
import random
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lit_cifar.data.seeds import seed_of
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError, calls_chosen
from lit_cifar.text import printable


class Workers:
    """Batches of transformed images, made by a DataLoader.

    Args:
        split: the images.
        transform: maps one uint8 image (3, 32, 32) to another.
        seed: an image's random state follows from (seed, epoch, index).
        num_workers: processes that apply the transform; 0: this one does.
        pin_memory: for copies to a GPU.

    Raises:
        UserError: the transform fails on the first image, or cannot be sent to workers.
    """

    def __init__(
        self, split: Split, transform: Callable[[Tensor], Tensor], seed: int, num_workers: int, pin_memory: bool
    ) -> None:
        check_transform(transform, split, num_workers)
        self._keys = _Keys()
        self._loader = DataLoader(
            _Transformed(split, transform, seed),
            batch_sampler=self._keys,
            collate_fn=_collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or each iterator would draw from the global state that nets draw from
        )

    def batches(self, epoch: int, shares: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, 32, 32) uint8 and labels (B,) int64, on the CPU, for each share's indices (B,).

        Raises:
            UserError: the transform fails, or a worker does.
        """
        self._keys.epoch, self._keys.shares = epoch, shares
        try:
            for images, labels in self._loader:
                if isinstance(images, str):
                    raise _of_this_rank(images)
                yield images, labels
        except UserError:
            raise
        except Exception as error:
            workers = getattr(self._loader._iterator, "_workers", [])
            is_killed = any(worker.exitcode == -9 for worker in workers)  # of which torch's error need not know
            raise worker_error(error, is_killed) or error from None


class _Keys:
    """Batch sampler of (epoch, index) keys, so that a worker needs no more than the key to know its random state."""

    def __init__(self) -> None:
        self.epoch = 0
        self.shares: Sequence[Tensor] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(self.epoch, index) for index in share.tolist()] for share in self.shares)

    def __len__(self) -> int:
        return len(self.shares)


class _Transformed(Dataset[tuple[Tensor | str, Tensor]]):
    """Applies a transform to the image of a key (epoch, index), with random state from (seed, epoch, index).

    In the image's place comes a line where that fails: an exception would come out of a worker with its traceback.
    """

    def __init__(self, split: Split, transform: Callable[[Tensor], Tensor], seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    @calls_chosen("on an image")
    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | str, Tensor]:
        epoch, index = key
        state: tuple[Any, ...] = random.getstate()
        numpy_state = np.random.get_state()
        image: Tensor | str
        try:
            with torch.random.fork_rng(devices=[]):  # the main process's own random state stays as it was
                image_seed = seed_of(self.seed, epoch, index, "transform")
                torch.manual_seed(image_seed)
                random.seed(image_seed)
                np.random.seed(image_seed)
                image = _apply(self.transform, self.split.images[index])
        except UserError as error:
            image = str(error)
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
        return image, self.split.labels[index]


def _apply(transform: Callable[[Tensor], Tensor], original: Tensor) -> Tensor:
    """What a transform, or one after the other of a Sequential, makes of an image (3, 32, 32) uint8.

    Raises:
        UserError: one of them fails, or the last gives anything but such an image.
    """
    image = original
    for part in transform if isinstance(transform, nn.Sequential) else (transform,):
        try:
            image = part(image)
        except Exception as error:  # of others' code: anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {_detail(error)}, in {place.filename}:{place.lineno}"
            raise UserError(
                f"--data.transform: {type(part).__name__} fails ({reason}); a transform gets one image at a "
                f"time, {original.dtype} {tuple(original.shape)}, without its label and the rest of the batch"
            ) from error
    if not isinstance(image, Tensor) or image.dtype != original.dtype or image.shape != original.shape:
        given = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise UserError(
            f"--data.transform gave {given} where {original.dtype} {tuple(original.shape)} is needed: "
            "leave scaling and normalising to the model"
        )
    return image


def _detail(error: Exception) -> str:
    return printable(" ".join(str(error).split())) or "no message"


def _collate(samples: list[tuple[Tensor | str, Tensor]]) -> tuple[Tensor | str, Tensor]:
    if not samples:  # a rank's share of a short last batch may be empty
        return torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    images, labels = zip(*samples, strict=True)
    if failed := next((image for image in images if isinstance(image, str)), None):
        return failed, torch.stack(labels)
    batch = torch.stack(images), torch.stack(labels)
    if get_worker_info() is not None:
        for tensor in batch:  # here, where an error reaches the main process; the queue would lose it, and a batch
            tensor.share_memory_()
    return batch


def check_transform(transform: Callable[[Tensor], Tensor], split: Split, num_workers: int) -> None:
    """Tries a transform on the first image, and whether it can be sent to workers.

    Raises:
        UserError: it fails, gives anything but a uint8 image of the same shape, or cannot be sent where it has to be.
    """
    image = _Transformed(split, transform, seed=0)[(0, 0)][0]
    if isinstance(image, str):
        raise UserError(image)
    # the default of macOS, Windows and, from Python 3.14 on, Linux; asked so that a script can still choose another
    start = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if num_workers and start != "fork":
        for part in transform if isinstance(transform, nn.Sequential) else (transform,):
            try:
                with contextlib.suppress(RuntimeError):  # locks and shared values can be sent as a process starts only
                    ForkingPickler.dumps(part)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                raise UserError(
                    f"--data.transform: {type(part).__name__} cannot be sent to the processes of --data.num_workers "
                    f"({_detail(error)}): keep out of it what pickle refuses, or choose --data.num_workers 0"
                ) from None


def worker_error(error: BaseException, is_killed: bool = False) -> UserError | None:
    """What an error of a DataLoader and its workers means; None if it is another one.

    A worker that dies is noticed wherever the main process happens to be, not only where it asks for a batch.
    """
    text = f"{error} {error.__cause__}"  # the cause names the signal
    if re.search(r"shared memory|Bus error|/torch_\d", text):
        return _of_this_rank(
            "the shared memory (/dev/shm) is too small for the images of --data.num_workers: give it more, in docker "
            "by --shm-size 1g, or choose --data.num_workers 0"
        )
    if "Too many open files" in text or "ancdata" in text:
        return _of_this_rank("too many files are open for --data.num_workers: raise ulimit -n, or choose fewer workers")
    if re.search(r"DataLoader worker \(pid.*?\) (is killed by signal|exited unexpectedly)", text):
        why = " (for want of memory, perhaps)" if is_killed or "Killed" in text else ""
        return _of_this_rank(f"a process of --data.num_workers has died{why}: choose fewer, or --data.num_workers 0")
    return None


def _of_this_rank(line: str) -> UserError:
    """An error that other ranks need not have."""
    failed = UserError(line)
    failed.of_rank = True
    return failed
