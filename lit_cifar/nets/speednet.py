"""SpeedNet, in the family of the CIFAR-10 speedruns: whitening, then three blocks of convolutions.

Source: K. Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single A100, arXiv 2404.00498, and github.com/KellerJordan/
cifar10-airbench; its head, Dirac filters and low-momentum BatchNorm descend from github.com/tysam-code/hlb-CIFAR10.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_cifar.errors import UserError

WHITENED_SIDE = 2  # pixels of the patches that the first convolution whitens
SMALLEST_VARIANCE = 5e-4  # added to patches' variances, so that their least directions are not blown up


class SpeedNet(nn.Module):
    """A fixed whitening convolution, three blocks that halve the side, global max pooling, a scaled linear head.

    It takes images of any side from 16 pixels, which lets a training run begin small.

    Args:
        num_classes: number of classes K, the length of each row of logits.
        widths: channels of the three blocks.
        depth: convolutions in each block; the third closes a residual connection around the second and itself.
        activation: 'gelu' or 'silu'.
        momentum: weight of the newest batch in BatchNorm's running statistics; high, because runs are short.

    Raises:
        UserError: a width is below 1, or the momentum not from 0 to 1.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: tuple[int, int, int] = (64, 256, 256),
        depth: Literal[2, 3] = 2,
        activation: Literal["gelu", "silu"] = "gelu",
        momentum: float = 0.4,
    ) -> None:
        super().__init__()
        if min(widths) < 1 or not 0 <= momentum <= 1:
            raise UserError(f"SpeedNet: widths {list(widths)} must be 1 or more, momentum {momentum} from 0 to 1")
        self.num_classes, self.widths, self.depth, self.momentum = num_classes, widths, depth, momentum
        self.activation = activation
        num_patch_values = 3 * WHITENED_SIDE**2
        # fixed: its input and weights need no gradients, which saves the costliest part of the backward pass
        self.whiten = nn.Conv2d(3, 2 * num_patch_values, WHITENED_SIDE, bias=False).requires_grad_(False)
        channels = (2 * num_patch_values, *widths)
        self.blocks = nn.Sequential(
            *(Block(channels[i], channels[i + 1], depth, activation, momentum) for i in range(3))
        )
        self.head = nn.Linear(channels[-1], num_classes, bias=False)
        self.activate = _activation(activation)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_from_images(self, images: Tensor) -> None:
        """Whitens the patches of normalised training images (N, 3, 32, 32): the first convolution's outputs are their
        principal components with unit variance, each with both signs."""
        patches = F.unfold(images.float(), WHITENED_SIDE).transpose(1, 2).flatten(0, 1)  # (num_patches, 12)
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + SMALLEST_VARIANCE).sqrt()).T.view(-1, 3, WHITENED_SIDE, WHITENED_SIDE)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images (B, 3, side, side) to logits (B, K)."""
        features = self.activate(self.whiten(images.contiguous(memory_format=torch.channels_last)))
        features = self.blocks(features).amax((2, 3))
        logits: Tensor = self.head(features) / features.shape[1]
        return logits

    def _apply(self, fn: Any, recurse: bool = True) -> "SpeedNet":
        # norms stay float32: their running statistics would stand still in half precision. Here and not in a class of
        # norms, which would be lost when they are made SyncBatchNorm
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        weights = [weight for norm in norms for weight in norm.parameters()]
        precise = {id(tensor) for norm in norms for tensor in norm.buffers()}
        precise |= {id(tensor) for weight in weights for tensor in (weight, weight.grad)}

        def apply(tensor: Tensor) -> Tensor:
            applied: Tensor = fn(tensor)
            is_half = applied.is_floating_point() and applied.itemsize < 4
            return tensor.to(applied.device) if is_half and id(tensor) in precise else applied

        return super()._apply(apply, recurse)


class Block(nn.Module):
    """Convolution and pooling to half the side, then one convolution, or two with a residual connection."""

    def __init__(self, num_in: int, num_out: int, depth: int, activation: str, momentum: float) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(num_in, num_out), _norm(num_out, momentum)
        self.conv2, self.norm2 = _conv(num_out, num_out), _norm(num_out, momentum)
        self.residual = depth == 3
        if self.residual:
            self.conv3, self.norm3 = _conv(num_out, num_out), _norm(num_out, momentum)
        self.activation = _activation(activation)

    def forward(self, features: Tensor) -> Tensor:
        features = shortcut = self.activation(self.norm1(F.max_pool2d(self.conv1(features), 2)))
        features = self.activation(self.norm2(self.conv2(features)))
        if self.residual:
            features = self.activation(self.norm3(self.conv3(features)) + shortcut)
        return features


def _norm(num_features: int, momentum: float) -> nn.BatchNorm2d:
    """BatchNorm with a trained bias and no trained scale."""
    norm = nn.BatchNorm2d(num_features, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad = False
    return norm


def _conv(num_in: int, num_out: int) -> nn.Conv2d:
    """A 3x3 convolution whose first filters pass their input on unchanged."""
    conv = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:num_in])
    return conv


def _activation(name: str) -> nn.Module:
    return nn.GELU() if name == "gelu" else nn.SiLU()
