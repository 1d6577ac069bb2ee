"""Whether a state of a training, once read, is one that this training could have saved. read.py reads it."""

import copy
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

from lit_cifar.errors import UserError
from lit_cifar.run.write import plain

POSITION = {"epoch": 0, "batch": 0}  # in the data


def check_state(checkpoint: dict[str, Any], trainer: Trainer, module: LightningModule) -> None:
    """Checks that a checkpoint's state of the training is one that this training could have saved.

    Lightning and torch take what they find, and the training fails of it later.

    Args:
        checkpoint: from `read_checkpoint`.
        trainer: with the data module.
        module: with the trainer.

    Raises:
        UserError: the file is spoilt, or from another version or kind of training.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is made and tried here
            fit_loop, scaler = checkpoint["loops"]["fit_loop"], trainer.precision_plugin.state_dict()
            batches = fit_loop["epoch_loop.batch_progress"]
            if batches["is_last_batch"] and not fit_loop["state_dict"]:  # saved after a test: Lightning leaves it out
                epoch = fit_loop["epoch_progress"]["current"]["ready"] - 1
                fit_loop["state_dict"] = {"combined_loader": [{"epoch": epoch, "batch": batches["current"]["ready"]}]}
            loops = {**_common(trainer.fit_loop.state_dict(), fit_loop), "state_dict": {"combined_loader": [POSITION]}}
            wrong = first_mismatch(fit_loop, loops, "loops.fit_loop")
            wrong = wrong or _wrong_in_optimizer(checkpoint, callbacks, module)
            for name in (type(trainer.precision_plugin).__qualname__, "native_amp_scaling_state"):
                if scaler and name in checkpoint:
                    wrong = wrong or first_mismatch(checkpoint[name], scaler, name)
            for callback in callbacks:
                wrong = wrong or _wrong_in_callback(checkpoint, callback, module)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = f"its structure ({type(error).__name__})"
    if wrong:
        raise UserError(
            f"--resume: the checkpoint's state of the training is spoilt, or another version's or another kind of "
            f"training's: see {wrong}; name another checkpoint, or start anew without --resume"
        )


def _wrong_in_optimizer(checkpoint: dict[str, Any], callbacks: list[Callback], module: LightningModule) -> str | None:
    """What is wrong with the states of the optimiser and of the schedule of its learning rate."""
    states, schedulers = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    if not all(isinstance(state, dict) for state in [*states, *schedulers]):
        return "optimizer_states"
    if any(isinstance(callback, BaseFinetuning) for callback in callbacks):
        return None  # it has weights and groups that come and go
    if not getattr(module, "has_own_optimizer", True):
        return None  # a subclass makes it, of whatever it likes
    configured: Any = module.configure_optimizers()
    kinds: list[Any] = []  # of schedulers whose states may stand there
    optimizer = configured
    if isinstance(configured, dict):
        optimizer, kinds = configured["optimizer"], [configured["lr_scheduler"]["scheduler"]]
    (state,) = states
    wrong = None
    for own, group in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
        # callbacks leave numbers of theirs in a group, such as the rate that weight averaging ends with
        known = {key: value for key, value in group.items() if key in own or not isinstance(value, (int, float, str))}
        own = {key: float(value) if type(value) is int else value for key, value in own.items()}  # lr=1 was meant so
        wrong = wrong or first_mismatch(known, _common(own, group), "param_groups")
        for key in {"dampening", "maximize", "differentiable", "foreach"} & own.keys() & group.keys():
            wrong = wrong or (None if group[key] == own[key] else f"param_groups.{key}")  # no settings of ours
    averages = [checkpoint["callbacks"].get(callback.state_key) for callback in callbacks if _averages(callback)]
    kinds.append(LambdaLR(optimizer, lambda step: 1.0))
    if averages:
        kinds.append(SWALR(optimizer, swa_lr=0.1))  # which the callback puts in the place of our own
    schedulers = [*schedulers, *(state["scheduler_state"] for state in averages if state and state["scheduler_state"])]
    for found in schedulers:
        if not any(_goes_on(kind, found) for kind in kinds):
            wrong = wrong or "lr_schedulers"
    return wrong or _wrong_in_steps(optimizer, state)


def _goes_on(schedule: Any, state: dict[str, Any]) -> bool:
    """Whether a scheduler, which is spent by that, takes a state and goes on."""
    try:
        if plain(schedule.state_dict()).keys() != state.keys():
            return False
        schedule.load_state_dict(copy.deepcopy(state))
        for group in schedule.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        schedule.step(*([0.0] if isinstance(schedule, ReduceLROnPlateau) else []))
    except ValueError as error:
        return "total steps" in str(error)  # at its end
    except Exception:  # anything, of a state that is not its own
        return False
    return True


def _wrong_in_steps(optimizer: Any, state: dict[str, Any]) -> str | None:
    """What is wrong with what an optimiser keeps for each weight. Momentum's shapes tell; other optimisers take a step
    with it, on copies of the weights, and are spent by that."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if type(optimizer).__name__ in ("SGD", "MuonSGD"):
        buffers = {number: {"momentum_buffer": weight} for number, weight in enumerate(weights)}
        return first_mismatch(state["state"], _common(buffers, state["state"]), "optimizer_states.state")
    try:
        for group in optimizer.param_groups:
            group["params"][:] = [weight.detach().clone() for weight in group["params"]]
            for copied in group["params"]:
                copied.grad = torch.zeros_like(copied)
        optimizer.load_state_dict(copy.deepcopy(state))
        optimizer.step(lambda: torch.tensor(0.0))
    except Exception as error:  # anything, of a state that is not its own
        return f"optimizer_states.state ({type(error).__name__})"
    return None


def _averages(callback: Callback) -> bool:
    return isinstance(callback, StochasticWeightAveraging)


def _wrong_in_callback(checkpoint: dict[str, Any], callback: Callback, module: LightningModule) -> str | None:
    """What is wrong with the state of one of Lightning's own callbacks."""
    if not type(callback).__module__.startswith("lightning."):
        return None
    where, weights = f"callbacks.{callback.state_key}", module.state_dict()
    if isinstance(callback, WeightAveraging) and "current_model_state" in checkpoint:
        wrong = first_mismatch(checkpoint["current_model_state"], weights, "current_model_state")
        wrong = wrong or first_mismatch(checkpoint["averaging_state"], {"n_averaged": torch.tensor(0)}, where)
        if wrong:
            return wrong
    state = checkpoint.get("callbacks", {}).get(callback.state_key)
    if not state:
        return None
    if _averages(callback) and (wrong := first_mismatch(state["average_model_state"], weights, where)):
        return wrong
    try:
        copy.copy(callback).load_state_dict(copy.deepcopy(state))
    except Exception as error:  # anything, of a state that is not its own
        return f"{where} ({type(error).__name__})"
    own = callback.state_dict()
    return next(filter(None, (_other_kind(state[key], own[key], where) for key in own.keys() & state.keys())), None)


def _other_kind(found: Any, own: Any, where: str) -> str | None:
    """Where a value is of another kind than one that a callback begins with; None begins anything."""
    if isinstance(own, torch.Tensor):
        return first_mismatch(found, own, where)
    kinds = (int, float) if isinstance(own, (int, float)) else type(own)
    return None if own is None or isinstance(found, kinds) else where


def _common(own: dict[Any, Any], found: dict[Any, Any]) -> dict[Any, Any]:
    """Our own values of those keys that were found: another version of Lightning or torch may have counted less."""
    return {key: value for key, value in own.items() if key in found}


def first_mismatch(found: Any, expected: Any, where: str = "") -> str | None:
    """The first place in what was found whose keys, length, shape or type are not those expected; None: nowhere."""
    pairs: list[tuple[Any, Any, str]] = []
    if isinstance(expected, dict):
        fits = isinstance(found, dict) and found.keys() == expected.keys()
        pairs = [(found[key], expected[key], f"{where}.{key}") for key in expected] if fits else []
    elif isinstance(expected, list):
        fits = isinstance(found, list) and len(found) == len(expected)
        pairs = [(*pair, where) for pair in zip(found, expected, strict=True)] if fits else []
    elif isinstance(expected, torch.Tensor):
        fits = isinstance(found, torch.Tensor) and found.shape == expected.shape
        fits = fits and found.is_floating_point() == expected.is_floating_point()
    elif type(expected) is int:  # a count
        fits = type(found) is int and 0 <= found < 2**63
    elif type(expected) is float:
        fits = type(found) in (int, float)
    else:
        fits = type(found) is type(expected)
    if not fits:
        return where or "it"
    return next(filter(None, (first_mismatch(*pair) for pair in pairs)), None)
