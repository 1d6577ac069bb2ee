"""The one LightningCLI: from settings to trainer, module and data module. parser.py words what is wrong with settings,
machine.py knows the machine."""

import inspect
import pkgutil
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from lit_cifar import log
from lit_cifar.cli import machine
from lit_cifar.cli.parser import OWN_FLAGS, Parser, value_of
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.errors import UserError
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.folder import Run, run_folder, run_version
from lit_cifar.run.logger import RunLogger
from lit_cifar.run.save import Checkpoints, DurableCheckpointIO
from lit_cifar.training import loop
from lit_cifar.training.dashboard import Dashboard
from lit_cifar.training.lines import ProgressBar
from lit_cifar.training.progress import Progress
from lit_cifar.training.ranks import DeviceShapes, SlowRank

TRAINER_DEFAULTS = {
    "max_epochs": 2,
    "devices": 1,
    "log_every_n_steps": 50,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # DeviceLoader shares each batch itself
}

DEFAULT_NET, DEFAULT_NUM_CLASSES = "lit_cifar.nets.Net", 10


class _TellRun(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run = Run(Path(trainer.log_dir or "."))  # asked for on every rank: rank 0 broadcasts it
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Progress) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                callback.run = run


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
        parser.add_lightning_class_args(Progress, "running_loss")
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
        machine.set_log_level(self.options["log_level"])

    def instantiate_classes(self) -> None:
        data = self._set_num_classes()
        self.plain_config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        super().instantiate_classes()
        self.datamodule.adopt_prepared(data)
        machine.suit_cpu(
            self.datamodule.batch_size * sum(parameter.numel() for parameter in self.model.net.parameters())
        )
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
                with machine.on_each_node():
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
        overrides["callbacks"] = [*_as_list(config["callbacks"]), DeviceShapes(), Dashboard(self._command), _TellRun()]
        if self._has_several_devices(config):
            overrides["callbacks"].append(SlowRank())
        if overrides.get("enable_progress_bar", config["enable_progress_bar"]):
            overrides["callbacks"].append(ProgressBar())
        overrides["plugins"] = [*_as_list(config["plugins"]), DurableCheckpointIO()]
        slurm = None
        if not any(isinstance(plugin, ClusterEnvironment) for plugin in overrides["plugins"]):
            slurm = machine.slurm_environment()
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
            machine.check_allocation(slurm, trainer)
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
