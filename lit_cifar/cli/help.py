"""--help of the commands that take fit's settings: the flags people use most, and the names of the others. What one of
these does jsonargparse says, with `--help GROUP` or `--help all`."""

import argparse
from typing import Any

from lit_cifar.cli.configs import recipes
from lit_cifar.cli.parser import SHORT_FLAGS, Parser
from lit_cifar.errors import UserError
from lit_cifar.text import definitions, nearest, wrapped

USAGE = "[--config FILE ...] [--FLAG VALUE ...] [--any.dotted.key VALUE]"
ALL = "all"


class Help(argparse._HelpAction):
    """--help, alone or with the name of a group of settings, or with 'all'."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.nargs = "?"

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is None:
            print(summary(parser))
            parser.exit()
        elif values != ALL:
            group = values.removesuffix(".*").strip("-.")
            if group not in parser.groups:
                near = nearest(values, parser.groups)
                raise UserError(f"--help: expected {', '.join(parser.groups)} or {ALL}, got {values}{near}")
            parser.usage, parser.description = argparse.SUPPRESS, None
            parser._action_groups = [parser.groups[group]]  # of a process that ends here
        parser.print_help()
        parser.exit()


def summary(parser: Parser) -> str:
    """The help for two screens."""
    own = [action for action in parser._actions if action.dest in parser.of_command]
    flags = [("--config", f"file of settings in YAML, or a recipe: {', '.join(recipes())}; later ones win")]
    flags += [(f"--{action.dest}", str(action.help)) for action in own]
    defaults = parser.get_defaults()
    for short, (dotted, text) in SHORT_FLAGS.items():
        flags.append((f"--{short}", f"{text} (default: {defaults.get(dotted)}) [--{dotted}]"))
    dotted_twins = {dotted for dotted, _ in SHORT_FLAGS.values()}
    groups = []
    for name, group in (parser.groups or {}).items():
        others = [action.dest for action in group._group_actions if action.dest not in {*dotted_twins, name}]
        keys = [dest.removeprefix(f"{name}.") for dest in others if not dest.endswith(".help")]
        groups.append((f"--{name}.", ", ".join(keys)))
    parts = [
        wrapped(f"usage: {parser.usage or f'{parser.prog} {USAGE}'}", others=" " * 7),
        wrapped(str(parser.description)),
        f"Flags people use most, with their names in YAML:\n{definitions(flags)}",
        f"All others, by group:\n{definitions(groups)}",
        wrapped(
            f"--help GROUP explains the settings of one group, --help {ALL} every setting. --print_config prints them "
            "with their values."
        ),
    ]
    return "\n\n".join(parts)
