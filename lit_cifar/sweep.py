"""`python -m lit_cifar.sweep CONFIG --study SPACE.yaml --trials N`: searches settings with Optuna. How a trial is
trained and tested is fit's."""

import contextlib
import gc
import io
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lit_cifar import fit
from lit_cifar.cli import machine
from lit_cifar.cli.command import CLI, set_up
from lit_cifar.cli.parser import Parser
from lit_cifar.errors import DivergedError, UserError
from lit_cifar.files import write_durably
from lit_cifar.model.module import LitClassifier
from lit_cifar.run.folder import RESULTS, RUNS, TRIAL, Run
from lit_cifar.run.read import State, read_checkpoint
from lit_cifar.text import columns, nearest, printable
from lit_cifar.training.dashboard import hyperparameters

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

USAGE = "python -m lit_cifar.sweep CONFIG --study SPACE.yaml --trials N"
STUDY = "lit_cifar"  # the one study of a storage
# What trials are judged by, and where they run, is the same for all: a search would find the easiest test.
NOT_SEARCHED = ("data.data_dir", "data.dataset", "data.num_val", "data.mirrors", "trainer.default_root_dir")
Space = dict[str, dict[str, Any]]  # by dotted key: {"choices": texts}, or {"low", "high", "log", "step"}
Values = dict[str, Any]  # by dotted key


def main(args: list[str]) -> None:
    """Searches, then tests the best trial once; `args` is the command line without the program's name."""
    if args and not args[0].startswith("-"):
        args = ["--config", *args]
    elif not {"-h", "--help"} & set(args):
        raise UserError(f"the recipe comes first: {USAGE}")
    sweep = Sweep(args)
    sweep.check()
    with sweep.open_storage():
        sweep.run_trials()
        sweep.tell_trials()
        sweep.finish()


class Sweep:
    """One storage's search: what is searched, the trials so far, and the best of them.

    Trials run one after another in this process, each from a command line of its own, as `lit_cifar.fit` would run it.
    All share the images, which are read once.
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
        self.file = Path(options["study"])
        self.space = read_space(self.file, self.base.parser)
        configs = [Path(str(path)).stem for path in self.base.config["config"] if path]
        name = "-".join(dict.fromkeys([*configs, self.file.stem]))
        root = self.base.config["trainer"]["default_root_dir"] or "."
        self.storage = Path(options["storage"] or Path(root) / RUNS / "sweeps" / f"{name}.db")

    def command(self, values: Values, state: State | None = None) -> CLI:
        """The command of a training run with these values, or that of one which goes on from a state."""
        # what earlier trials leave behind in this process, where a run of fit has a process of its own
        torch.set_num_threads(self.num_threads)  # one of small steps takes one thread
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # one that is compiled leaves code for its shapes
        flags = [f"--{key}={_flag_text(value)}" for key, value in values.items()]
        return set_up(
            [*self.args, *flags],
            prog=USAGE,
            description="Searches the settings that SPACE.yaml names, by validation accuracy, and tests the best once.",
            start=lambda settings: (state, {}) if state else None,
            add_arguments=_add_arguments,
        )

    def check(self) -> None:
        """Reads the images, and finds out what is wrong with the input, before anything is written.

        Raises:
            UserError: something is.
        """
        trainer, data = self.base.trainer, self.base.datamodule
        if trainer.num_devices * trainer.num_nodes > 1:
            raise UserError("a sweep trains on one device: choose --devices 1 and --num_nodes 1")
        if not data.num_val:
            raise UserError(
                "a sweep judges by validation accuracy, and there is no validation: add --data.num_val 5000"
            )
        checkpoints = self.base.checkpoints
        judged = checkpoints is not None and (checkpoints.monitor, checkpoints.mode) == ("val/accuracy", "max")
        if self.base.run is None or not judged:
            raise UserError(
                "a sweep needs each run's folder, and its best.ckpt by validation accuracy: leave "
                "--trainer.enable_checkpointing, --trainer.fast_dev_run and --checkpoint.monitor as they are"
            )
        for key in self.space:
            option = self.base.parser.option(key)
            flag = self.base.parser.typed_as(option.option_strings if option else [f"--{key}"])
            if flag is not None:
                raise UserError(f"{flag} is given and searched by {self.file}: leave one of them out")
        _import_optuna()
        try:
            corners = [self.command(values) for values in _corners(self.space)]
        except (UserError, MisconfigurationException) as error:
            hint = "; step: 1 makes a range one of whole numbers" if "expected int" in str(error) else ""
            raise UserError(f"{self.file}: {error}{hint}") from error
        fit.prepare(self.base, "fit")
        for corner in corners:
            corner.datamodule.adopt_prepared(data)
            fit.prepare(corner)

    @contextlib.contextmanager
    def open_storage(self) -> Iterator[None]:
        """Opens or makes the storage, which no other sweep can use meanwhile.

        Raises:
            UserError: another one does, it is no storage, or it is that of other settings.
        """
        optuna = _import_optuna()
        from sqlalchemy.engine import URL
        from sqlalchemy.exc import SQLAlchemyError

        try:
            self.storage.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.storage.with_suffix(".lock"))
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another sweep is at {self.storage}: wait for it, or name another --storage") from None
        except OSError as error:
            raise UserError(
                f"cannot write to {self.storage.parent} ({error.strerror}): name another --storage"
            ) from None
        storage = None
        try:
            url = URL.create("sqlite", database=str(self.storage)).render_as_string()
            storage = optuna.storages.RDBStorage(url)
            self.study = optuna.create_study(
                study_name=STUDY,
                storage=storage,
                direction="maximize",
                pruner=optuna.pruners.MedianPruner(),
                load_if_exists=True,
            )
            self._check_unchanged()
            yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"the storage {self.storage} cannot be used ({cause}): name another --storage") from error
        finally:
            if storage is not None:
                storage.engine.dispose()
            lock.release()

    def _check_unchanged(self) -> None:
        settings = json.loads(json.dumps({"config": self.base.plain_config, "space": self.space}))
        before = self.study.user_attrs.get("settings")
        if before is None:
            self.study.set_user_attr("settings", settings)
            return
        for change in (
            *_changes(before["space"], settings["space"], f"{self.file}: "),
            *_changes(before["config"], settings["config"], "--"),
        ):
            raise UserError(
                f"{change}; the sweep at {self.storage} goes on with what it began with: undo the change, or begin "
                "another one with --storage FILE"
            )

    def trials(self) -> "list[FrozenTrial]":
        """The trials that count, in their order: complete, pruned and failed ones, not those that were killed."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def run_trials(self) -> None:
        """Runs trials until there are as many as were asked for."""
        optuna = _import_optuna()
        running = optuna.trial.TrialState.RUNNING
        for trial in self.study.get_trials(deepcopy=False, states=(running,)):  # nobody else holds the lock: it is dead
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            record = trial.user_attrs.get("trial")  # none where it was killed before it had a run's folder
            if record and Path(record["run"]).is_dir():
                _write_trial(Path(record["run"]), {**record, "state": "killed"})
        distributions = {key: _distribution(entry) for key, entry in self.space.items()}
        done = self.trials()
        print(f"sweep {self.storage}: {len(done)} of {self.num_trials} trials are there", flush=True)
        for index in range(len(done), self.num_trials):
            # a sampler for each trial, so that its draws depend on the seed and the trials before, and not on how often
            # the sweep was killed
            seed = np.random.SeedSequence([self.base.plain_config["seed_everything"], index]).generate_state(1)[0]
            self.study.sampler = optuna.samplers.TPESampler(seed=int(seed))
            self._run_trial(self.study.ask(distributions), index + 1)
            self._print_newest()
            gc.collect()  # a Trainer and its module refer to one another
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run_trial(self, trial: "optuna.Trial", number: int) -> None:
        """Trains and tells Optuna what came of it.

        Optuna is told that a failed trial was pruned: so the sampler keeps away from its values, where it would forget
        one that failed. What it was stands in the trial's attribute `trial`.
        """
        from optuna.trial import TrialState

        started = time.perf_counter()
        record: dict[str, Any] = {
            "sweep": str(self.storage),
            "trial": number,
            "state": "running",
            "values": trial.params,
        }
        judge = _Judge(trial, record)
        seconds: dict[str, float] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            reason = None
            try:
                command = self.command(trial.params)
                command.datamodule.adopt_prepared(self.base.datamodule)
                fit.prepare(command)
            except (UserError, MisconfigurationException) as error:  # of values that do not go together
                reason = str(error)
            else:
                judge.run = command.run
                command.trainer.callbacks.append(judge)  # type: ignore[attr-defined]
                try:
                    seconds = fit.train(command, started)
                except DivergedError as error:
                    reason = str(error)
                except torch.OutOfMemoryError:
                    reason = "the GPU's memory is too small"
        accuracy = max(judge.accuracies, default=None)
        if reason is None and accuracy is None:
            raise UserError("no trial can be judged: the training ends before its first validation; let it run longer")
        record["state"] = "failed" if reason else "pruned" if judge.pruned else "complete"
        record |= {"accuracy": accuracy, "num_validations": len(judge.accuracies)}
        record |= {"seconds": {**seconds, "total": time.perf_counter() - started}}
        if reason:
            record["reason"] = " ".join(reason.split())
        trial.set_user_attr("trial", record)
        if "run" in record:
            _write_trial(Path(record["run"]), record)
        if record["state"] == "complete":
            self.study.tell(trial, accuracy)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)

    def _print_newest(self) -> None:
        trials = self.trials()
        trial = trials[-1]
        record = trial.user_attrs["trial"]
        parts = [f"trial {len(trials):>{len(str(self.num_trials))}} of {self.num_trials}", f"{record['state']:<8}"]
        parts += [f"{_percent(record['accuracy']):>7}", f"{record['seconds']['total']:.1f} s"]
        parts += [f"{key} {_cell(value)}" for key, value in trial.params.items()]
        parts += [record.get("run", "no run"), *([record["reason"]] if "reason" in record else [])]
        print("  ".join(parts), flush=True)

    def tell_trials(self) -> None:
        """Prints a table of all trials."""
        headings = ["trial", "state", "val accuracy", "validations", "seconds", *self.space, "run"]
        rows = [headings]
        for trial in self.trials():
            record = trial.user_attrs["trial"]
            rows.append(
                [
                    str(record["trial"]),
                    record["state"],
                    _percent(record["accuracy"]),
                    str(record["num_validations"]),
                    f"{record['seconds']['total']:.1f}",
                    *(_cell(trial.params[key]) for key in self.space),
                    Path(record.get("run", "-")).name,
                ]
            )
        print(f"\n{columns(rows, right=[i for i in range(len(headings) - 1) if i != 1])}")

    def finish(self) -> None:
        """Writes the best trial's config beside the storage, and tests that trial unless that was done.

        Raises:
            UserError: every trial failed, or the best one's run is gone.
        """
        from optuna.trial import TrialState

        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        if not complete:
            raise UserError(
                f"all {len(self.trials())} trials failed, the last one so: "
                f"{self.trials()[-1].user_attrs['trial']['reason']}; search other values with --storage FILE"
            )
        best = max(complete, key=lambda trial: trial.value or 0.0)
        record = best.user_attrs["trial"]
        run = Path(record["run"])
        values = [f"{key}: {printable(_flag_text(value))}" for key, value in best.params.items()]
        print(f"\nBest: trial {record['trial']}, {_percent(record['accuracy'])} in validation")
        print("\n".join(f"  {value}" for value in values))
        last = run / "checkpoints" / "last.ckpt"
        if not (run / "config.yaml").is_file() or not last.with_name("best.ckpt").is_file() or not last.is_file():
            raise UserError(f"the best trial's run {run} is gone: put it back to have it tested")
        lines = [
            f"# The best of {len(self.trials())} trials of a sweep over {printable(self.file.name)}: trial "
            f"{record['trial']}, {_percent(record['accuracy'])} in validation.",
            *(f"#   {value}" for value in values),
            (run / "config.yaml").read_text(),
        ]
        config = self.storage.with_suffix(".best.yaml")
        write_durably(config, "\n".join(lines).encode())
        print(f"Its config: {config}")
        if (run / RESULTS).is_file():
            print(f"\nIt was tested before: {run / RESULTS}")
            return
        state = read_checkpoint(last)
        command = self.command(best.params, state)
        command.datamodule.adopt_prepared(self.base.datamodule)
        fit.prepare(command, "test")
        command.begin()
        # the test stands at the training run's last step, and knows its best, as it does in a run of fit
        command.trainer.fit_loop.load_state_dict(state["loops"]["fit_loop"])
        assert command.checkpoints is not None
        command.checkpoints.load_state_dict(state.chosen)
        fit.finish(command, time.perf_counter() - record["seconds"]["total"], record["seconds"])


class _Judge(Callback):
    """Tells Optuna the accuracy of each validation, and ends the training when the pruner says so."""

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
        _write_trial(self.run.folder, self.record)
        chosen = hyperparameters(pl_module.config)
        for key, value in self.trial.params.items():
            if key.rsplit(".", 1)[-1] not in chosen:  # most are there by their short name
                chosen[key] = value
        # TensorBoard finds the value under this tag, where each validation logs it
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for summary in hparams(chosen, {"val/accuracy": 0.0}):
                    logger.experiment._get_file_writer().add_summary(summary)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, LitClassifier)
        self.accuracies.append(pl_module.reports["val"].accuracy)
        self.trial.report(self.accuracies[-1], step=len(self.accuracies))
        ends_anyway = trainer.current_epoch + 1 == trainer.max_epochs
        if not ends_anyway and self.trial.should_prune():
            self.pruned = trainer.should_stop = True


def read_space(file: Path, parser: Parser) -> Space:
    """What a file of dotted keys says to search, by the keys that configs have.

    Raises:
        UserError: it cannot be read, or a key, a range or a list of choices is none.
    """
    try:
        entries = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"--study {file} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--study {file} is no valid YAML: {error}") from None
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"--study {file} maps no keys to what is searched, such as model.lr: {{low: 0.001, high: 0.1}}")
    space: Space = {}
    for key, entry in entries.items():
        where = f"{file}: {printable(str(key))}"
        dotted = _dotted(str(key), file, parser)
        if dotted in space:
            raise UserError(f"{where} stands there twice, in two spellings: leave one")
        space[dotted] = _entry(where, entry)
    return dict(sorted(space.items()))  # whose order decides a sampler's draws


def _dotted(key: str, file: Path, parser: Parser) -> str:
    option = parser.option(key)
    known = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
    # keys of a class, such as model.net.num_classes, are known to the parser once it knows the class
    inside = any("." in name and key.startswith(f"{name}.") for name in known)
    if option is None and not inside:
        raise UserError(f"{file}: unknown key {key!r}{nearest(key, known)}; --print_config lists the keys")
    dotted = option.dest if option else key
    if dotted in NOT_SEARCHED or not dotted.startswith(("model.", "data.", "trainer.")):
        raise UserError(f"{file}: {key} cannot be searched: all trials of a sweep share it; give it as a flag")
    return dotted


def _entry(where: str, entry: Any) -> dict[str, Any]:
    names = ("choices", "low", "high", "log", "step")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected {{low: ..., high: ...}} or {{choices: [...]}}, got {entry!r}")
    for name in entry:
        if name not in names:
            raise UserError(f"{where}: unknown key {name!r}{nearest(str(name), names)}; known are {', '.join(names)}")
    if "choices" in entry:
        choices = entry["choices"]
        if len(entry) > 1 or not isinstance(choices, list) or not choices:
            raise UserError(f"{where}: choices is a list of one value or more, and stands alone; got {entry!r}")
        texts = [_flag_text(choice) for choice in choices]
        if len(set(texts)) < len(texts):
            raise UserError(f"{where}: one of the choices {', '.join(texts)} stands there twice")
        return {"choices": texts}
    if not {"low", "high"} <= entry.keys():
        raise UserError(f"{where}: a range needs both low and high; got {entry!r}")
    low, high = (_number(where, name, entry[name]) for name in ("low", "high"))
    log, step = entry.get("log", False), entry.get("step")
    step = None if step is None else _number(where, "step", step)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log: expected true or false, got {log!r}")
    whole = all(isinstance(value, int) for value in (low, high, step))
    if low >= high:
        raise UserError(f"{where}: the range is empty: low {low} is not below high {high}")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{where}: the range has no second value: step {step} is not between 0 and high minus low")
    if log and (low <= 0 or (step is not None and not (whole and step == 1))):
        raise UserError(f"{where}: log: true needs low above 0, and no step but 1 of whole numbers; got {entry!r}")
    if not whole:
        low, high = float(low), float(high)
    return {"low": low, "high": high, "log": log, "step": step}


def _number(where: str, name: str, value: Any) -> int | float:
    if isinstance(value, str):  # YAML 1.1 takes 1e-3, without a point, for text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: {name}: expected a number, got {value!r}")
    return value


def _distribution(entry: dict[str, Any]) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "choices" in entry:
        return CategoricalDistribution(entry["choices"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # high comes down to what steps reach, as in Python's range
        if isinstance(entry["low"], int):
            return IntDistribution(entry["low"], entry["high"], log=entry["log"], step=entry["step"])
        return FloatDistribution(entry["low"], entry["high"], log=entry["log"], step=entry["step"])


def _corners(space: Space) -> Iterator[Values]:
    """Values among which is every choice, and both ends of every range."""
    for i in range(max(2, *(len(entry.get("choices", ())) for entry in space.values()))):
        yield {
            key: entry["choices"][i % len(entry["choices"])] if "choices" in entry else entry[("low", "high")[i % 2]]
            for key, entry in space.items()
        }


def _changes(before: Any, now: Any, where: str, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _changes(before.get(name), now.get(name), where, f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{where}{key} was {_shown(before)} and is now {_shown(now)}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else printable(_flag_text(value))


def _flag_text(value: Any) -> str:
    """A value as it is typed behind a flag."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(_flag_text(value))


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f} %"


def _write_trial(run: Path, record: dict[str, Any]) -> None:
    write_durably(run / TRIAL, (json.dumps(record, indent=2) + "\n").encode())


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("--study", type=str, default=None, help="YAML file of what is searched: ranges and choices")
    parser.add_argument("--trials", type=int, default=None, help="how many trials there are to be in all")
    parser.add_argument(
        "--storage", type=str, default=None, help=f"SQLite file of the trials (default: {RUNS}/sweeps/NAME.db)"
    )


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("a sweep needs Optuna: pip install 'lit_cifar[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # each trial has a line of ours
    return optuna


if __name__ == "__main__":
    machine.run(main)
