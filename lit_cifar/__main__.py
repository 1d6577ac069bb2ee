"""`lit_cifar COMMAND ...`, installed by pip, and `python -m lit_cifar COMMAND ...`: both run `python -m
lit_cifar.COMMAND ...`. Which commands there are; what they do is in their own modules. It imports no torch."""

import runpy
import sys

import lit_cifar
from lit_cifar import errors
from lit_cifar.errors import UserError
from lit_cifar.text import definitions, nearest

COMMANDS = {
    "fit": "trains a net, then tests it once",
    "test": "tests a checkpoint",
    "predict": "names what images show",
    "export": "writes a net for other programs",
    "bench": "measures a recipe, or one stage of it",
    "runs": "lists runs, with their accuracy",
    "sweep": "searches settings",
}


def main() -> None:
    """Runs the command that sys.argv names, as `python -m` would: in `__main__`, so that it starts other processes of
    its own kind, with the current folder first on Python's path, and with the lit_cifar that is found so."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        errors.run(_answer)
    del sys.argv[1]
    if not sys.flags.safe_path:
        sys.path.insert(0, "")
    for module in [module for module in sys.modules if module.split(".")[0] == "lit_cifar"]:
        del sys.modules[module]
    runpy.run_module(f"lit_cifar.{name}", run_name="__main__", alter_sys=True)


def _answer(args: list[str]) -> None:
    """What is said without a command."""
    if args[:1] == ["--version"]:
        print(f"lit_cifar {lit_cifar.__version__}")
    elif not args or args[0] in ("-h", "--help"):
        print("usage: lit_cifar COMMAND ...\n\nCIFAR-10 with PyTorch Lightning. The commands:\n")
        print(definitions(list(COMMANDS.items())))
        print("\nlit_cifar COMMAND --help explains one; python -m lit_cifar.COMMAND is the same.")
    else:
        near = nearest(args[0], COMMANDS)
        raise UserError(f"{args[0]} is no command{near}; the commands are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
