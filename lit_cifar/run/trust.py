"""Which classes a file from a stranger may name. read.py reads such files."""

import importlib
import inspect
import re
from typing import Any

import torch
import yaml

from lit_cifar.errors import UserError
from lit_cifar.text import printable

# A checkpoint's config may name what these define without being asked. torchvision's data sets download.
TRUSTED = ("lit_cifar.nets.", "torch.nn.", "torchvision.models.", "torchvision.ops.", "torchvision.transforms.")
MAX_CONFIG_VALUES, MAX_CONFIG_TEXT = 100_000, 10_000  # how many, and how many characters of each
IMPORTABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
TEXTS = ("data_dir", "default_root_dir", "mirrors", "name", "pattern")  # settings whose dots mean something else


def is_plain(value: Any, more: tuple[type, ...] = ()) -> bool:
    """Whether it is what YAML could hold, a tree and of a sane size: no references to itself, nor a million to one.

    Args:
        more: what it may hold besides, tuples or tensors.
    """
    values = [(value, 0)]
    num_values = 0
    while values:
        value, depth = values.pop()
        num_values += 1
        if num_values > MAX_CONFIG_VALUES or depth > 50:
            return False
        if isinstance(value, dict):
            values += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list) or (isinstance(value, tuple) and tuple in more):
            values += [(inner, depth + 1) for inner in value]
        elif isinstance(value, torch.Tensor) and torch.Tensor in more:
            # one stored number may pose as the weights of any size
            if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                return False
        elif isinstance(value, str):
            if len(value) > MAX_CONFIG_TEXT:
                return False
        elif not isinstance(value, (int, float, type(None))):
            return False
    return True


def check_trusted(config: Any) -> None:
    """Checks that a checkpoint's config, or a part of it, names only classes that may be made without asking.

    Raises:
        UserError: it names one from another package; making that may run code of whoever wrote the file.
    """
    for class_path in _class_paths(config):
        if not _is_trusted(class_path):
            raise UserError(
                f"the checkpoint names the class {printable(class_path)}, which runs code of that package: "
                "add --trust true (in Python: trust=True) if you trust the file"
            )


def _is_trusted(class_path: str) -> bool:
    """Whether it names a class or a function that a trusted package defines itself; UserError if it names nothing.

    The name alone shows nothing: `torch.nn.parallel.distributed.os.mkdir` is reached through a module's own imports.
    """
    if not (class_path.startswith(TRUSTED) and IMPORTABLE.fullmatch(class_path)):
        return False
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    if found is None:
        raise UserError(
            f"the checkpoint names the class {class_path}, which cannot be made: there is no {class_path} in this "
            "version"
        )
    return (inspect.isclass(found) or inspect.isfunction(found)) and f"{found.__module__}.".startswith(TRUSTED)


def _class_paths(value: Any, key: str = "") -> list[str]:
    """Everything in a config that jsonargparse would import: not only after class_path, it takes a bare string too."""
    if isinstance(value, dict):
        return [path for key, inner in value.items() for path in _class_paths(inner, key)]
    if isinstance(value, list):
        return [path for inner in value for path in _class_paths(inner, key)]
    if not isinstance(value, str):
        return []
    if key == "class_path" or (IMPORTABLE.fullmatch(value) and key not in TEXTS):
        return [value]
    if key in TEXTS:
        return []
    try:
        meant = yaml.safe_load(value)  # as jsonargparse does: the text may be that of a dict with a class_path
    except (yaml.YAMLError, ValueError, RecursionError):
        return [value]  # no setting of ours, and no YAML
    if not is_plain(meant):
        return [value]
    return _class_paths(meant, key) if meant != value else []
