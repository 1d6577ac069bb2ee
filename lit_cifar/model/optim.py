"""Orthogonalisation, the optimiser and its parameter groups, and the step size as a pure function of the step. No net's
class is named here; recipes' groups name parameters by pattern."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_cifar.errors import UserError
from lit_cifar.settings import HalfOpenUnitInterval, NonNegativeFloat

Schedule = Literal["constant", "linear", "cosine", "onecycle"]
Kind = Literal["sgd", "muon"]
# what the model and its groups set of an optimiser, and what it is for SGD and Muon
OPTIONS: dict[str, Any] = {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}

# Coefficients of the quintic iteration, chosen to lift small singular values fastest: it ends near 1, not at 1.
# Source: Keller Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/
QUINTIC = (3.4445, -4.7750, 2.0315)


def lr_factor(step: int, num_steps: int, schedule: Schedule = "constant", warmup: float = 0.0) -> float:
    """The factor on the base learning rate at optimiser step `step` of `num_steps`, 0 <= step.

    Args:
        step: number of steps already taken; beyond the end the last step's factor stays.
        num_steps: length of the whole training, at least 1.
        schedule: 'constant' stays at 1; 'linear' falls from 1 to 0 along a line; 'cosine' along half a cosine (arXiv
            1608.03983); 'onecycle' rises along half a cosine from 1/25 to 1 and falls to 1/250,000 (arXiv 1708.07120,
            with the shape and numbers of torch.optim.lr_scheduler.OneCycleLR).
        warmup: share of the training, 0 to 1, in which the factor rises: as the first part of the cycle for 'onecycle',
            linearly for the others.
    """
    last = num_steps - 1
    step = min(step, last)
    if schedule == "onecycle":
        peak = warmup * num_steps - 1
        if step <= peak:
            return _half_cosine(1 / 25, 1.0, step / peak if peak > 0 else 1.0)
        return _half_cosine(1.0, 1 / 25e4, (step - peak) / (last - peak))
    num_warmup = round(warmup * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else _half_cosine(1.0, 0.0, progress)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


def orthogonalise(matrices: Tensor, num_iterations: int = 3) -> Tensor:
    """Moves all singular values of each matrix towards 1 and leaves its singular vectors: roughly U V^T of its SVD.

    A Newton-Schulz iteration of matrix products alone. After three iterations singular values from a tenth of the
    largest up lie within 0.3 to 1.4, which is near enough for an update's direction (Muon, see QUINTIC).

    Args:
        matrices: (N, rows, columns) floating point; all N are worked on at once.
        num_iterations: of the quintic polynomial.

    Returns:
        (N, rows, columns) in the same dtype. On a GPU the products are bfloat16; the result needs no more.
    """
    a, b, c = QUINTIC
    dtype = matrices.dtype
    # rows must be the shorter side, so that the products are small
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    # the Frobenius norm bounds the largest singular value; the smallest positive number keeps a zero matrix zero
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(num_iterations):  # three products, which take the sums along: nothing is left to be compiled
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if transposed else x).to(dtype)


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike: those whose name this pattern matches, and no earlier group's.

    Args:
        name: what dashboards call the group.
        pattern: regular expression that is searched for in the parameter's name.
        kind: 'muon' for convolutions' filters and matrices; 'sgd' for SGD, or the optimiser that the model names.
        lr: base learning rate, 0 or more; null takes the model's, as do the next three.
        momentum: momentum, 0 to below 1.
        weight_decay: L2 penalty, 0 or more; of kind 'sgd' only, since 'muon' keeps each filter bank's norm.
        nesterov: Nesterov's form of momentum.
    """

    name: str
    pattern: str
    kind: Kind = "sgd"
    lr: NonNegativeFloat | None = None
    momentum: HalfOpenUnitInterval | None = None
    weight_decay: NonNegativeFloat | None = None
    nesterov: bool | None = None


def claim(named_parameters: Iterable[tuple[str, nn.Parameter]], groups: Sequence[Group]) -> list[list[nn.Parameter]]:
    """Trainable parameters of each group, in the groups' order: the first pattern that matches a name claims it.

    Raises:
        UserError: a pattern is no regular expression or claims nothing, two groups share a name, a parameter is
            claimed by none, or one that is claimed by 'muon' is no matrix.
    """
    if len({group.name for group in groups}) < len(groups):
        raise UserError(f"--model.groups: two groups share a name: {', '.join(group.name for group in groups)}")
    claimed: list[list[nn.Parameter]] = [[] for _ in groups]
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        for group, parameters in zip(groups, claimed, strict=True):
            try:
                found = re.search(group.pattern, name)
            except re.error as error:
                raise UserError(
                    f"--model.groups: pattern {group.pattern!r} is no regular expression: {error}"
                ) from None
            if found:
                if group.kind == "muon" and parameter.ndim < 2:
                    raise UserError(f"--model.groups: {group.name} gives muon {name}, which is no matrix: use kind sgd")
                parameters.append(parameter)
                break
        else:
            raise UserError(f"--model.groups: no pattern matches {name}; a last group with pattern '' takes the rest")
    for group, parameters in zip(groups, claimed, strict=True):
        if not parameters:
            raise UserError(f"--model.groups: {group.name}'s pattern {group.pattern!r} claims no parameter")
    return claimed


class MuonSGD(torch.optim.Optimizer):
    """SGD with momentum for groups of kind 'sgd', Muon for groups of kind 'muon', in one optimiser.

    Muon orthogonalises the momentum's update of each filter bank, seen as a matrix (filters, everything else), and
    before each step scales the bank to the norm sqrt(filters), so that its step size means the same all along.
    Source: https://kellerjordan.github.io/posts/muon/ and the cifar10-airbench scripts. Groups of kind 'sgd' follow
    torch.optim.SGD, its weight decay included.

    Args:
        groups: dicts with 'params' and any of 'kind', 'lr', 'momentum', 'weight_decay', 'nesterov', 'name'.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        defaults = {"kind": "sgd", "lr": 0.001, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; `closure` computes the gradients first, and what it returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(group, parameters)
        return loss

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if group["kind"] == "sgd" and group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        updates = self._momentum(group, parameters, gradients)
        if group["kind"] == "muon":
            factors = torch._foreach_norm(parameters)  # all at once: a GPU's launches take longer than such numbers
            torch._foreach_clamp_min_(factors, 1e-12)
            torch._foreach_reciprocal_(factors)
            torch._foreach_mul_(factors, [math.sqrt(len(parameter)) for parameter in parameters])
            torch._foreach_mul_(parameters, factors)
            updates = _orthogonalise_banks(updates)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _momentum(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        momentum = group["momentum"]
        if not momentum:
            return gradients
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        if not group["nesterov"]:
            return buffers
        return list(torch._foreach_add(gradients, buffers, alpha=momentum))


def _orthogonalise_banks(updates: list[Tensor]) -> list[Tensor]:
    """Each update as a matrix, orthogonalised; those of one shape together."""
    shapes = [(len(update), update[0].numel()) for update in updates]
    results: list[Tensor] = list(updates)
    for shape in dict.fromkeys(shapes):
        chosen = [position for position, other in enumerate(shapes) if other == shape]
        matrices = orthogonalise(torch.stack([updates[position].reshape(shape) for position in chosen]))
        for position, matrix in zip(chosen, matrices, strict=True):
            results[position] = matrix.view_as(updates[position])
    return results
