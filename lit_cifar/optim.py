"""The step size as a pure function of the step, and the optimiser it drives. Nets' classes are not known here."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "onecycle"]


def lr_factor(step: int, num_steps: int, schedule: Schedule = "constant", warmup: float = 0.0) -> float:
    """The factor on the base learning rate at optimiser step `step` of `num_steps`, 0 <= step.

    Args:
        step: number of steps already taken; beyond the end the last step's factor stays.
        num_steps: length of the whole training, at least 1.
        schedule: 'constant' stays at 1; 'cosine' falls from 1 to 0 along half a cosine (arXiv 1608.03983);
            'onecycle' rises along half a cosine from 1/25 to 1 and falls to 1/250,000 (arXiv 1708.07120, with the
            shape and numbers of torch.optim.lr_scheduler.OneCycleLR).
        warmup: share of the training, 0 to 1, in which the factor rises: linearly for 'constant' and 'cosine', as the
            first part of the cycle for 'onecycle'.
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
    if schedule == "constant":
        return 1.0
    return _half_cosine(1.0, 0.0, (step - num_warmup) / max(num_steps - num_warmup, 1))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))
