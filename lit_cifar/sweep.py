"""`python -m lit_cifar.sweep CONFIG --study STUDY --trials N`: searches settings with Optuna. fit.py trains and
tests; cli/study.py reads what is searched, and keeps the trials."""

from lit_cifar import process

if __name__ == "__main__":
    process.begin()  # before the imports, which take seconds

import contextlib
import gc
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lit_cifar import fit
from lit_cifar.cli import machine
from lit_cifar.cli.command import CLI, set_up
from lit_cifar.cli.configs import find_config, flag_text, recipes
from lit_cifar.cli.parser import Parser
from lit_cifar.cli.study import (
    Values,
    best_config,
    check_unchanged,
    corners,
    distribution,
    import_optuna,
    mark_killed,
    open_study,
    read_space,
    trials_of,
    write_trial,
)
from lit_cifar.errors import DivergedError, UserError
from lit_cifar.files import write_durably, writing
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.folder import RUNS, Run
from lit_cifar.run.read import State, read_checkpoint
from lit_cifar.run.stop import Stopped
from lit_cifar.text import in_command, printable
from lit_cifar.training.dashboard import hyperparameters

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

USAGE = "python -m lit_cifar.sweep CONFIG --study STUDY --trials N"


@in_command()
def main(args: list[str]) -> None:
    """Searches, then tests the best trial once; `args` is the command line without the program's name."""
    if args and not args[0].startswith("-"):
        args = ["--config", *args]
    elif not {"-h", "--help"} & set(args):
        raise UserError(f"the recipe comes first: {USAGE}")
    sweep = Sweep(args)
    sweep.check()
    with open_study(sweep.storage) as sweep.study:
        sweep.run_trials()
        sweep.finish()


class Sweep:
    """One storage's search: what is searched, the trials so far, and the best of them.

    Trials run one after another in this process. Each has a command line of its own, and trains as `lit_cifar.fit`
    would. All share the images, which are read once.
    """

    study: "optuna.Study"

    def __init__(self, args: list[str]) -> None:
        self.args = args
        self.num_threads = torch.get_num_threads()
        self.base = self.command({})
        options = self.base.options
        if options["study"] is None or options["trials"] is None:
            raise UserError(f"--study and --trials are needed: {USAGE}")
        if options["trials"] < 1:
            raise UserError(f"--trials: expected a number from 1, got {options['trials']}")
        self.num_trials: int = options["trials"]
        self.file = Path(find_config(options["study"], "--study", "sweeps"))
        self.space = read_space(self.file, self.base.parser)
        configs = [Path(str(path)).stem for path in self.base.config["config"] if path]
        name = "-".join(dict.fromkeys([*configs, self.file.stem]))
        root = self.base.config["trainer"]["default_root_dir"] or "."
        self.storage = Path(options["storage"] or Path(root) / RUNS / "sweeps" / f"{name}.db")

    def command(self, values: Values, state: State | None = None) -> CLI:
        """The command of a training run with these values, or of one that continues from a state."""
        # undoes what earlier trials changed in this process: a run of fit has a process of its own
        torch.set_num_threads(self.num_threads)  # small steps take one thread
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # a compiled net leaves code for its shapes
        flags = [f"--{key}={flag_text(value)}" for key, value in values.items()]
        return set_up(
            [*self.args, *flags],
            prog="python -m lit_cifar.sweep",
            description="Searches the settings that STUDY names, by validation accuracy, and tests the best once.",
            start=lambda settings: (state, {}) if state else None,
            add_arguments=_add_arguments,
        )

    def check(self) -> None:
        """Reads the images, and finds out what is wrong with the input, before anything is written.

        Raises:
            UserError: something is.
        """
        self._check_recipe()
        for option in filter(None, map(self.base.parser.option, self.space)):  # a class may need its settings given
            if flag := self.base.parser.typed_as(option.option_strings):
                raise UserError(f"{flag} is given and searched by {self.file}: leave one of them out")
        import_optuna()
        try:
            commands = [self.command(values) for values in corners(self.space)]
        except (UserError, MisconfigurationException) as error:
            hint = "; step: 1 makes a range one of whole numbers" if "expected int" in str(error) else ""
            raise UserError(f"{self.file}: {error}{hint}") from error
        fit.prepare(self.base, "fit")
        for command in commands:
            command.datamodule.adopt_prepared(self.base.datamodule)
            fit.prepare(command)

    def _check_recipe(self) -> None:
        trainer, checkpoints = self.base.trainer, self.base.checkpoints
        if trainer.num_devices * trainer.num_nodes > 1:
            raise UserError("a sweep trains on one device: choose --devices 1 and --num_nodes 1")
        if not self.base.datamodule.num_val:
            raise UserError("a sweep judges trials by validation, and there is none: add --data.num_val 5000")
        judged = checkpoints is not None and (checkpoints.monitor, checkpoints.mode) == ("val/accuracy", "max")
        if self.base.run is None or not judged:
            raise UserError(
                "a sweep needs each run's folder, and its best.ckpt by validation accuracy: leave "
                "--trainer.enable_checkpointing, --trainer.fast_dev_run and --checkpoint.monitor as they are"
            )

    def run_trials(self) -> None:
        """Runs trials until there are as many as were asked for.

        Raises:
            UserError: the storage belongs to other settings, or no trial can be judged.
        """
        optuna = import_optuna()
        settings = {"space": self.space, "config": self.base.plain_config}
        check_unchanged(self.study, settings, {"space": f"{self.file}: ", "config": "--"})
        mark_killed(self.study)
        distributions = {key: distribution(entry) for key, entry in self.space.items()}
        done = trials_of(self.study)
        print(f"sweep {self.storage}: {len(done)} of {self.num_trials} trials are done", flush=True)
        for trial in done:
            self._print(trial)
        for index in range(len(done), self.num_trials):
            # a sampler for each trial, so that its draws depend on the seed and the trials before, and not on how often
            # the sweep was killed
            seed = np.random.SeedSequence([self.base.plain_config["seed_everything"], index]).generate_state(1)[0]
            self.study.sampler = optuna.samplers.TPESampler(seed=int(seed))
            self._run_trial(self.study.ask(distributions), index + 1)
            self._print(trials_of(self.study)[-1])
            gc.collect()  # a Trainer and its module refer to one another
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run_trial(self, trial: "optuna.Trial", number: int) -> None:
        """Trains, and records in Optuna and in the run's folder what came of it.

        Optuna gets a failed trial as a pruned one, so that the sampler keeps away from its values: it forgets failed
        ones. The true state stands in the trial's attribute `trial`.
        """
        from optuna.trial import TrialState

        started = time.perf_counter()
        record: dict[str, Any] = {"sweep": str(self.storage), "trial": number, "state": "running"}
        record["values"] = trial.params
        judge = _Judge(trial, record)
        with contextlib.redirect_stdout(io.StringIO()):
            seconds, reason = self._train(trial.params, judge, started)
        accuracy = max(judge.accuracies, default=None)
        if reason is None and accuracy is None:
            raise UserError("no trial can be judged: training ends before its first validation; let it run longer")
        record["state"] = "failed" if reason else "pruned" if judge.pruned else "complete"
        record |= {"accuracy": accuracy, "num_validations": len(judge.accuracies)}
        record |= {"seconds": {**seconds, "total": time.perf_counter() - started}}
        if reason:
            record["reason"] = " ".join(reason.split())
        trial.set_user_attr("trial", record)
        if "run" in record:
            write_trial(record)
        if record["state"] == "complete":
            self.study.tell(trial, accuracy)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def _train(self, values: Values, judge: "_Judge", started: float) -> tuple[dict[str, float], str | None]:
        """The seconds of a training run with these values, and the reason if it failed."""
        try:
            command = self.command(values)
            command.datamodule.adopt_prepared(self.base.datamodule)
            fit.prepare(command)
        except (UserError, MisconfigurationException) as error:  # values that do not go together
            return {}, str(error)
        judge.run = command.run
        command.trainer.callbacks.append(judge)  # type: ignore[attr-defined]
        try:
            return fit.train(command, started), None
        except DivergedError as error:
            return {}, str(error)
        except torch.OutOfMemoryError:
            return {}, "the GPU's memory is too small"
        except Stopped as stopped:
            raise Stopped(f"{str(stopped).split(';')[0]} of a trial; start the sweep again to go on") from stopped
        finally:
            if command.run is not None:
                command.run.unlock()

    def _print(self, trial: "FrozenTrial") -> None:
        record = trial.user_attrs["trial"]
        parts = [f"trial {record['trial']:>{len(str(self.num_trials))}} of {self.num_trials}", f"{record['state']:<8}"]
        parts += [f"{_percent(record['accuracy']):>7}", f"{record['seconds']['total']:.1f} s"]
        for key, value in trial.params.items():
            parts.append(f"{key} {f'{value:.4g}' if isinstance(value, float) else printable(flag_text(value))}")
        parts += [record.get("run", "no run"), *([record["reason"]] if "reason" in record else [])]
        print("  ".join(parts), flush=True)

    def finish(self) -> None:
        """Writes the best trial's config beside the storage, and tests that trial unless it was tested before.

        Raises:
            UserError: every trial failed, the best one's run is gone, or the config cannot be written.
        """
        best = self._best()
        record = best.user_attrs["trial"]
        run = Run(folder=Path(record["run"]))
        title = f"trial {record['trial']}, {_percent(record['accuracy'])} in validation"
        values = [f"{key}: {printable(flag_text(value))}" for key, value in best.params.items()]
        print("\n  ".join([f"\nBest: {title}", *values]))
        if not all(path.is_file() for path in (run.config, run.checkpoint("best"), run.checkpoint("last"))):
            raise UserError(f"the best trial's run {run.folder} is gone: put it back to have it tested")
        num_trials = len(trials_of(self.study))
        lines = [f"# The best of {num_trials} trials of a sweep over {printable(self.file.name)}: {title}."]
        lines += [f"#   {value}" for value in values]
        config = best_config(self.storage)
        with writing(config, "make its folder writable, and start the sweep again: only the test is left"):
            write_durably(config, "\n".join([*lines, run.config.read_text(encoding="utf-8")]).encode())
        print(f"Its config: {config}")
        if run.results.is_file():
            print(f"\nIt was tested before: {run.results}")
        else:
            self._test(best.params, run, record["seconds"])

    def _best(self) -> "FrozenTrial":
        from optuna.trial import TrialState

        trials = trials_of(self.study)
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if not complete:
            raise UserError(
                f"all {len(trials)} trials failed, the last one with: {trials[-1].user_attrs['trial']['reason']}; "
                "search other values with --storage FILE"
            )
        return max(complete, key=lambda trial: trial.value or 0.0)

    def _test(self, values: Values, run: Run, seconds: dict[str, float]) -> None:
        """Tests a trial's run as a run of fit does in the end: at its last step, with its best state."""
        state = read_checkpoint(run.checkpoint("last"))
        command = self.command(values, state)
        command.datamodule.adopt_prepared(self.base.datamodule)
        fit.prepare(command, "test")
        command.begin()
        command.trainer.fit_loop.load_state_dict(state["loops"]["fit_loop"])
        assert command.checkpoints is not None
        command.checkpoints.load_state_dict(state.chosen)
        try:
            fit.finish(command, time.perf_counter() - seconds["total"], seconds)
        finally:
            if command.run is not None:
                command.run.unlock()


class _Judge(Callback):
    """Reports the accuracy of each validation to Optuna, and ends the training run when the pruner says so."""

    def __init__(self, trial: "optuna.Trial", record: dict[str, Any]) -> None:
        self.trial = trial
        self.record = record
        self.accuracies: list[float] = []
        self.pruned = False
        self.run: Run | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitClassifier)
        assert self.run is not None
        self.record["run"] = str(self.run.folder)
        self.trial.set_user_attr("trial", self.record)  # first: a killed trial's folder is found by it
        write_trial(self.record)
        chosen = hyperparameters(pl_module.config)
        # most are there by their short name
        params = self.trial.params.items()
        more = {key: value for key, value in params if str(chosen.get(key.rsplit(".", 1)[-1])) != str(value)}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # which finds the value where each validation logs it
                for summary in hparams(chosen | more, {"val/accuracy": 0.0}):
                    logger.experiment._get_file_writer().add_summary(summary)
            else:
                logger.log_hyperparams(more)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, LitClassifier)
        self.accuracies.append(pl_module.reports["val"].accuracy)
        self.trial.report(self.accuracies[-1], step=len(self.accuracies))
        ends_anyway = trainer.current_epoch + 1 == trainer.max_epochs
        if not ends_anyway and self.trial.should_prune():
            self.pruned = trainer.should_stop = True


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f} %"


def _add_arguments(parser: Parser) -> None:
    parser.usage = f"{USAGE} [any flag of lit_cifar.fit]"
    parser.add_argument(
        "--study",
        type=str,
        default=None,
        help=f"YAML file of ranges and choices, or one by name: {', '.join(recipes('sweeps'))}",
    )
    parser.add_argument("--trials", type=int, default=None, help="how many trials to have in all")
    parser.add_argument(
        "--storage", type=str, default=None, help=f"SQLite file of the trials (default: {RUNS}/sweeps/NAME.db)"
    )


if __name__ == "__main__":
    machine.run(main)
