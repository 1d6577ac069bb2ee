"""Classifier, a net as the test uses it, and `load`, which makes one of a checkpoint. Both need no Trainer: module.py
trains."""

import os
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import jsonargparse
import numpy as np
import torch
from torch import Tensor, nn

from lit_cifar import log
from lit_cifar.data.images import pixels_of
from lit_cifar.errors import UserError, calls_chosen
from lit_cifar.files import local_path
from lit_cifar.model import named  # noqa: F401  of which _make_net's parser learns what names mean
from lit_cifar.model.check import shape_lazy_layers
from lit_cifar.run.folder import Run
from lit_cifar.run.read import State, read_checkpoint
from lit_cifar.run.trust import OF_TRAINER, OPTIMISERS, check_trusted, of_person
from lit_cifar.text import printable

TTA = Literal["none", "mirror", "mirror_shift"]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scales images (B, 3, 32, 32) uint8 0..255 to [0, 1] and normalises them by mean and std (3, 1, 1)."""
    return images.to(mean.dtype).sub_(255 * mean).mul_((255 * std).reciprocal())  # in place: 4 times as fast on a CPU


def views(images: Tensor, tta: TTA) -> list[tuple[Tensor, float]]:
    """The views of images (B, 3, 32, 32) whose logits test-time augmentation averages, each with its weight.

    The first view is the images themselves. 'mirror' adds their mirror image; 'mirror_shift' also both of them shifted
    by one pixel down and right, and up and left, with a reflected border. Weights as in cifar10-airbench.
    """
    shifted = []
    if tta == "mirror_shift":
        side = torch.arange(images.shape[2], device=images.device)
        last = len(side) - 1
        for shift in (-1, 1):
            pixels = last - (last - (side + shift).abs()).abs()
            shifted.append(images[:, :, pixels][:, :, :, pixels])
    if tta == "none":
        return [(images, 1.0)]
    own, other = (0.5, 0.0) if tta == "mirror" else (0.25, 0.125)
    return [
        (view, weight)
        for original, weight in [(images, own), *((image, other) for image in shifted)]
        for view in (original, original.flip(3))
    ]


def to_batch(images: Any, name: str = "images") -> Tensor:
    """Images as people have them to (B, 3, 32, 32) uint8 0..255. Other sizes are resized as `predict` does it.

    Args:
        images: a PIL image of any mode; a tensor uint8 (3, H, W) or (B, 3, H, W); a NumPy array uint8 with its 3
            colours, RGB, last or before height and width; or a list or tuple of these, whose sizes may differ.
        name: what they are called in messages.

    Raises:
        UserError: they are none of these, or it cannot be known which axis has the colours.
    """
    from PIL import Image

    if isinstance(images, (list, tuple)):
        if not images:
            raise UserError(f"{name}: the list is empty")
        return torch.cat([to_batch(image, f"{name}[{i}]").cpu() for i, image in enumerate(images)])
    if isinstance(images, Image.Image):
        try:
            return torch.frombuffer(bytearray(pixels_of(images)), dtype=torch.uint8).view(1, 3, 32, 32)
        except UserError as error:
            raise UserError(f"{name}: the image {error}") from error
    if not isinstance(images, (Tensor, np.ndarray)):
        raise UserError(
            f"{name}: {type(images).__name__} is no image; give a PIL image, such as PIL.Image.open(PATH), a uint8 "
            "array (H, W, 3) or tensor (B, 3, H, W), or a list of them"
        )
    dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
    axes = [axis for axis in ((-3,) if isinstance(images, Tensor) else (-3, -1)) if shape[axis:][:1] == (3,)]
    if dtype != "uint8" or len(shape) not in (3, 4) or len(axes) != 1 or 0 in shape[-3:]:
        if "float" in dtype:
            hint = "; the net scales and normalises itself, and (255 * images).round() undoes a scaling to [0, 1]"
        elif dtype != "uint8":
            hint = "; scale other values to these first"
        elif len(axes) == 2:
            hint = "; which axis has the colours cannot be known: give a tensor"
        else:
            hint = ", RGB; the colours are the first axis of a tensor's image, and PIL images may have others"
        raise UserError(
            f"{name}: {dtype} {shape} given; want torch.uint8 (B, 3, 32, 32), or other sizes, 0 to 255{hint}"
        )
    batch = (images if isinstance(images, Tensor) else torch.from_numpy(images.copy())).movedim(axes[0], -3)
    batch = batch if batch.ndim == 4 else batch[None]
    if batch.shape[2:] == (32, 32):
        return batch
    return to_batch([Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in batch], name)


class Classifier(nn.Module):
    """A net as LitClassifier's test uses it, without the Trainer; weights have the same names as LitClassifier's.

    Args:
        net: maps normalised images (B, 3, 32, 32) to logits (B, K).
        mean: subtracted from pixels scaled to [0, 1], (3, 1, 1).
        std: then divides them, (3, 1, 1).
        tta: test-time augmentation, whose views' logits are averaged.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor, tta: TTA = "none") -> None:
        super().__init__()
        self.net = net
        self.tta: TTA = tta
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @calls_chosen("on images")
    def forward(self, images: Any) -> Tensor:
        """Maps images (B, 3, 32, 32) uint8 0..255 to logits (B, K): scales, normalises, applies the net to all views.

        Args:
            images: on any device; or what `to_batch` makes such images of.

        Raises:
            UserError: they are neither, such as images that were scaled before.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.shape[1:] != (3, 32, 32):
            images = to_batch(images)
        if images.device != self.mean.device:
            images = images.to(self.mean.device)
        logits: Tensor = sum(
            self.net(normalise(view, self.mean, self.std)) * weight for view, weight in views(images, self.tta)
        )
        return logits


def check_weights(module: nn.Module, net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Checks that a checkpoint's `weights` have the names and shapes of those of `module`, which holds `net`.

    Raises:
        UserError: they are another net's.
    """
    theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
    ours = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"the checkpoint does not fit {type(net).__name__}: {printable(name)} is {theirs.get(name, 'missing')} "
                f"in the file and {ours.get(name, 'missing')} in the net; name the file's net with --model.net"
            )


def check_classes(checkpoint: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Checks that a checkpoint's classes are the data's `classes`; where either are not known it has no objection.

    Names are compared in Unicode's NFC, which those of older checkpoints need not be in.

    Raises:
        UserError: they are others.
    """
    trained_on, classes = _in_nfc(checkpoint.get("lit_cifar", {}).get("classes", ())), _in_nfc(classes)
    if trained_on and classes and trained_on != classes:
        if sorted(trained_on) == sorted(classes):
            raise UserError(
                f"the checkpoint's classes ({_listed(trained_on)}) stand in another order than the data's "
                f"({_listed(classes)}): use the data it was trained on, or train anew"
            )
        raise UserError(
            f"the checkpoint's classes ({_listed(trained_on)}) are not the data's ({_listed(classes)}): "
            "use the data it was trained on"
        )


def _in_nfc(names: Collection[str]) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", name) for name in names)


def _listed(classes: tuple[str, ...]) -> str:
    shown = ", ".join(map(printable, classes[:12]))
    return shown if len(classes) <= 12 else f"{shown}, ...: {len(classes)} in all"


class Classes(tuple[str, ...]):
    """Names of the K classes, which a tensor of indices turns into a list of names."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor) and index.ndim > 0:
            return [self[i] for i in index.tolist()]
        return super().__getitem__(index)


def load(
    path: str | os.PathLike[str], tta: TTA | None = None, trust: bool = False, net: nn.Module | None = None
) -> tuple[Classifier, Classes]:
    """The net of a checkpoint, in eval mode on the CPU, and the names of its classes.

        net, classes = load("last.ckpt")
        classes[net(images).argmax(1)]  # images (B, 3, 32, 32) uint8 0..255, or PIL images; a list of B names

    The net scales, normalises and augments as the run's test did, so that it has the accuracy that the test reported.

    Args:
        path: a checkpoint of lit_cifar.fit, or of LitClassifier in any Trainer; nothing else of the run is needed. Or
            a net that lit_cifar.export wrote as .safetensors, or the name of one that comes with the package, such as
            "speedrun94"; a file of that name is preferred.
        tta: test-time augmentation in place of the run's: 'none', 'mirror' or 'mirror_shift'.
        trust: make the net also where its class is of a package that is not trusted by itself, such as your own.
        net: takes the weights in place of the net that the checkpoint names, for one that names none.

    Raises:
        UserError: there is no such augmentation; the file is no checkpoint of lit_cifar; its net is of a package that
            is not trusted, cannot be made or does not fit the weights.
    """
    if tta not in (None, *get_args(TTA)):
        raise UserError(f"there is no test-time augmentation {tta!r}; choose one of {', '.join(get_args(TTA))}")
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"load takes the path of a checkpoint, not a {type(path).__name__}; write it to a file first")
    state = read_checkpoint(local_path(path, "the checkpoint"))
    settings = state.config.get("model", {})
    tta = tta or settings.get("tta", "none")
    if tta not in get_args(TTA):
        raise UserError(f"{path} has an unknown test-time augmentation, {tta!r}; choose one")
    # without what a subclass of LitClassifier has beside the net; torch.compile's wrapper adds to names
    weights = {
        name.replace("net._orig_mod.", "net.", 1): weight
        for name, weight in state.weights.items()
        if name in ("mean", "std") or name.startswith("net.")
    }
    if net is None:
        if not settings.get("net"):
            raise UserError(f"{path} does not say which net it holds; in Python, load(path, net=...) takes one")
        if not trust:
            check_trusted(settings["net"])
            check_net(settings["net"], weights)
        net = _make_net(settings["net"])
    elif not isinstance(net, nn.Module):
        raise UserError(f"net is a {type(net).__name__}; give a torch.nn.Module, such as Net()")
    else:
        net = getattr(net, "_orig_mod", net)
        shape_lazy_layers(net)
    classifier = _fitting(net, tta, weights)
    classifier.load_state_dict(weights)
    return classifier.eval().cpu(), Classes(state.classes)


def check_net(settings: Any, weights: dict[str, Tensor]) -> None:
    """Checks that a checkpoint's weights are those of the net in its config, which may name one of any size.

    The net is made without memory, on the device `meta`.

    Raises:
        UserError: it cannot be made, or the weights are another one's.
    """
    with torch.device("meta"):
        _fitting(_make_net(settings), "none", weights)


def checked_config(state: State, settings: Any, wanted: Mapping[str, Collection[str] | None]) -> dict[str, Any]:
    """What a state's config decides, once it is seen to be harmless.

    In the folder of its own run it decides all that is wanted, for the run goes on as it was begun. A file elsewhere
    may be a stranger's: what is up to the person at the keyboard is left out, and said.

    Args:
        state: whose config it is.
        settings: those of the command, `trust` among them.
        wanted: the keys that the command asks for, by section; None: all.

    Raises:
        UserError: it names classes of packages that are not trusted, or the weights are not those of the net.
    """
    own = Run.of(state.path, state.identity) is not None
    config: dict[str, Any] = {}
    left: list[str] = []
    for section, keys in wanted.items():
        value = state.config.get(section)
        if isinstance(value, dict):
            theirs = {key: inner for key, inner in value.items() if keys is None or key in keys}
            value = {key: inner for key, inner in theirs.items() if own or not of_person(section, key)}
            for key in theirs.keys() - value.keys():
                flag = f"{section}.{key}"
                if flag in settings and settings[flag] != theirs[key]:
                    left.append(f"--{flag}")
        if section in state.config:
            config[section] = value
    if not settings.trust:
        check_trusted({section: value for section, value in config.items() if section != "trainer"})
        check_trusted(config.get("trainer"), OPTIMISERS + OF_TRAINER)
        if "net" in config.get("model", {}):
            check_net(config["model"]["net"], state.weights)
    if left and log.rank() == 0:
        path = printable(str(state.path))
        flags = ", ".join(sorted(left))
        log.tell(f"{path} lies outside its run's folder; of its settings these are left to you: {flags}")
    return config


def _fitting(net: nn.Module, tta: TTA, weights: dict[str, Tensor]) -> Classifier:
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
        raise UserError(f"the checkpoint's net cannot be made: {printable(' '.join(str(error).split()))}") from error
    if not isinstance(net, nn.Module):
        raise UserError("the checkpoint names no net")
    shape_lazy_layers(net)
    return net
