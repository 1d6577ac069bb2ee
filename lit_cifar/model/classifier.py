"""`load`: a trained net out of a checkpoint, for use without the Trainer. Training is not here, and no command."""

import os
from collections.abc import Collection
from typing import Any, get_args

import jsonargparse
import torch
from torch import Tensor, nn

from lit_cifar.errors import UserError
from lit_cifar.files import local_path
from lit_cifar.model.module import TTA, Classifier, check_weights
from lit_cifar.run.read import State, read_checkpoint
from lit_cifar.run.trust import check_trusted

SECTIONS = ("seed_everything", "trainer", "model", "data", "checkpoint", "running_loss")  # of a config


class Classes(tuple[str, ...]):
    """Names of the K classes, which a tensor of indices turns into a list of names."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor) and index.ndim > 0:
            return [self[i] for i in index.tolist()]
        return super().__getitem__(index)


def load(path: str | os.PathLike[str], tta: TTA | None = None, trust: bool = False) -> tuple[Classifier, Classes]:
    """The net of a checkpoint, in eval mode on the CPU, and the names of its classes.

        net, classes = load("last.ckpt")
        classes[net(images).argmax(1)]  # images (B, 3, 32, 32) uint8 0..255; a list of B names

    The net scales, normalises and augments as the run's test did, so that it has the accuracy that the test reported.

    Args:
        path: a checkpoint that lit_cifar.fit wrote; nothing else of the run is needed.
        tta: test-time augmentation in place of the run's: 'none', 'mirror' or 'mirror_shift'.
        trust: make the net also where its class is of a package that is not trusted by itself, such as your own.

    Raises:
        UserError: there is no such augmentation; the file is no checkpoint of lit_cifar; its net is of a package that
            is not trusted, cannot be made or does not fit the weights.
    """
    if tta not in (None, *get_args(TTA)):
        raise UserError(f"there is no test-time augmentation {tta!r}; choose one of {', '.join(get_args(TTA))}")
    state = read_checkpoint(local_path(path, "the checkpoint"))
    settings = state.config.get("model")
    if not settings or "net" not in settings:
        raise UserError(f"{path} does not say which net it holds: no command of lit_cifar wrote it")
    if not trust:
        check_trusted(settings["net"])
    weights = state.weights
    tta = tta or settings.get("tta", "none")
    if tta not in get_args(TTA):
        raise UserError(f"{path} has an unknown test-time augmentation, {tta!r}; choose one")
    if not trust:
        check_net(settings["net"], weights)
    classifier = _make_classifier(settings["net"], tta, weights)
    classifier.load_state_dict(weights)
    return classifier.eval(), Classes(state.classes)


def check_net(settings: Any, weights: dict[str, Tensor]) -> None:
    """Checks that a checkpoint's weights are those of the net in its config, which may name one of any size.

    The net is made without memory, on the device `meta`.

    Raises:
        UserError: it cannot be made, or the weights are another one's.
    """
    with torch.device("meta"):
        _make_classifier(settings, "none", weights)


def checked_config(state: State, trust: bool, sections: Collection[str] = SECTIONS) -> dict[str, Any]:
    """The sections of a state's config that are asked for, once they are seen to be harmless.

    Raises:
        UserError: they name classes of packages that are not trusted, or the weights are not those of the net.
    """
    config = {section: value for section, value in state.config.items() if section in sections}
    if not trust:
        check_trusted(config)
        if "net" in config.get("model", {}):
            check_net(config["model"]["net"], state.weights)
    return config


def _make_classifier(settings: Any, tta: TTA, weights: dict[str, Tensor]) -> Classifier:
    net = _make_net(settings)
    classifier = Classifier(net, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), tta)
    check_weights(classifier, net, weights)
    return classifier


def _make_net(settings: dict[str, Any]) -> nn.Module:
    """The net of a config's class_path and init_args, whatever is nested in them, as LightningCLI makes it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--net", type=nn.Module)
    try:
        net: nn.Module = parser.instantiate(parser.parse_object({"net": settings})).net
    except Exception as error:  # classes raise anything on arguments that are not for them
        raise UserError(f"the checkpoint's net cannot be made: {' '.join(str(error).split())}") from error
    if not isinstance(net, nn.Module):
        raise UserError("the checkpoint names no net")
    return net
