"""The one LightningCLI: short flags, defaults, errors to exit codes; a small parser for commands that only use a net.
What a command does is in its own module."""

import argparse
import contextlib
import ctypes
import inspect
import logging
import os
import pkgutil
import re
import shlex
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import torch
import yaml
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from lit_cifar import errors, log, loop
from lit_cifar.callbacks import Dashboard, DeviceShapes, ProgressBar, RunningLoss, SlowRank
from lit_cifar.checkpoint import STOPPED, Checkpoints, DurableCheckpointIO, RunLogger, Stopped, run_folder
from lit_cifar.data import CIFAR10DataModule
from lit_cifar.errors import UserError
from lit_cifar.folders import run_version
from lit_cifar.module import TTA, LitClassifier
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
TRAINER_DEFAULTS = {
    "max_epochs": 2,
    "devices": 1,
    "log_every_n_steps": 50,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # DeviceLoader shares each batch itself
}
# Up to this many images times parameters a step is too small for two threads and for oneDNN's preparations. The
# tutorial's net at batch 4 (0.25 million): forward, backward and SGD take 1.65 ms with oneDNN and 1.20 without (one
# thread, torch 2.14, 2 CPU cores); two threads gain nothing and lose much when another process wants a core
SMALL_STEP = 2**20
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3)
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
DEFAULT_NET, DEFAULT_NUM_CLASSES = "lit_cifar.nets.Net", 10


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


class CLI(LightningCLI):
    """Parses a command's arguments and makes its trainer, module and data module.

    Args:
        args: the command line, without the program's name.
        base: a config, for example a checkpoint's, that the command line is read on top of.
        resume: path and step of the checkpoint whose run is continued, in the same folder.
        logs: whether the command makes or continues a run's folder.
        add_arguments: adds the command's own arguments to the parser.
    """

    def __init__(
        self,
        args: list[str],
        *,
        prog: str,
        description: str,
        base: dict[str, Any] | None = None,
        resume: tuple[Path, int] | None = None,
        logs: bool = True,
        add_arguments: Callable[[Parser], None] = lambda parser: None,
    ) -> None:
        self._args, self._base, self._resume, self._logs = args, base, resume, logs
        self._command = shlex.join([*prog.split(), *args])
        self._add_arguments_of_command = add_arguments
        # LightningCLI advises against `args` when sys.argv is not empty; here they are what was typed
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        super().__init__(
            LitClassifier,
            CIFAR10DataModule,
            save_config_callback=SaveConfigCallback if logs else None,
            save_config_kwargs={"overwrite": True},  # of a resumed run; others have a folder of their own
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"prog": prog, "description": description, "dump_header": [], "allow_abbrev": False},
            parser_class=Parser,
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # saves objects that weights_only refuses
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert isinstance(parser, Parser)
        parser.typed = self._args
        parser.add_argument("--seed_everything", type=int, default=0)
        parser.add_argument(
            "--log_level",
            type=log.Level,
            default="info",
            help="what is said besides results and errors: debug, info, warning or error (default: info)",
        )
        self._add_arguments_of_command(parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert isinstance(parser, Parser)
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(RunningLoss, "running_loss")
        parser.set_defaults({"model.net": {"class_path": DEFAULT_NET}})
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_short_flags()
        parser.keep_whole_numbers()
        if self._base:
            _set_base(parser, self._base)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except UserError:
            raise
        except UnicodeDecodeError as error:
            raise UserError(f"--config {value_of('config', self._args)} is no text in UTF-8: {error}") from None
        except RecursionError:
            raise UserError("the settings are nested too deeply: give them without so many brackets") from None
        except (AttributeError, ValueError) as error:  # of jsonargparse: a config within a config, a null byte
            raise UserError(f"the settings cannot be read ({error}); --print_config shows how they look") from error

    def before_instantiate_classes(self) -> None:
        self.options = {key: self.config.pop(key, None) for key in OWN_FLAGS}
        set_log_level(self.options["log_level"])

    def instantiate_classes(self) -> None:
        data = self._set_num_classes()
        self.plain_config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        super().instantiate_classes()
        self.datamodule.adopt_prepared(data)
        suit_cpu(self.datamodule.batch_size * sum(parameter.numel() for parameter in self.model.net.parameters()))
        self.model.config = self.plain_config
        self.model.recipe = _recipe(self.config.get("config"))
        self.datamodule.trainer = self.trainer

    def _set_num_classes(self) -> CIFAR10DataModule:
        """Gives the net as many outputs as the data has classes, where the config leaves the net's own default.

        A checkpoint's net keeps its number. Returns what looked at the data, and prepared it if it had to.
        """
        data = CIFAR10DataModule(self.config["data"]["data_dir"], self.config["data"]["dataset"])
        net = self.config["model"]["net"]
        parameter = _parameter(net["class_path"], "num_classes")
        if self._base is None and parameter is not None:
            # a net named in place of the default one inherits the default one's value for what both take
            untouched = (parameter.default, DEFAULT_NUM_CLASSES)
            if net["init_args"]["num_classes"] in untouched:
                with on_each_node():
                    net["init_args"]["num_classes"] = data.count_classes()
        return data

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init["trainer"]
        interactive = sys.stdout.isatty()
        overrides: dict[str, Any] = {}
        if config["enable_progress_bar"] is None:
            overrides["enable_progress_bar"] = interactive
        if not self.config["data"]["num_val"]:
            overrides["limit_val_batches"] = 0
        overrides["callbacks"] = [*_as_list(config["callbacks"]), DeviceShapes(), Dashboard(self._command)]
        if self._has_several_devices(config):
            overrides["callbacks"].append(SlowRank())
        if overrides.get("enable_progress_bar", config["enable_progress_bar"]):
            overrides["callbacks"].append(ProgressBar())
        overrides["plugins"] = [*_as_list(config["plugins"]), DurableCheckpointIO()]
        slurm = None
        if not any(isinstance(plugin, ClusterEnvironment) for plugin in overrides["plugins"]):
            slurm = _slurm()
            overrides["plugins"] += [slurm] if slurm else []
        if not self._logs:
            overrides["logger"] = False
        elif config["logger"] in (None, True):
            overrides["logger"] = self._run_logger(config["default_root_dir"])
        if config["strategy"] in ("auto", "ddp") and self._has_several_devices(config):
            # Gradients are views of what is exchanged, so that nothing is copied; this project's nets use all their
            # parameters in each step, which lets DDP plan the exchange once
            static = type(self.model.net).__module__.startswith("lit_cifar.nets")
            overrides["strategy"] = DDPStrategy(gradient_as_bucket_view=True, static_graph=static)
        if config["enable_checkpointing"] is False:
            self.parser.callback_keys.remove("checkpoint")
        try:
            trainer = super().instantiate_trainer(**{**kwargs, **overrides})
        except (TypeError, ValueError) as error:  # how Lightning refuses a number of devices, a precision, ...
            raise UserError(f"the Trainer refuses its settings: {error}") from error
        if slurm:
            _check_allocation(slurm, trainer)
        loop.install(trainer)
        return trainer

    @staticmethod
    def _has_several_devices(config: Any) -> bool:
        devices, num_gpus = str(config["devices"]), torch.cuda.device_count()
        if int(config["num_nodes"]) > 1 or devices not in ("1", "auto", "-1"):
            return True
        return devices != "1" and config["accelerator"] in ("auto", "gpu", "cuda") and num_gpus > 1

    def _run_logger(self, save_dir: str | None) -> Logger:
        if self._resume is not None:
            path, step = self._resume
            run = run_folder(path)
            if run is not None:
                return RunLogger(str(run.parent.parent), version=run_version(run), purge_step=step + 1)
        return RunLogger(save_dir or ".")


def _slurm() -> SLURMEnvironment | None:
    """Slurm's environment where Lightning would choose it, but leaving signals to Checkpoints.

    Lightning's own saves in mid-step at SIGUSR1 and requeues the job itself, beside the job's script.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return None
    try:
        return SLURMEnvironment(auto_requeue=False)
    except RuntimeError as error:  # --ntasks without --ntasks-per-node
        raise UserError(f"the Slurm allocation does not suit: {error}") from error


def _check_allocation(slurm: SLURMEnvironment, trainer: Trainer) -> None:
    """Each task that srun started is one device; with one device Lightning does not look, and all would train alone."""
    num_tasks, num_processes = slurm.world_size(), trainer.num_devices * trainer.num_nodes
    if "SLURM_STEP_ID" in os.environ and num_tasks != num_processes:  # which srun gives to what it starts
        raise UserError(
            f"Slurm started {num_tasks} tasks, one for each device, but --devices {trainer.num_devices} on --num_nodes "
            f"{trainer.num_nodes} makes {num_processes}: let --ntasks-per-node be --devices, and --nodes --num_nodes"
        )
    if num_processes > 1:
        try:
            slurm.validate_settings(trainer.num_devices, trainer.num_nodes)
        except ValueError as error:
            raise UserError(f"the Slurm allocation does not suit: {error}") from error


def _recipe(configs: Sequence[Any] | None) -> str:
    """What people call a training: the names of its --config files; None stands for a config typed in full."""
    return "+".join(Path(str(path)).stem if path else "typed" for path in configs or ()) or "tutorial"


def _parameter(class_path: str, name: str) -> inspect.Parameter | None:
    """A parameter in the own signature of a class or function, not one that it hands on by **kwargs."""
    return inspect.signature(pkgutil.resolve_name(class_path)).parameters.get(name)


def _as_list(value: Any) -> list[Any]:
    """What the Trainer takes one or several of, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _set_base(parser: Parser, base: dict[str, Any]) -> None:
    base = {
        key: value
        for key, value in base.items()
        if key in ("seed_everything", "trainer", "model", "data", "checkpoint", "running_loss")
    }
    try:
        parser.set_defaults(_flatten(base, {action.dest for action in parser._actions}))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"the checkpoint's config does not fit this version: {' '.join(str(error).split())}") from None


def _flatten(config: dict[str, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and dotted not in known:
            flat.update(_flatten(value, known, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat


def value_of(flag: str, args: Sequence[str]) -> str | None:
    """The value of `--flag value` or `--flag=value`, read before the parser exists; None when it is not given."""
    for position, arg in enumerate(args):
        if arg == f"--{flag}":
            return args[position + 1] if position + 1 < len(args) else None
        if arg.startswith(f"--{flag}="):
            return arg.split("=", 1)[1]
    return None


def suit_cpu(size: int) -> None:
    """Settles threads, kernels and memory on the CPU for a step of `size` images times parameters."""
    small = size <= SMALL_STEP
    torch.backends.mkldnn.enabled = not small  # type: ignore[assignment]
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if not small:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets the process keep memory that it frees, where the C library is glibc.

    By default glibc gives each large block back to the system, which fills the next one with zeros page by page: a step
    of SpeedNet on 2,000 images took 12 to 13 s so and 6.0 to 6.6 s with its memory kept (2 CPU cores, torch 2.14).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def on_each_node() -> Iterator[None]:
    """Around what reads files that each node may have of its own: what is wrong with them is told by each node."""
    try:
        yield
    except UserError as error:
        error.of_node = True
        raise


def set_log_level(level: str) -> None:
    """As `log.set_level`, for Lightning's lines and Python's warnings too.

    Lightning's notes on what it found, and on how it could be extended, are for 'debug'. What is not about one rank is
    said by the first alone.
    """
    log.set_level(level)
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel({"debug": "INFO", "error": "ERROR"}.get(level, "WARNING"))
    if level == "error" or (log.rank() and level != "debug"):
        warnings.simplefilter("ignore")
    # said on each machine that has Slurm, to whoever trains outside of a job
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    warnings.filterwarnings("ignore", message="The number of training batches")  # RunningLoss logs short epochs too
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation set
    # Lightning 2.6.6 asks torch 2.15 in a way that is to go (utilities/_pytree.py:21); users cannot mend it
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")


def run(command: Callable[[list[str]], None]) -> NoReturn:
    """As `errors.run`; what Lightning refuses is the user's to mend too.

    Only the first process tells it, and of what may be wrong on one node alone the first of each node. A training that
    a signal stopped ends with code STOPPED.
    """

    def on_this_rank(args: list[str]) -> None:
        level = value_of("log_level", args)  # before anything is said; a config may set it too
        set_log_level(level if level in log.LEVELS else "info")
        try:
            command(args)
        except (UserError, MisconfigurationException) as error:
            rank = rank_zero_only.rank  # type: ignore[attr-defined]
            if rank == 0:
                raise UserError(str(error)) from error
            if getattr(error, "of_node", False) and log.local_rank() == 0:
                raise UserError(f"rank {rank} on {socket.gethostname()}: {error}") from error
            sys.exit(2)
        except Stopped as stopped:
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                sys.stdout.flush()
                print(f"lit_cifar: {stopped}", file=sys.stderr, flush=True)
            sys.exit(STOPPED)

    errors.run(on_this_rank)
