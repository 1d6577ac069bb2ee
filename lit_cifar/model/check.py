"""Tries a net on a few black images before anything is written, so that what it cannot do is known then. module.py
trains it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lit_cifar.errors import UserError, calls_chosen, is_memory
from lit_cifar.text import printable

if TYPE_CHECKING:
    from lit_cifar.model.module import LitClassifier

IMAGE_SIZES = ("img_size", "image_size", "input_size")  # what nets call the side of the images that they are made for
OWN = "lit_cifar.nets."  # nets of this package, whose failures are bugs


@calls_chosen("when its layers were given their shapes")
@torch.no_grad()
def shape_lazy_layers(net: nn.Module) -> None:
    """Gives lazy layers their shapes, which the optimiser, checkpoints and other processes need to know."""
    if isinstance(net, nn.Module) and any(is_lazy(tensor) for tensor in chain(net.parameters(), net.buffers())):
        training = net.training
        net.eval()(torch.zeros(1, 3, 32, 32))
        net.train(training)


def count_logits(module: "LitClassifier") -> int:
    """The number of logits K that a module's net gives for an image, in eval mode.

    Raises:
        UserError: the net fails, or gives something else than logits (1, K).
    """
    with unchanged(module.net, module.mean.device), torch.no_grad():
        module.net.eval()
        return int(_logits(module, 1, None).shape[1])


def check_training(module: "LitClassifier", num_images: set[int]) -> None:
    """Tries a module's net on black images as it will be trained, on batches of which some have `num_images`.

    Raises:
        UserError: it has nothing to train, or cannot take such batches.
    """
    net, device = module.net, module.mean.device
    name = type(net).__name__
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UserError(f"{name} has no parameter to train: make a layer, or set requires_grad of one that is frozen")
    if any(isinstance(layer, nn.SyncBatchNorm) for layer in net.modules()) and device.type == "cpu":
        return  # it trains on GPUs alone
    has_norm = any(isinstance(layer, _BatchNorm) for layer in net.modules())
    with unchanged(net, device), torch.no_grad():  # in the modes of its layers, some of which may be frozen
        for side in dict.fromkeys(module.sides) or (None,):
            _logits(module, 2, side)
            if not has_norm or 1 not in num_images:
                continue
            try:
                module.forward(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device), side)
            except ValueError as error:
                raise UserError(
                    f"BatchNorm of {name} needs more than one image, and a batch is to have one: add --data.drop_last "
                    "true, or choose another --batch_size"
                ) from error


@contextmanager
def unchanged(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Around forward passes that leave the net's buffers and modes and torch's random state as they were."""
    buffers, modes = [(buffer, buffer.clone()) for buffer in net.buffers()], [(m, m.training) for m in net.modules()]
    accelerator: Any = getattr(torch, device.type) if device.type in ("cuda", "mps") else None
    state = accelerator.get_rng_state() if accelerator else None
    try:
        with torch.random.fork_rng([]):
            yield
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    finally:
        for module, mode in modes:
            module.training = mode
        if accelerator:
            accelerator.set_rng_state(state)


def _logits(module: "LitClassifier", num_images: int, side: int | None) -> Tensor:
    net = module.net
    name, size = type(net).__name__, f"3x{side or 32}x{side or 32}"
    mode = " in training" if net.training else ""
    images = torch.zeros(num_images, 3, 32, 32, dtype=torch.uint8, device=module.mean.device)
    try:
        logits = module(images) if side is None else module(images, side)  # a subclass's forward may know no sides
    except Exception as error:
        if is_memory(error) or (side is None and type(net).__module__.startswith(OWN)):
            raise
        reason = printable(" ".join(str(error).split())).rstrip(".")[:300]
        raise UserError(
            f"{name} cannot use images of {size}{mode} ({type(error).__name__}: {reason}): {_way_out(net, error)}; "
            "--log_level debug prints more"
        ) from error
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        parts = ", ".join(map(printable, map(str, logits))) if isinstance(logits, Mapping) else ""
        hint = "try --model.net.aux_logits false" if hasattr(net, "aux_logits") else "return the logits alone"
        raise UserError(f"{name} gives {kind}{parts and f' ({parts})'}{mode}, not logits, a tensor (B, K): {hint}")
    if logits.ndim != 2 or len(logits) != num_images:
        raise UserError(
            f"{name} gives a tensor {tuple(logits.shape)} for {num_images} image(s){mode}: return logits (B, K), one "
            "row of K numbers for each image"
        )
    if not logits.is_floating_point():
        raise UserError(f"{name} gives logits of {logits.dtype}{mode}: return real floating-point numbers")
    return logits


def _way_out(net: nn.Module, error: Exception) -> str:
    """What to do about a net that failed on images of one size, or for another reason."""
    if isinstance(error, TypeError) and "argument" in str(error):
        return "its forward gets the images alone, and returns logits; name a net that does so"
    name = next((name for name in IMAGE_SIZES if name in inspect.signature(type(net)).parameters), None)
    return (
        f"set --model.net.{name} 32, or choose another net"
        if name
        else "choose a net for images of this size, or fix it"
    )
