"""Optimisers and schedulers that the user names or makes: what is asked of them, and Muon beside one. optimised.py
hands them to the Trainer, optim.py has SGD and Muon."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lit_cifar.errors import UserError, calls_chosen
from lit_cifar.model.optim import OPTIONS, Group, MuonSGD, claim

# a class of torch.optim or of torch.optim.lr_scheduler, a partial of it, or any other callable that makes one
MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], LRScheduler]


def make_optimizer(
    net: nn.Module,
    groups: Sequence[Group],
    settings: Sequence[dict[str, Any]],
    fused: bool,
    make: MakeOptimizer | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of a net's trainable parameters.

    Args:
        groups: its parameter groups; without any, SGD or the optimiser that `make` makes takes all parameters.
        settings: 'name', 'lr', 'momentum', 'weight_decay' and 'nesterov' of each group, or of all parameters; None
            leaves what the optimiser has.
        fused: whether torch's SGD updates all parameters in one call.
        make: the optimiser in the place of SGD.

    Raises:
        UserError: the groups do not suit the net (see `claim`), or the optimiser cannot be made or lacks a setting.
    """
    if not groups:
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        if make is not None:
            return _make_named(make, parameters, settings)
        return torch.optim.SGD([{**settings[0], "params": parameters}], fused=fused)
    claimed = claim(net.named_parameters(), groups)
    ours = [make is None or group.kind == "muon" for group in groups]
    given = [{key: value for key, value in setting.items() if value is not None} for setting in settings]
    muon = [
        {**OPTIONS, **setting, "kind": group.kind, "params": p}
        for group, setting, p, is_ours in zip(groups, given, claimed, ours, strict=True)
        if is_ours
    ]
    if make is None:
        return MuonSGD(muon)
    if all(ours):
        raise UserError("--model.optimizer: all groups are of kind muon; leave it out, or give it a group of kind sgd")
    rest = [number for number, is_ours in enumerate(ours) if not is_ours]
    for_rest = [{"params": claimed[number], "name": groups[number].name} for number in rest]
    named = _make_named(make, for_rest, [settings[i] for i in rest], [groups[i] for i in rest], bool(muon))
    return MuonBeside(muon, named, ours) if muon else named


@calls_chosen("when the optimiser was made")
def _make_named(
    make: MakeOptimizer,
    parameters: list[Any],
    settings: Sequence[dict[str, Any]],
    groups: Sequence[Group] = (),
    beside_muon: bool = False,
) -> torch.optim.Optimizer:
    """An optimiser of the user's, with those settings that are not None; groups that it made itself keep their own."""
    more = {"lr": settings[0]["lr"]} if default_of(make, "lr") is inspect.Parameter.empty else {}
    try:
        optimizer = make(parameters, **more)
    except Exception as error:
        raise UserError(f"--model.optimizer cannot be made: {one_line(error)}") from error
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"--model.optimizer gives {name}, no torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError("--model.optimizer SparseAdam takes sparse gradients only, and a net's are dense: use Adam")
    for number, group in enumerate(optimizer.param_groups):
        setting = settings[number if groups else 0]
        group.setdefault("name", setting["name"] if len(optimizer.param_groups) == 1 else f"group{number}")
        for key in (key for key in OPTIONS if setting[key] is not None):
            value, of_group = setting[key], bool(groups) and getattr(groups[number], key) is not None
            if key in group:
                if of_group or group[key] == optimizer.defaults.get(key):
                    group[key] = value
            elif key == "lr" or (value and (of_group or not beside_muon or key == "weight_decay")):
                where = f"--model.groups: {group['name']}'s" if of_group else "--model."
                way_out = "leave it out" if of_group else f"leave it out, or add --model.{key} null"
                raise UserError(f"{where}{' ' * of_group}{key} {value}: {name} has no {key}; {way_out}")
        if "lr" not in group:
            raise UserError(f"--model.optimizer {name} has no lr in its parameter groups, which schedules need")
        if group.get("nesterov") and group.get("momentum") == 0:
            raise UserError(f"--model.nesterov true needs --model.momentum above 0 for {name}")
    return optimizer


def default_of(made: Any, key: str) -> Any:
    """The default of a class's or function's parameter; `empty` where it must be given, None where there is none."""
    try:
        parameter = inspect.signature(made).parameters.get(key)
    except (TypeError, ValueError):  # of a class written in C
        return None
    return parameter.default if parameter else None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class MuonBeside(torch.optim.Optimizer):
    """Muon for some groups and another optimiser for the others, as one: they share its groups and its state.

    Args:
        muon: dicts of MuonSGD's groups.
        named: the other optimiser.
        order: whether each group is Muon's.
    """

    def __init__(self, muon: list[dict[str, Any]], named: torch.optim.Optimizer, order: Sequence[bool]) -> None:
        self.muon, self.named, self._order = MuonSGD(muon), named, order
        groups = {True: iter(self.muon.param_groups), False: iter(named.param_groups)}
        super().__init__([next(groups[is_muon]) for is_muon in order], {})
        self.state.update(named.state)
        self._share()

    def _share(self) -> None:
        for part, is_muon in ((self.muon, True), (self.named, False)):
            groups = [group for group, its in zip(self.param_groups, self._order, strict=True) if its == is_muon]
            part.__setstate__({"state": self.state, "param_groups": groups})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; the other optimiser calls `closure`, once or several times, for Muon's gradients too."""
        loss = self.named.step(closure)
        self.muon.step()
        return loss


def class_of(make: Any) -> type | None:
    """The class that a callable makes, a partial of it or LightningCLI's; None for other callables."""
    parts = [make.func, *make.args] if isinstance(make, functools.partial) else [make]
    return next((part for part in parts if isinstance(part, type)), None)
