"""The parsers: short flags beside dotted ones, help, and errors in one line. command.py makes objects of what was
parsed."""

import argparse
import re
from collections.abc import Sequence
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from lightning.pytorch.cli import LightningArgumentParser

from lit_cifar.errors import UserError
from lit_cifar.model.classifier import TTA
from lit_cifar.text import nearest

# short flag: (dotted twin, help)
SHORT_FLAGS = {
    "data_dir": (
        "data.data_dir",
        "folder, image tree or archive with the images; a missing dataset is downloaded into it",
    ),
    "dataset": ("data.dataset", "cifar10, cifar100, or shapes: embedded, no download"),
    "batch_size": ("data.batch_size", "images of one optimiser step, shared by all devices"),
    "lr": ("model.lr", "learning rate"),
    "compile": ("model.compile", "compile the net: true or false"),
    "max_epochs": ("trainer.max_epochs", "passes over the training images"),
    "devices": ("trainer.devices", "number of devices on each node, or 'auto'"),
    "num_nodes": ("trainer.num_nodes", "number of nodes"),
    "accelerator": ("trainer.accelerator", "cpu, gpu, mps, or auto"),
    "strategy": ("trainer.strategy", "how several devices share the work, ddp by default"),
    "precision": ("trainer.precision", "number format, e.g. 32-true, bf16-mixed, 16-mixed"),
    "seed": ("seed_everything", "seed of everything random"),
}

OWN_FLAGS = (
    "resume",
    "ckpt_path",
    "output",
    "trust",
    "study",
    "trials",
    "storage",
    "log_level",
)  # what to do this once; no part of the config


class Parser(LightningArgumentParser):
    """LightningCLI's parser with short flags beside the dotted ones, and errors as UserError."""

    typed: Sequence[str] = ()  # the command line, for messages

    def add_short_flags(self) -> None:
        """Gives an option its second spelling, so that both parse, and configs keep the dotted one.

        Not link_arguments, whose target refuses its own flag. Argparse keeps an option's spellings in these two
        places; tests/test_cli.py pins that.
        """
        for short, (dotted, text) in SHORT_FLAGS.items():
            action = self._find(dotted)
            action.option_strings = [f"--{short}", *action.option_strings]
            self._option_string_actions[f"--{short}"] = action
            action.help = text

    def keep_whole_numbers(self) -> None:
        """Lets 1 stay 1 where a setting takes shares and numbers: jsonargparse tries float first, and 1 means one batch
        of --trainer.limit_train_batches where 1.0 means all of them."""
        for action in self._actions:
            types = get_args(typehint := getattr(action, "_typehint", None))
            if float in types and int in types and get_origin(typehint) in (Union, UnionType):
                others = [kind for kind in types if kind not in (int, float)]
                action._typehint = Union[(int, float, *others)]  # type: ignore[attr-defined]

    def _find(self, dest: str) -> argparse.Action:
        return next(action for action in self._actions if action.dest == dest)

    def option(self, key: str) -> argparse.Action | None:
        """The option that a key means, dotted or short; None when there is none of this name."""
        return self._option_string_actions.get(f"--{key}")

    def format_help(self, formatter: Any = None) -> str:
        """Short flags first, then everything."""
        lines = [
            f"usage: {self.prog} [--config FILE ...] [--FLAG VALUE ...] [--any.dotted.key VALUE]",
            "",
            str(self.description),
            "",
            "Flags people use most:",
        ]
        own = [action for action in self._actions if action.dest in ("config", *OWN_FLAGS)]
        rows = [(f"--{action.dest}", str(action.help), "") for action in own]
        for short, (dotted, text) in SHORT_FLAGS.items():
            default = self.get_defaults().get(dotted)
            rows.append((f"--{short}", f"{text} (default: {default})", dotted))
        for flag, text, dotted in rows:
            lines.append(f"  {flag:<14} {text}{f' [--{dotted}]' if dotted else ''}")
        lines += ["", "--print_config prints every key with its value. All of them:", ""]
        return "\n".join(lines) + super().format_help(formatter)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(self._explain(message)) from None

    def _explain(self, message: str) -> str:
        """One line out of jsonargparse's several: the flag as typed, what is wrong, the nearest right one."""
        message = " ".join(message.split())
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        if found := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
            typed = found[1].split("=")[0]
            return f"unknown flag {typed}{nearest(typed, flags)}; --help lists the flags"
        if found := re.search(r"(?:Group '(\S+)' does not accept option|Option|[Kk]ey) '(\S+)'", message):
            key = f"{found[1]}.{found[2]}" if found[1] else found[2]
            near = nearest(key, [flag[2:] for flag in flags])
            return f"unknown key {key!r} in the config{near}; --print_config lists the keys"
        if message.startswith("Problems parsing config"):
            return f"--config {value_of('config', self.typed)} is no valid YAML: {message.split(': ', 1)[-1]}"
        message = re.sub(r'[Pp]arser key "([^"]+)":', lambda key: f"{self._as_typed(key[1])}:", message)
        if found := re.search(r"^(.*?): Expected a (.*)\. Got value: (.*)$", message):
            where, expected, given = found.groups()
            choices = re.findall(r"'([^']*)'", expected) if "Literal[" in expected else []
            return f"{where}: expected {_plain(expected)}, got {given}{nearest(given, choices)}"
        if found := re.search(r"^(.*?): Does not validate .* Subtypes: \[(.*?)\] Errors.* Given value: (.*)$", message):
            return f"{found[1]}: expected {_plain(found[2])}, got {found[3]}"
        return message

    def _as_typed(self, dotted: str) -> str:
        """The spelling of an option in this command line, or else its first."""
        spellings = next((action.option_strings for action in self._actions if action.dest == dotted), [f"--{dotted}"])
        return next((flag for flag in spellings if value_of(flag[2:], self.typed) is not None), spellings[-1])


class NetParser(argparse.ArgumentParser):
    """The parser of a command that uses a trained net, with the flags that say which; errors as UserError."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--ckpt_path", metavar="FILE", required=True, help="the checkpoint with the net")
        self.add_argument("--tta", choices=get_args(TTA), help="test-time augmentation in place of the run's")
        self.add_argument(
            "--trust",
            choices=("true", "false"),
            default="false",
            help="true: make classes that the checkpoint names, of any package",
        )

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"unrecognized arguments: (-\S+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            message = f"unknown flag {found[1]}{nearest(found[1], flags)}; --help lists the flags"
        raise UserError(message) from None


def _plain(types: str) -> str:
    """Types as jsonargparse names them, for people."""
    types = re.sub(r"<class '([^']*)'>|typing.Literal\[(.*?)\]", r"\1\2", types)
    return types.replace("'", "").replace("NoneType", "null")


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The value of `--flag value` or `--flag=value`, read before the parser exists; None when it is not given."""
    for position, arg in enumerate(args):
        if arg == f"--{flag}":
            return args[position + 1] if position + 1 < len(args) else None
        if arg.startswith(f"--{flag}="):
            return arg.split("=", 1)[1]
    return None
