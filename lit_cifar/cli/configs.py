"""Config files: which file a name means, the name of a recipe too, what is wrong with one, and how two differ.
parser.py reads what is in them."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse._actions import ActionConfigFile

import lit_cifar
from lit_cifar.errors import UserError
from lit_cifar.files import local_path
from lit_cifar.run.trust import MAX_YAML
from lit_cifar.text import nearest, printable

WRITTEN_OUT = r"[{\n]|: "  # what no name of a file has, and a config that is given in full


def recipes(kind: str = "") -> dict[str, Path]:
    """The recipes by name, or with kind 'sweeps' the studies: of configs/, which is installed within the package, and
    lies beside it in a checkout."""
    package = Path(lit_cifar.__file__).parent
    folder = next((place for place in (package / "configs", package.parent / "configs") if place.is_dir()), package)
    return {path.stem: path for path in sorted((folder / kind).glob("*.yaml"))}


def find_config(name: str, flag: str, kind: str = "") -> str:
    """The file that a name means: one of that name, or else the recipe.

    Args:
        name: as it was typed.
        flag: where, such as "--config", for messages.
        kind: 'sweeps' for a study.

    Raises:
        UserError: there is neither, or it is a pipe.
    """
    path = local_path(name, flag)
    if os.path.isfile(path):
        return str(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{flag} {printable(name)} is a pipe or device, and is read more than once: name a file")
    known = recipes(kind)
    if name in known:
        return str(known[name])
    what = ("study", "studies") if kind else ("recipe", "recipes")
    raise UserError(
        f"{flag} {printable(name) or repr(name)} is {'a folder' if os.path.isdir(path) else 'no file'} and no {what[0]}"
        f"{nearest(path.stem, known)}; the {what[1]} are {', '.join(known)}"
    )


def with_class(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose module's class, written as in LightningCLI's subclass mode, stands under model_class."""
    model = config.get("model")
    if isinstance(model, str):
        model = {"class_path": model}
    if not isinstance(model, dict) or "class_path" not in model:
        return dict(config)
    others = {key: value for key, value in model.items() if key not in ("class_path", "init_args")}
    settings = {**others, **(model.get("init_args") or {})}
    return {**config, "model_class": model["class_path"], "model": settings}


def flag_text(value: Any) -> str:
    """A value as it is typed after a flag."""
    return value if isinstance(value, str) else json.dumps(value)


def changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """'KEY was X and is now Y' for each setting that differs; of another class, the class alone."""
    if isinstance(before, dict) and isinstance(now, dict) and before.get("class_path") == now.get("class_path"):
        for name in sorted(before.keys() | now.keys()):
            inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            yield from changes(before.get(name), now.get(name), inner)
    elif before != now:
        yield f"{key} was {_shown(before)} and is now {_shown(now)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        value = value["class_path"]
    return "nothing" if value is None else printable(flag_text(value))


class ConfigFile(ActionConfigFile):
    """--config, whose file is named where it cannot be read."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        written_out = values == "-" or re.search(WRITTEN_OUT, values)
        file = values if written_out and not os.path.exists(values) else find_config(values, "--config")
        num_bytes = 0
        with contextlib.suppress(OSError, ValueError):  # a config written out is no path
            num_bytes = os.stat(file).st_size
        if num_bytes > 4 * MAX_YAML:
            raise UserError(f"--config {values} is no config: it has {num_bytes:,} bytes")
        try:
            super().__call__(parser, cfg, file, option_string)
        except UserError as error:
            line = str(error)
            if line.startswith("Unexpected config"):
                line = "holds no settings; --print_config shows how they look"
            elif "no valid YAML" in line:
                line = f"is {line}"
            elif not line.startswith("cannot name"):
                raise
            raise UserError(f"--config {values} {line}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--config {values} is no text in UTF-8: {error}") from None
