"""The parsers: short flags beside dotted ones, and errors in one line. help.py prints --help, configs.py finds the file
of --config, command.py makes objects of what was parsed."""

import argparse
import os
import re
import warnings
from collections.abc import Sequence
from enum import Enum
from types import UnionType
from typing import IO, Any, NoReturn, Union, get_args, get_origin

import torch
import yaml
from jsonargparse import Namespace, _loaders_dumpers, _paths
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from jsonargparse._typehints import ActionTypeHint
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from lit_cifar.cli.configs import with_class
from lit_cifar.cli.wording import gist, habit, in_words, plain
from lit_cifar.errors import FlagParser, UserError, calls_chosen, unknown_flag
from lit_cifar.files import local_path
from lit_cifar.model.classifier import TTA
from lit_cifar.model.optim import OPTIONS
from lit_cifar.run.trust import check_yaml
from lit_cifar.text import escaped, nearest

# short flag: (dotted twin, help)
SHORT_FLAGS = {
    "data_dir": (
        "data.data_dir",
        "folder, image tree or archive with the images; a missing dataset is downloaded into it",
    ),
    "dataset": ("data.dataset", "cifar10, cifar100, or shapes: embedded, no download"),
    "batch_size": ("data.batch_size", "images of one optimiser step, shared by all devices"),
    "lr": ("model.lr", "learning rate; None: 0.001, or that of --model.optimizer"),
    "model": ("model_class", "class to train in place of LitClassifier, a subclass: package.Class"),
    "compile": ("model.compile", "compile the net: true or false"),
    "max_epochs": ("trainer.max_epochs", "passes over the training images"),
    "devices": ("trainer.devices", "number of devices on each node, or 'auto'"),
    "num_nodes": ("trainer.num_nodes", "number of nodes"),
    "accelerator": ("trainer.accelerator", "cpu, gpu, mps, or auto"),
    "strategy": ("trainer.strategy", "how several devices share the work, ddp by default"),
    "precision": ("trainer.precision", "number format, e.g. 32-true, bf16-mixed, 16-mixed"),
    "seed": ("seed_everything", "seed of everything random"),
}

PATHS = {"data_dir", "default_root_dir", "resume", "ckpt_path", "output", "study", "storage"}  # settings that are paths
NET = "the checkpoint, or the name of the net that comes with lit_cifar, speedrun94"
TRUST = "true: make classes that the checkpoint names, of any package"
LOST = "Unable to serialize instance "  # what jsonargparse writes in place of a default that is no plain value

# such as the interval of Lightning's Timer, which is a default and no text
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))

MAX_LINE = 2000  # characters of a message; it may quote a setting


class YAMLLoader(get_yaml_default_loader()):  # type: ignore[misc]
    """Reads what jsonargparse reads, files, values and texts within them, if it is of a sane size."""

    def __init__(self, text: str) -> None:
        check_yaml(text)
        super().__init__(text)


# jsonargparse's only place for all of these: set_loader, which is public, misses lists' texts (4.53)
_loaders_dumpers.yaml_default_loader = YAMLLoader  # type: ignore[assignment]


def _open(path: str, mode: str = "r") -> IO[Any]:
    return open(path, mode, encoding=None if "b" in mode else "utf-8")


# jsonargparse reads files as the system encodes text (4.53), which on Windows is not how they are written here
_paths.open = _open  # type: ignore[attr-defined]
register_type(torch.device, str, torch.device, fail_already_registered=False)  # a default of Lightning's callbacks


class Parser(LightningArgumentParser):
    """LightningCLI's parser with short flags beside the dotted ones, and errors as UserError."""

    typed: Sequence[str] = ()  # the command line, for messages
    _is_lenient = False
    of_command: tuple[str, ...] = ()  # flags that say what to do this once, and are no part of the config

    def __init__(self, **settings: Any) -> None:
        if "prog" not in settings:  # one that jsonargparse makes, for the help on a class
            settings["usage"] = argparse.SUPPRESS
        super().__init__(**settings)

    def add_class_arguments(self, theclass: Any, *args: Any, **settings: Any) -> Any:
        """Without those that a class has for Python alone."""
        skip = {*(settings.pop("skip", None) or ()), *getattr(theclass, "IN_PYTHON", ())}
        return super().add_class_arguments(theclass, *args, skip=skip, **settings)

    def add_short_flags(self) -> None:
        """Gives an option its second spelling, so that both parse, and configs keep the dotted one.

        Not link_arguments, whose target refuses its own flag. Argparse keeps an option's spellings in these two
        places; tests/test_cli.py pins that.
        """
        for short, (dotted, text) in SHORT_FLAGS.items():
            if (action := self.option(dotted)) is None:  # a class of the user's own does without it
                continue
            if short not in (self.groups or ()):  # or jsonargparse would take model's settings for this one
                action.option_strings = [f"--{short}", *action.option_strings]
            self._option_string_actions[f"--{short}"] = action
            action.help = text
        self._option_string_actions["--model"] = self._option_string_actions["--model_class"]  # no file of settings

    def keep_whole_numbers(self) -> None:
        """Lets 1 stay 1 where a setting takes shares and numbers: jsonargparse tries float first, and 1 means one batch
        of --trainer.limit_train_batches where 1.0 means all of them."""
        for action in self._actions:
            types = get_args(typehint := getattr(action, "_typehint", None))
            if float in types and int in types and get_origin(typehint) in (Union, UnionType):
                others = [kind for kind in types if kind not in (int, float)]
                action._typehint = Union[(int, float, *others)]  # type: ignore[attr-defined]

    def option(self, key: str) -> argparse.Action | None:
        """The option that a key means, dotted or short; None when there is none of this name."""
        return self._option_string_actions.get(f"--{key}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if len(message) > MAX_LINE:
            message = f"{message[: MAX_LINE // 2]} ... {message[-MAX_LINE // 2 :]}"
        raise UserError(escaped(self._explain(message))) from None

    def _apply_actions(self, cfg: Any, parent_key: str = "", *args: Any, **settings: Any) -> Namespace:
        """Jsonargparse's reading of a config: it would take one within it, and lose settings of it (4.53)."""
        if isinstance(cfg, dict) and "config" in cfg and not parent_key:
            self.error("cannot name another config: give --config twice, with the one that wins second")
        if isinstance(cfg, dict) and not parent_key:
            cfg = with_class(cfg)
            if self._is_lenient:
                cfg.pop("model", None)
        found: Namespace = super()._apply_actions(cfg, parent_key, *args, **settings)
        return found

    def _explain(self, message: str) -> str:
        """One line out of jsonargparse's several: the flag as typed, what is wrong, the nearest right one."""
        if line := habit(message):
            return line
        reason, message = " ".join(gist(message).split()), " ".join(message.split())
        if found := re.match(r'[Pp]arser key "([^"]+)": ?(.*)', message):
            where = self._as_typed(found[1].rstrip("+"))
            if found[1] == "trainer.logger":
                from lit_cifar.run.chosen import named_logger  # and TensorBoard, which many a command does without

                reason = named_logger(reason)
            if (missing := re.search(r"arguments are required: (\w+)", reason)) and where.startswith("--model."):
                return f"{where}: it needs more settings: add {where}.{missing[1]} VALUE"
            if reason != message:
                given = message.rsplit("Given value: ", 1)[-1]  # which a reason among several leaves out
                return f"{where}: {in_words(reason.replace(': does not conform', f': {given} does not conform'))}"
            if found[2].startswith("unknown key"):  # of a class's settings, whose parser words it
                return f"{where}: {found[2]}"
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if found := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
            return unknown_flag(found[1], flags)
        if found := re.search(r"(?:Group '(\S+)' does not accept option|Option|[Kk]ey) '(\S+)'", message):
            key = f"{found[1]}.{found[2]}" if found[1] else found[2]
            near = nearest(key, [flag[2:] for flag in flags])
            where = "" if self.usage else " in the config; --print_config lists the keys"  # of a class, or of all
            return f"unknown key {key!r}{near}{where}"
        if message.startswith("Problems parsing config"):
            return f"no valid YAML: {message.split(': ', 1)[-1]}"
        message = re.sub(r'[Pp]arser key "([^"]+)":', lambda key: f"{self._as_typed(key[1])}:", message)
        if found := re.search(r"^(.*?): Expected a (.*)\. Got value: (.*)$", message):
            where, expected, given = found.groups()
            choices = re.findall(r"'([^']*)'", expected) if "Literal[" in expected else []
            return f"{where}: expected {plain(expected)}, got {given}{nearest(given, choices)}"
        message = in_words(message)
        if found := re.search(r"^(.*?): Does not validate .* Subtypes: \[(.*?)\] Errors.* Given value: (.*)$", message):
            return f"{found[1]}: expected {plain(found[2])}, got {found[3]}"
        return message

    def _as_typed(self, dotted: str) -> str:
        """The spelling of an option in this command line, or else its last."""
        found = next((action.option_strings for action in self._actions if action.dest == dotted), [f"--{dotted}"])
        spellings = [flag for flag in found if not flag.endswith("+")]  # which appends to a list
        return self.typed_as(spellings) or spellings[-1]

    def typed_as(self, spellings: Sequence[str]) -> str | None:
        """Which of an option's spellings stands in this command line."""
        typed = {word.split("=", 1)[0] for word in self.typed}
        return next((flag for flag in spellings if flag in typed), None)

    def settings_without_classes(self, args: list[str]) -> Namespace:
        """What is set, but for the module, and for the classes of callbacks and the like: any text passes for these.

        This shows which checkpoint to start from, and which class the module is of. A flag such as --model.net.widths
        may be one of the net that this checkpoint names, and is checked when that is known.
        """
        actions: list[Any] = [
            action
            for action in self._actions
            if ActionTypeHint.is_subclass_typehint(action, all_subtypes=False, also_lists=True)
            or ActionTypeHint.is_return_subclass_typehint(getattr(action, "_typehint", None))
        ]
        kept = [action._typehint for action in actions]
        words = zip(args, ["", *args], strict=False)  # each with the one before
        args = [
            word
            for word, before in words
            if not word.startswith("--model.")
            and (word.startswith("--") or not before.startswith("--model.") or "=" in before)
        ]
        try:
            self._is_lenient = True
            for action in actions:
                action._typehint = Any
            return self.read(args)
        finally:
            self._is_lenient = False
            for action, typehint in zip(actions, kept, strict=True):
                action._typehint = typehint

    def read(self, args: list[str]) -> Namespace:
        """The settings, with ~ expanded wherever one begins with it, in flags and YAML alike.

        Raises:
            UserError: they are wrong, or a path of ours is a URL.
        """
        config: Namespace = self.parse_args(args)
        for key, value in list(config.items()):
            name = key.rsplit(".", 1)[-1]
            if name in PATHS and isinstance(value, str):
                option = self.option(name)  # the short spelling, if there is one
                config[key] = str(local_path(value, f"--{name if option else key}"))
            else:
                config[key] = _expanded(value)
        return config

    @calls_chosen("when its settings were written as YAML")
    def dump(self, cfg: Namespace, **settings: Any) -> str:
        """The settings as YAML, without defaults that YAML has no form for: they will be the defaults again."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"\\s*{LOST}")
            text: str = super().dump(cfg if settings.get("skip_default") else _with_numbers(cfg), **settings)
        return yaml.safe_dump(_plain_only(yaml.safe_load(text), cfg), sort_keys=False) if LOST in text else text

    def start_from(self, config: dict[str, Any]) -> None:
        """Makes a checkpoint's config the defaults.

        Raises:
            UserError: it is not one of this version.
        """
        try:
            self.set_defaults(_flatten(config, {action.dest for action in self._actions}))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"the checkpoint's config does not fit this version: {' '.join(str(error).split())}"
            ) from None


class NetParser(FlagParser):
    """The parser of a command that uses a trained net, with the flags that say which; errors as UserError."""

    def __init__(self, prog: str, description: str, default: str | None = None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        text = f"{NET} (default: {default})" if default else NET
        self.add_argument("--ckpt_path", metavar="FILE", required=not default, help=text)
        self.add_argument("--tta", choices=get_args(TTA), help="test-time augmentation in place of the run's")
        self.add_argument("--trust", type=truth, default=False, metavar="BOOL", help=TRUST)

    def read(self, args: list[str]) -> argparse.Namespace:
        """The options, with their paths expanded."""
        options = self.parse_intermixed_args(args)
        for name in PATHS & vars(options).keys():
            if getattr(options, name) is not None:
                setattr(options, name, str(local_path(getattr(options, name), f"--{name}")))
        return options


def _with_numbers(settings: Namespace) -> Namespace:
    """Settings with the numbers that SGD takes where they leave them open; of another optimiser only the rate."""
    settings = settings.clone()
    largest = settings.get("model.scheduler.init_args.max_lr")  # one for each group, perhaps
    of_optimizer = {"lr": settings.get("model.optimizer.init_args.lr")}
    numbers = of_optimizer if settings.get("model.optimizer") else dict(OPTIONS)
    numbers["lr"] = (largest[0] if isinstance(largest, list) else largest) or numbers["lr"]
    for key, number in numbers.items():
        if f"model.{key}" in settings and settings[f"model.{key}"] is None:
            settings[f"model.{key}"] = number
    return settings


def _plain_only(value: Any, setting: Any) -> Any:
    """A dumped value without what jsonargparse could not dump; texts that it took for objects are what they were set
    to."""
    if isinstance(value, str) and value.startswith(LOST):
        return setting if isinstance(setting, str) else None
    if isinstance(value, list) and isinstance(setting, list):
        return [_plain_only(inner, old) for inner, old in zip(value, setting, strict=False)]
    if isinstance(value, dict):
        old = vars(setting) if isinstance(setting, Namespace) else setting if isinstance(setting, dict) else {}
        return {
            key: _plain_only(inner, old.get(key))
            for key, inner in value.items()
            if not str(inner).startswith(LOST) or isinstance(old.get(key), str)
        }
    return value


def _expanded(value: Any) -> Any:
    """A value with ~ expanded in each text that begins with it: no setting but a path does."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if isinstance(value, list):
        return [_expanded(inner) for inner in value]
    if isinstance(value, Namespace):
        return Namespace(**{key: _expanded(inner) for key, inner in vars(value).items()})
    return {key: _expanded(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def truth(text: str) -> bool:
    """true or false, however it is written; as YAML takes it."""
    value = {"true": True, "false": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text}")
    return value


def _flatten(config: dict[str, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and dotted not in known:
            flat.update(_flatten(value, known, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat
