"""Nets and modules as settings name them: how many outputs a net gets, and which class takes LitClassifier's place.
model/named.py says what a name means."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from torch import nn

from lit_cifar.errors import UserError
from lit_cifar.model.module import LitClassifier
from lit_cifar.model.named import NUM_CLASSES, import_named, parameters, takes_anything
from lit_cifar.text import printable

DEFAULT_NET, DEFAULT_NUM_CLASSES = "lit_cifar.nets.Net", 10


def flat(args: list[str]) -> list[str]:
    """A command line whose module is named, and its arguments given, as everywhere here: LightningCLI's subclass mode
    has --model.class_path and --model.init_args.lr."""
    args = [re.sub(r"^--model\.class_path(?==|$)", "--model_class", arg) for arg in args]
    return [re.sub(r"^--model\.init_args\.", "--model.", arg) for arg in args]


def set_num_classes(net: Any, count: Callable[[], int]) -> None:
    """Gives a net as many outputs as the data has classes, where its settings leave their number as it is by default.

    Args:
        net: its settings.
        count: counts the classes, which may take a download.

    Raises:
        UserError: the net was made already, or is to have less than one output.
    """
    if isinstance(net, nn.Module):
        raise UserError("--model.net names a net that was made already: name its class, or a function that makes one")
    named, name = import_named(net["class_path"]), NUM_CLASSES[0]
    known, given = parameters(named), net.get("init_args") or Namespace()
    net["init_args"] = given
    # a net named in place of the default one inherits the default one's value for what both take
    untouched = name in known and given.get(name) in (known[name], DEFAULT_NUM_CLASSES)
    if name not in known and takes_anything(named):
        given = net["dict_kwargs"] = net.get("dict_kwargs") or {}
        untouched = not {*known, *given}.intersection(NUM_CLASSES)
    if untouched:
        given[name] = count()
    if isinstance(given.get(name), int) and given[name] < 1:
        raise UserError(f"--model.net.{name} {given[name]} is out of range: choose 1 or more")


def find_module_class(name: str) -> type[LitClassifier]:
    """The class that --model names.

    Raises:
        UserError: there is none of this name, or it cannot take LitClassifier's place.
    """
    shown = f"--model {printable(name)}"
    if name.endswith((".yaml", ".yml")):
        raise UserError(f"{shown}: it takes a class, named as package.Class; settings in a file go to --config")
    try:
        found = import_named(name)
    except (ImportError, AttributeError, ValueError) as error:
        reason = "name it as package.Class" if "." not in name else printable(" ".join(str(error).split()))
        raise UserError(f"{shown} cannot be imported: {reason}") from error
    is_class = inspect.isclass(found)
    if not (is_class and issubclass(found, LitClassifier)):
        way_out = "name a net with --model.net"
        if is_class and issubclass(found, LightningModule):
            way_out = "train it on CIFAR10DataModule in a plain Trainer, see docs/in-your-own-code.md"
        raise UserError(f"{shown} is no subclass of lit_cifar.LitClassifier: {way_out}")
    if "net" not in parameters(found):
        raise UserError(f"{shown} takes no net: give its __init__ a parameter net, or **settings for super().__init__")
    return found
