"""What a file from a stranger decides: which settings, and which classes it may name; how large and deep its text may
be. read.py reads checkpoints."""

import functools
import importlib
import inspect
import itertools
import re
from typing import Any

import torch
import yaml

from lit_cifar.errors import UserError
from lit_cifar.text import printable

# A checkpoint's config may name what these define without being asked. torchvision's data sets download.
TRUSTED = ("lit_cifar.nets.", "torch.nn.", "torchvision.models.", "torchvision.ops.", "torchvision.transforms.")
# Of these it may name the classes that they list, and nothing that they import; Lightning's only for the Trainer, since
# a net has no use for what writes files and asks hosts.
OPTIMISERS = ("torch.optim", "torch.optim.lr_scheduler", "torch.optim.swa_utils")
OF_LIGHTNING_CLI = "lightning.pytorch.cli.ReduceLROnPlateau"  # torch's, with what it follows
OF_TRAINER = tuple(
    f"lightning.pytorch.{name}"
    for name in ("callbacks", "loggers", "profilers", "strategies", "plugins", "plugins.environments")
)
MAX_CONFIG_VALUES, MAX_CONFIG_TEXT = 100_000, 10_000  # how many, and how many characters of each
MAX_CONFIG_DEPTH, MAX_CONFIG_BITS = 50, 10_000  # of lists and dicts within each other, of an integer
MAX_YAML = 10**6  # characters; a recipe has some hundreds, and a million take a second to read
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is faster, and not everywhere
IMPORTABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
TEXTS = {  # settings whose dots mean something else
    *("data_dir", "default_root_dir", "mirrors", "name", "pattern"),
    *("dirpath", "entity", "experiment_name", "filename", "group", "project", "run_name", "save_dir", "tracking_uri"),
    *("version", "workspace"),
}

# The Trainer's settings that say what is trained. The others say where files are written, which hosts are asked, on
# which devices it trains, and what is made for that.
TRAINING = {
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "overfit_batches"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("precision", "deterministic", "sync_batchnorm"),
}
OF_MACHINE = {"data": {"data_dir", "mirrors", "num_workers"}, "model": {"compile"}}


def of_person(section: str, key: str) -> bool:
    """Whether a setting is up to the person at the keyboard, or to a run of theirs in its own folder."""
    return key in OF_MACHINE.get(section, ()) or (section == "trainer" and key not in TRAINING)


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
        if num_values > MAX_CONFIG_VALUES or depth > MAX_CONFIG_DEPTH:
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
        elif isinstance(value, int):
            if value.bit_length() > MAX_CONFIG_BITS:  # Python itself prints no more than some 14,000
                return False
        elif not isinstance(value, (float, type(None))):
            return False
    return True


def check_yaml(text: str) -> None:
    """Checks that a YAML text is of a sane size once its aliases are followed, which YAML's own readers do not.

    Raises:
        yaml.YAMLError: it is too large or too deep, refers to itself, or is no YAML.
    """
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"it has more than {MAX_YAML:,} characters")
    num_values = 0
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and number of values before it
    sizes: dict[str | None, int] = {}  # in values, by anchor
    for event in yaml.parse(text, Loader=YAML_LOADER):
        num_values += isinstance(event, yaml.NodeEvent)
        if isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MAX_CONFIG_TEXT:
                raise yaml.YAMLError(f"a value in it has more than {MAX_CONFIG_TEXT:,} characters")
            sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_nodes):
                raise yaml.YAMLError(f"*{printable(str(event.anchor))} in it is a part of itself")
            num_values += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, num_values - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = num_values - before
        if num_values > MAX_CONFIG_VALUES or len(open_nodes) > MAX_CONFIG_DEPTH:
            raise yaml.YAMLError(
                f"it has more than {MAX_CONFIG_VALUES:,} values with its aliases, or {MAX_CONFIG_DEPTH} levels"
            )


def load_yaml(text: str) -> Any:
    """What a YAML text holds: lists, dicts, texts, numbers, truth values and nothing else.

    Raises:
        yaml.YAMLError: it is no YAML, holds something else, or is too large or too deep.
    """
    check_yaml(text)
    try:
        value = yaml.load(text, Loader=YAML_LOADER)
    except (ValueError, RecursionError, OverflowError) as error:  # of dates and numbers that are none
        raise yaml.YAMLError(str(error)) from None
    if not is_plain(value):
        raise yaml.YAMLError("it holds more than lists, maps, texts, numbers and truth values")
    return value


def check_trusted(config: Any, listed: tuple[str, ...] = OPTIMISERS) -> None:
    """Checks that a checkpoint's config, or a part of it, names only classes that may be made without asking.

    Args:
        listed: the modules whose listed classes are among them.

    Raises:
        UserError: it names one from another package; making that may run code of whoever wrote the file.
    """
    for class_path in _class_paths(config):
        if class_path not in _classes_of(listed) and not _is_trusted(class_path):
            raise UserError(
                f"the checkpoint names the class {printable(class_path)}, which runs code of that package: "
                "add --trust true if you trust the file"
            )


@functools.cache
def _classes_of(modules: tuple[str, ...]) -> frozenset[str]:
    """The classes that modules list, each by its names in the listing and in the packages around its definition."""
    names = {OF_LIGHTNING_CLI}
    for module in map(importlib.import_module, modules):
        for name in getattr(module, "__all__", vars(module)):  # the one without __all__ holds nothing but its classes
            if inspect.isclass(found := getattr(module, name)):
                packages = itertools.accumulate(found.__module__.split("."), "{}.{}".format)
                names |= {f"{package}.{name}" for package in (module.__name__, *packages)}
    return frozenset(names)


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
        meant = load_yaml(value)  # as jsonargparse does: the text may be that of a dict with a class_path
    except yaml.YAMLError:
        return [value]  # no setting of ours, and no YAML
    return _class_paths(meant, key) if meant != value else []
