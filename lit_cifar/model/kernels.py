"""What computes the same with faster kernels: the way from images to logits as one function, which torch.compile takes
whole, and TF32. module.py trains with it, nets/ has the nets."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lit_cifar.data.loader import EvalBatches, TrainBatches
from lit_cifar.errors import UserError, is_memory
from lit_cifar.model.check import unchanged
from lit_cifar.model.classifier import normalise, views
from lit_cifar.model.data import batches_of
from lit_cifar.model.steps import limited
from lit_cifar.text import printable

if TYPE_CHECKING:
    from lit_cifar.model.module import LitClassifier

ToLogits = Callable[..., Tensor]
BACKEND: Any = "inductor"  # of torch.compile; tests count graphs with another
GRAPHS = 8  # at most for one shape


def shrunk(images: Tensor, side: int | None) -> Tensor:
    """Images (B, 3, h, w) of any float dtype at side x side pixels; as they are without a side."""
    if side is None or side == images.shape[2]:
        return images
    # in float32, because torch has no antialiasing for bfloat16 on the CPU
    return F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True).to(images.dtype)


def to_logits(net: nn.Module, images: Tensor, mean: Tensor, std: Tensor, side: int | None = None) -> Tensor:
    """Maps images (B, 3, 32, 32) uint8 0..255 to logits (B, K): normalises and shrinks them, applies the net."""
    logits: Tensor = net(shrunk(normalise(images, mean, std), side))
    return logits


@functools.cache
def compiled(backend: Any) -> ToLogits:
    """`to_logits`, which compiles itself for each new shape of images.

    Raises:
        UserError: torch cannot compile here.
    """
    _expect(num_shapes=2)  # besides those that are warmed up
    try:
        function: ToLogits = torch.compile(to_logits, dynamic=False, backend=backend)
    except RuntimeError as error:  # a Python that is too new for this torch
        raise _cannot_compile(error) from error
    return function


def _expect(num_shapes: int) -> None:
    """Lets torch keep more graphs of each function than its 8, after which it goes on uncompiled.

    There may be others of this process, and several for a shape, where the net is not taken in one piece.
    """
    config = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, getattr(config, limit) + GRAPHS * num_shapes)


def warm_up(module: "LitClassifier", stages: Iterable[str]) -> None:
    """Takes black batches of all shapes that will come through a module, as far as they are known, in the same modes of
    torch; leaves its weights and buffers, gradients and random state alone.

    Args:
        module: with a Trainer, on its device.
        stages: 'train', 'val' and 'test', which have shapes of their own.

    Raises:
        UserError: it cannot be compiled.
    """
    trainer = module.trainer
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        return  # others hold parts of the weights, and gather them for a step alone
    try:
        for stage in stages:
            num_images = _sizes(batches_of(trainer, stage), getattr(trainer, f"limit_{stage}_batches"))
            with unchanged(module.net, module.device):
                if stage == "train":
                    _warm_up_training(module, num_images)
                else:
                    _warm_up_evaluation(module, num_images)
    except Exception as error:
        if is_memory(error) or not type(error).__module__.startswith("torch._"):  # the net's own
            raise
        raise _cannot_compile(error) from error


def _sizes(batches: TrainBatches | EvalBatches | None, limit: float) -> list[int]:
    """The different numbers of images in this rank's batches, of which `limit` are used; of training batches each rank
    has equally many numbers."""
    num_batches = limited(len(batches), limit) if batches else 0
    if not batches or not num_batches:
        return []
    if isinstance(batches, EvalBatches):
        return list(dict.fromkeys(batches.indices()[1][:num_batches]))
    different = dict.fromkeys(batches.num_in_batch(batch) for batch in (0, num_batches - 1))
    return [len(range(batches.rank, num_images, batches.num_ranks)) for num_images in different]


def _warm_up_training(module: "LitClassifier", num_images: Iterable[int]) -> None:
    weights = [weight for weight in module.net.parameters() if weight.requires_grad]
    for num in num_images:
        for side in dict.fromkeys(module.sides) or (None,):
            loss = _logits(module, _black(num, module.device), side).float().sum()
            # not backward(): gradients stay as they are, and other processes are not asked for theirs
            torch.autograd.grad(loss, weights, allow_unused=True)


def _warm_up_evaluation(module: "LitClassifier", num_images: Iterable[int]) -> None:
    module.net.eval()
    with torch.no_grad():  # and inference mode where Lightning is in it: in a test, not for validation within fit
        for num in num_images:
            for view, _ in views(_black(num, module.device), module.tta):
                _logits(module, view, None)


def _black(num_images: int, device: torch.device) -> Tensor:
    return torch.zeros(num_images, 3, 32, 32, dtype=torch.uint8, device=device)


def _logits(module: "LitClassifier", images: Tensor, side: int | None) -> Tensor:
    _expect(num_shapes=1)
    # DDP has graphs cut where it exchanges gradients, if they are made within its forward
    within_ddp = getattr(module.trainer.strategy.model, "_inside_ddp_forward", contextlib.nullcontext)
    with within_ddp(), module.trainer.precision_plugin.forward_context():
        return module.forward(images, side)


def set_tf32(on: bool) -> None:
    """Lets CUDA round the factors of float32 products to TensorFloat-32, in convolutions and matrices alike, or not.

    By itself torch does so in convolutions only. The older of torch's two ways: 2.8 knows no other, and Lightning asks
    in this one, which raises where the newer way was used.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the newer way
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def _cannot_compile(error: Exception) -> UserError:
    reason = printable(" ".join(str(error).split()))[:300]
    return UserError(
        f"--compile true does not work here ({type(error).__name__}: {reason}): use --compile false, or install what "
        "is missing; --log_level debug prints more"
    )
