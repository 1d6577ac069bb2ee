"""Writes a state as a file, whole or not at all, and keeps the states before it; restores what is no weight: the random
state, what callbacks had done. save.py says when, read.py reads it."""

import contextlib
import os
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from torch import Tensor
from torch.nn.utils import prune
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_cifar.errors import UserError
from lit_cifar.files import move, replaced


class _Pickler(pickle.Pickler):
    """Writes tensors of a GPU as the CPU's, and waits for all their copies at once; torch.save would wait for each."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "cuda" or is_traceable_wrapper_subclass(value):
            return NotImplemented  # a subclass brings the tensors that it is made of
        return value.detach().to("cpu", non_blocking=True).__reduce_ex__(2)

    def dump(self, checkpoint: Any) -> None:
        super().dump(checkpoint)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # torch.save writes what the tensors hold only after this


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their final name, onto the disk, and renames them.

    Lightning's own goes through $TMPDIR without fsync, and swallows a PermissionError (fabric/utilities/cloud_io.py).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            with replaced(Path(path)) as file:
                torch.save(checkpoint, file, pickle_module=SimpleNamespace(__name__="pickle", Pickler=_Pickler))
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
            lines = str(error).splitlines()  # below a RuntimeError's first line stands where in torch it came from
            reason = getattr(error, "strerror", None) or (lines[0] if lines else type(error).__name__)
            raise UserError(f"checkpoint {path} could not be written ({reason}): {way_out(Path(path))}") from error


def plain(state: Any) -> Any:
    """A scheduler's state as weights_only reads it: without functions, which its class makes anew and are none of its
    state (SWALR's in torch 2.8), and with numpy's numbers as Python's."""
    if isinstance(state, dict):
        values = {key: plain(value) for key, value in state.items() if not callable(value)}
        return Counter(values) if isinstance(state, Counter) else values  # MultiStepLR asks its Counter
    if isinstance(state, np.generic):
        return state.item()
    return type(state)(map(plain, state)) if type(state) in (list, tuple) else state


def way_out(path: Path) -> str:
    kept = f"; the one before is whole: go on with --resume {path}" if path.is_file() else ""
    return f"free space or fix the folder{kept}"


def keep(path: Path, num_kept: int) -> None:
    """Before `path` is replaced: makes last.ckpt also last-1.ckpt, and last-1.ckpt last-2.ckpt, up to `num_kept` files.

    `path` itself stays where it is, so that a run killed here has it still.
    """
    previous = path.with_name(f"{path.stem}-1{path.suffix}")
    if num_kept == 1 or not path.exists() or (previous.exists() and previous.samefile(path)):
        return  # the same file when a run was killed between this and its save
    for age in range(num_kept - 2, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            move(
                path.with_name(f"{path.stem}-{age}{path.suffix}"), path.with_name(f"{path.stem}-{age + 1}{path.suffix}")
            )
    with contextlib.suppress(OSError, AttributeError):  # a file system without hard links keeps one state less
        previous.unlink(missing_ok=True)
        os.link(path, previous)


def get_random_state() -> dict[str, Any]:
    """torch's random state on the CPU and on the current GPU or Apple's mps, which nets with dropout draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what `get_random_state` gave; of a device that this machine has not, or that another version of torch
    described, nothing can be restored."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available() and len(state["mps"]) == len(torch.mps.get_rng_state()):
        torch.mps.set_rng_state(state["mps"])


def restore_callbacks(trainer: Trainer, module: LightningModule) -> None:
    """Brings Lightning's own callbacks to where they were when the state was saved that a run goes on from."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging) and trainer.fit_loop.restarted_mid_epoch:
            callback.on_train_epoch_start(trainer, module)  # which Lightning does not announce again
        if isinstance(callback, ModelPruning) and trainer.current_epoch:
            _restore_masks(callback)
        if isinstance(callback, BaseFinetuning) and trainer.global_step:
            # it froze what it begins with; what is trained by now is in the optimiser's groups
            groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            trained = {weight for weights in groups for weight in weights}
            leaves = [part for part in module.modules() if trained.intersection(part._parameters.values())]
            callback.make_trainable(leaves)


def _restore_masks(callback: ModelPruning) -> None:
    """Keeps zero what was pruned before a state was saved, which holds no masks."""
    masks = [getattr(module, name) != 0 for module, name in callback._parameters_to_prune]
    if all(mask.all() for mask in masks):
        return  # nothing was pruned yet
    for (module, name), mask in zip(callback._parameters_to_prune, masks, strict=True):
        prune.custom_from_mask(module, name, mask)
    for layer in (callback._original_layers or {}).values():
        for index, name in layer["names"]:
            # Lightning resets weights to this layer's at the first pruning, and has the layer trained from then on
            getattr(layer["data"], name).data = getattr(callback._parameters_to_prune[index][0], f"{name}_orig").data
