"""The one LightningCLI: from settings to trainer, module and data module. parser.py words what is wrong with settings,
machine.py knows the machine."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.callbacks import SpikeDetection
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy

from lit_cifar import log
from lit_cifar.cli import checks, finders, launch, machine, nets
from lit_cifar.cli.configs import ConfigFile
from lit_cifar.cli.help import ASKING, Help, silent
from lit_cifar.cli.parser import Parser
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.errors import UserError, calls_chosen
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.chosen import make_loggers
from lit_cifar.run.folder import Run
from lit_cifar.run.read import State, read_checkpoint
from lit_cifar.run.save import Checkpoints, OpenRun
from lit_cifar.settings import Seed
from lit_cifar.text import in_command
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


# finds, in settings, a state to start from, and the config that becomes the defaults
Start = Callable[[Namespace], tuple[State, dict[str, Any]] | None]


class CLI(LightningCLI):
    """Reads a command's settings, and makes its run, trainer, module and data module of them.

    Flags and YAML files are read by one parser, so that a setting means the same wherever it stands. Where the settings
    name a checkpoint to start from, the same parser reads them again, with the checkpoint's config as defaults.

    Args:
        args: the command line, without the program's name.
        prog: the command, for --help and messages.
        description: what it does, for --help.
        start: finds the state to start from in the settings, and the part of its config that becomes the defaults.
        logs: whether the command begins or continues a run.
        add_arguments: adds the command's own flags to the parser; their values are in `options`.
        build: make the objects too; else `config` and `options` are all there is.

    Raises:
        UserError: the settings cannot be read, or nothing can be made of them.
    """

    model: LitClassifier
    datamodule: CIFAR10DataModule
    parser: Parser

    @in_command()
    def __init__(
        self,
        args: list[str],
        *,
        prog: str,
        description: str,
        start: Start = lambda settings: None,
        logs: bool = True,
        add_arguments: Callable[[Parser], None] = lambda parser: None,
        build: bool = True,
    ) -> None:
        args = nets.flat(args)
        self._args, self._start, self._logs, self._build = args, start, logs, build
        self._command = shlex.join([*prog.split(), *args])
        self._add_arguments_of_command = add_arguments
        self.state: State | None = None  # that the command starts from
        self.run: Run | None = None  # that it writes
        self._base: dict[str, Any] = {}
        super().__init__(
            LitClassifier,
            CIFAR10DataModule,
            save_config_callback=None,  # OpenRun does
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"prog": prog, "description": description, "dump_header": [], "allow_abbrev": False},
            parser_class=Parser,
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # saves objects that weights_only refuses
        )

    # ---- settings ----

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = Parser(add_help=False, **kwargs)
        parser.add_argument("-h", "--help", action=Help, help="the flags people use most; with GROUP or 'all' the rest")
        parser.add_argument("-c", "--config", action=ConfigFile, help="file of settings in YAML, or a recipe's name")
        parser.typed = self._args
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert isinstance(parser, Parser)
        parser.add_argument("--seed_everything", type=Seed, default=0)
        parser.add_argument("--model_class", type=str, default=None)
        before = {action.dest for action in parser._actions}
        parser.add_argument(
            "--log_level",
            type=log.Level,
            default="info",
            help="what is printed besides results and errors: debug, info, warning or error (default: info)",
        )
        self._add_arguments_of_command(parser)
        parser.of_command = tuple(action.dest for action in parser._actions if action.dest not in before)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert isinstance(parser, Parser)
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Progress, "running_loss")
        defaults = {"model.net": {"class_path": nets.DEFAULT_NET}, "model.tf32": False}
        parser.set_defaults({key: value for key, value in defaults.items() if parser.option(key)})
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_short_flags()
        parser.keep_whole_numbers()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the settings, and again where they name a checkpoint; the command's own go to `options`."""
        assert isinstance(parser, Parser)
        try:
            self.config = self._read(parser, args)
        except UserError:
            raise
        except (AttributeError, ValueError, RecursionError) as error:  # of jsonargparse: a null byte, many brackets
            raise UserError(f"the settings cannot be read ({error}); --print_config shows how they look") from error
        self.options: dict[str, Any] = {key: self.config.pop(key, None) for key in parser.of_command}

    def _read(self, parser: Parser, args: list[str]) -> Namespace:
        first, problem = silent(args), None
        asks = not ASKING.isdisjoint(arg.split("=")[0] for arg in args)
        try:
            settings = parser.read(first)
        except UserError as error:  # perhaps about a setting of the net that a checkpoint names, or of --model
            problem = error
            try:
                settings = parser.settings_without_classes(first)
            except UserError:
                if not asks:
                    raise error from None
                return parser.read(args)
        started = None if asks else self._start(settings)
        if started is not None:
            self.state, self._base = started
        if name := settings.model_class or self._base.get("model_class"):
            self._model_class = nets.find_module_class(name)
            self.setup_parser(False, self.parser_kwargs, {})  # whose flags are those of its signature
            parser = self.parser
        if started is not None:
            parser.start_from(self._base)
        elif problem and not (asks or name):
            raise problem
        elif first == args and not name:
            return settings
        return parser.read(args)

    # ---- what is made of them ----

    def _set_seed(self) -> None:
        """Nothing yet: `build` seeds, and reading settings changes nothing of the process."""

    def instantiate_classes(self) -> None:
        if self._build:
            self.build()

    @calls_chosen("to be made of its settings")
    def build(self) -> None:
        """Makes the run, the data module, the module and the trainer.

        Raises:
            UserError: the settings do not go together, or not with this machine.
        """
        super()._set_seed()
        self.run = self._find_run()
        data = self._set_num_classes()
        if self.state:
            finders.keep_found(self.config, self._base)
        self.plain_config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        config, self.config = self.config, self.config.clone()
        self._loggers = self.config["trainer"].pop("logger")
        super().instantiate_classes()
        self.config = config
        self.datamodule.adopt_prepared(data)
        self.datamodule.trainer = self.trainer
        self.model.config = self.plain_config
        self.model.note_settings()
        self.model.recipe = (self.state and self.state.recipe) or _recipe(self.config.get("config"))
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (Checkpoints, Progress)):
                callback.run = self.run

    def _find_run(self) -> Run | None:
        settings = self.config["trainer"]
        if not self._logs or settings["fast_dev_run"]:
            return None
        run = Run.of(self.state.path, self.state.identity) if self.state else None
        return run or Run.new(Path(settings["default_root_dir"] or "."))

    def _set_num_classes(self) -> CIFAR10DataModule:
        """Gives the net as many outputs as the data has classes; a checkpoint's net keeps its number.

        Returns what looked at the data, and prepared it if it had to.
        """
        data = CIFAR10DataModule(self.config["data"]["data_dir"], self.config["data"]["dataset"])
        if not self._base:
            with machine.on_each_node():
                nets.set_num_classes(self.config["model"]["net"], data.count_classes)
        return data

    @calls_chosen("to be set up")
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init["trainer"]
        checks.check_ranges(config)
        checks.check_mps(config)
        callbacks: list[Any] = [*finders.as_list(config["callbacks"])]
        has_bar = any(isinstance(callback, AnyProgressBar) for callback in callbacks)
        plugins = checks.with_writer(finders.as_list(config["plugins"]))
        # without a logger until the run has a folder, see begin()
        overrides: dict[str, Any] = {"callbacks": callbacks, "plugins": plugins, "logger": False}
        if config["enable_progress_bar"] is None:
            overrides["enable_progress_bar"] = has_bar or log.is_terminal(sys.stdout)
        if config["benchmark"] is None and not config["deterministic"]:
            overrides["benchmark"] = True  # of cuDNN: batches have few shapes, each of which is tried out once
        if not self.config["data"]["num_val"]:
            overrides["limit_val_batches"] = 0
        callbacks += [finders.Found(self.run), DeviceShapes(), Dashboard(self._command)]
        if self.run is not None:
            callbacks.insert(0, OpenRun(self.run, self.plain_config))
        has_several_devices = self._has_several_devices(config)
        if has_several_devices:
            checks.check_port()
            callbacks.append(SlowRank())
        if overrides.get("enable_progress_bar", config["enable_progress_bar"]) and not has_bar:
            callbacks.append(ProgressBar())
        slurm = None
        if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            slurm = machine.slurm_environment()
            plugins += [slurm] if slurm else []
        if config["strategy"] in ("auto", "ddp") and has_several_devices:
            # Gradients are views of what is exchanged, so that nothing is copied; this project's nets and module use
            # all their parameters in each step, which lets DDP plan the exchange once
            static = type(self.model.net).__module__.startswith("lit_cifar.nets") and type(self.model) is LitClassifier
            overrides["strategy"] = DDPStrategy(gradient_as_bucket_view=True, static_graph=static)
        if config["enable_checkpointing"] is False:
            self.parser.callback_keys.remove("checkpoint")
        try:
            trainer = super().instantiate_trainer(**{**kwargs, **overrides})
        # how Lightning refuses a number of devices, a precision, a plugin, ...
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise UserError(f"the Trainer refuses its settings: {error}") from error
        except KeyError as error:  # of a variable that srun or torchrun would have set
            if not str(error.args[0]).isupper():
                raise
            raise UserError(
                f"{error.args[0]} is not in the environment, which looks like Slurm's or torchrun's: start the command "
                "with srun or torchrun, or unset their variables"
            ) from error
        # a command says itself which state it starts from: Lightning would look for what an OnExceptionCheckpoint left
        trainer._checkpoint_connector._parse_ckpt_path = lambda stage, path, **_: path  # type: ignore[method-assign]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SpikeDetection):
                # Lightning 2.6 restores by another name what it saved
                callback.running = callback.running_mean  # type: ignore[attr-defined]
        checks.check_launcher(trainer, config["strategy"])
        if slurm:
            machine.check_allocation(slurm, trainer)
        launch.bound_waiting(trainer, config["strategy"])
        loop.install(trainer)
        return trainer

    @staticmethod
    def _has_several_devices(config: Any) -> bool:
        devices, num_gpus = str(config["devices"]), torch.cuda.device_count()
        if int(config["num_nodes"]) > 1 or devices not in ("1", "auto", "-1"):
            return True
        return devices != "1" and config["accelerator"] in ("auto", "gpu", "cuda") and num_gpus > 1

    # ---- what commands ask for ----

    @property
    def checkpoints(self) -> Checkpoints | None:
        """The callback that saves states; None with --trainer.enable_checkpointing false."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)

    def begin(self) -> None:
        """Takes the run's folder and opens the loggers in it: the last thing before the first step.

        Raises:
            UserError: the folder cannot be made, or a logger cannot.
        """
        if self.run is None:
            return
        if self.trainer.is_global_zero:
            self.run.claim()
            # profilers ask before OpenRun is called
            self.trainer._default_root_dir = str(self.run.folder)  # type: ignore[attr-defined]
        try:
            if self.trainer.is_global_zero and self.state:
                self.state = read_checkpoint(self.state.path)  # which another process may have replaced before claim()
            self.trainer.loggers = make_loggers(self._loggers, self.run, self.state.step if self.state else None)
        except BaseException:
            self.run.release()
            raise

    def results(self, tested: str | None, num_steps: int, seconds: dict[str, Any]) -> dict[str, Any]:
        """What results.json says of a test.

        Args:
            tested: the state that was tested.
            num_steps: optimiser steps that it was trained for.
            seconds: that it took, by what was done.
        """
        report, plain = self.model.reports["test"], self.model.reports.get("plain")
        return {
            "dataset": self.datamodule.dataset,
            **report.results(),
            "num_test_left_out": len(self.datamodule.test.labels) - report.num_images,
            **({"accuracy_without_tta": plain.accuracy} if plain else {}),
            "checkpoint": tested,
            "num_steps": num_steps,
            "devices": self.trainer.world_size,
            "seconds": seconds,
            "seed": self.plain_config["seed_everything"],
        }


def set_up(args: list[str], **settings: Any) -> CLI:
    """A command's CLI, with the process set up for it: log level, rank, threads, kernels, memory.

    Args:
        args: the command line, without the program's name.
        settings: the other arguments of CLI.

    Raises:
        UserError: as CLI.
    """
    command = CLI(args, build=False, **settings)
    machine.set_log_level(command.options["log_level"])
    command.build()
    machine.set_rank(command.trainer)
    num_parameters = sum(parameter.numel() for parameter in command.model.net.parameters())
    machine.suit_cpu(command.datamodule.batch_size * num_parameters)
    return command


def _recipe(configs: Sequence[Any] | None) -> str:
    """What people call a training run: the names of its --config files; None stands for a config typed in full."""
    return "+".join(Path(str(path)).stem if path else "typed" for path in configs or ()) or "tutorial"
