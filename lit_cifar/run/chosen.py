"""The loggers that were chosen for a run: where they write, how a resumed run goes on with them, and that their
failures cost nothing. logger.py has TensorBoard's events."""

import csv
import functools
import inspect
import io
import json
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyLogger

from lit_cifar import log
from lit_cifar.errors import UserError
from lit_cifar.files import read_json, write_durably, writing
from lit_cifar.run.folder import RUNS, Run
from lit_cifar.run.logger import RunLogger
from lit_cifar.text import printable

# what Lightning and this package call of a logger
CALLED = "log_metrics log_hyperparams log_graph log_image log_text after_save_checkpoint save finalize".split()  # noqa: SIM905
IDENTITIES = ("run_id", "experiment_key", "version", "id")  # under one of which a logger goes on with what it has begun
# MLflow 3.17 refuses folders without; after a kill -9 W&B's file lacks the newest 15 seconds without
ENVIRONMENT = {"MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1"}
# what people call a logger, and what follows --trainer.logger
WORDS = {"csv": "CSVLogger --trainer.logger.save_dir .", "wandb": "WandbLogger", "mlflow": "MLFlowLogger"}
WORDS |= {"comet": "CometLogger", "tensorboard": "true", "none": "false", "no": "false", "off": "false"}
IN_LIST = "in a list, TensorBoard is {class_path: TensorBoardLogger, init_args: {save_dir: .}}"
CHOICES = "choose true (TensorBoard), false, CSVLogger, WandbLogger, MLFlowLogger or CometLogger"


class _Rows(ExperimentWriter):
    """The rows of a CSVLogger, which a resumed run goes on with; Lightning's deletes them.

    Args:
        folder: of metrics.csv.
        resumed_step: later rows, and one that a kill has cut, are left out; None for a logger that begins.
    """

    def __init__(self, folder: str, resumed_step: int | None) -> None:
        self.resumed_step = resumed_step
        super().__init__(folder)
        if resumed_step is None or not os.path.isfile(self.metrics_file_path):
            return
        rows = [row for row in self._read() if row.get("step", "").isdecimal() and int(row["step"]) <= resumed_step]
        self.metrics_keys = sorted({key for row in rows for key in row})
        self._write(rows, self.metrics_keys)

    def _check_log_dir_exists(self) -> None:
        if self.resumed_step is None and os.path.isfile(self.metrics_file_path):
            super()._check_log_dir_exists()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(self._read(), fieldnames)

    def _read(self) -> list[dict[str, str]]:
        text = Path(self.metrics_file_path).read_bytes().decode(errors="replace")
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), restval="")
        return [{key: value for key, value in row.items() if key is not None} for row in rows]

    def _write(self, rows: list[dict[str, str]], keys: Sequence[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, keys)
        writer.writeheader()
        writer.writerows(rows)
        write_durably(Path(self.metrics_file_path), text.getvalue().encode())


def attempt(logger: Logger, call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Calls what a logger, or its experiment, can do. What fails there costs one warning, and not the run: that is not
    called again, nor anything of a logger that takes no metrics any more."""
    name = call.__name__
    lost: set[str] = vars(logger).setdefault("lost", set())
    if name in lost or ("log_metrics" in lost and name != "finish"):
        return None
    try:
        return call(*args, **settings)
    except Exception as error:  # a logger raises anything where a server is gone or a disk is full
        lost.add(name)
        if log.is_said("debug"):
            traceback.print_exception(error)
        message = printable(" ".join(str(error).split()))[:200]
        what = "it" if name == "log_metrics" else f"its {name}"
        log.warn(
            f"the logger {type(logger).__name__} failed in {name} ({type(error).__name__}: {message}): the run goes on "
            f"without {what}; --log_level debug prints more"
        )
        return None


def named_logger(reason: str) -> str:
    """Why --trainer.logger was refused, with what would do."""
    if reason.endswith("required: save_dir"):
        return f"{reason}: add --trainer.logger.save_dir . for the run's folder; {IN_LIST}"
    reason, _, word = re.sub(r"^(there is no class (\S*?)): .*", r"\1\n\2", reason).partition("\n")
    if not word:
        return reason
    if word in ("True", "False"):
        return f"{word.lower()} cannot stand beside others: {IN_LIST}"
    known = WORDS.get(word.lower().removesuffix("logger"))
    return f"{reason}: " + (f"use --trainer.logger {known}" if known else f"name it as package.Class, or {CHOICES}")


def make_loggers(chosen: Any, run: Run, resumed_step: int | None) -> list[Logger]:
    """TensorBoard in the run's folder, or the loggers that were chosen, which save there too if no place was chosen.

    They are open then, and closed when the run is unlocked. A resumed run's go on with what they began.

    Args:
        chosen: --trainer.logger: one or several as class_path and init_args; None and True are TensorBoard, False none.
        run: with a folder, on rank 0; the loggers of other ranks write nothing.
        resumed_step: the step that a resumed run goes on from.

    Raises:
        UserError: a logger cannot be made.
    """
    chosen = chosen if isinstance(chosen, list) else [] if chosen is False else [chosen]
    if log.rank():
        return [DummyLogger() for _ in chosen]
    if chosen in ([None], [True]):
        return [RunLogger(run, resumed_step)]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = _begun(run) if resumed_step is not None else {}
    begun: dict[str, list[Any]] = {}
    loggers = []
    for settings in chosen:
        earlier = before.get(settings.class_path, [])
        of_class = begun.setdefault(settings.class_path, [])
        number = len(of_class)
        identity = earlier[number] if number < len(earlier) else None
        try:
            logger, now = _make(settings, run, resumed_step, number, identity)
        except Exception as error:  # a logger raises anything where its package is missing or its server is not there
            reason = re.sub(r"^Problem with given class_path '.*?': ", "", " ".join(str(error).split()))
            if identity is not None:
                reason = f"{reason.rstrip('.')}; to go on without what it began, {identity}, remove {run.loggers}"
            raise UserError(f"--trainer.logger {settings.class_path} cannot be made: {reason}") from error
        of_class.append(now)
        loggers.append(logger)
    if begun:
        with writing(run.loggers, "make room or fix the folder"):
            write_durably(run.loggers, (json.dumps({**before, **begun}) + "\n").encode())
    return loggers


def _make(
    settings: Namespace, run: Run, resumed_step: int | None, number: int, identity: str | int | None
) -> tuple[Logger, str | int | None]:
    """A logger, open, and what it can go on under.

    Args:
        settings: class_path and init_args.
        number: how many of its class stand before it.
        identity: under which the resumed run's has begun; None for one that begins.
    """
    settings = settings.clone()
    given = settings.get("init_args") or Namespace()
    _place(settings.class_path, given, run, number)
    if identity is None:
        resumed_step = None
    elif free := [key for key in IDENTITIES if given.get(key, "none") is None]:
        given[free[0]] = identity
        if given.get("resume", "none") is None:  # of W&B: jsonargparse sets what Lightning would have set
            given["resume"] = "allow"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--logger", type=Logger)
    logger: Any = parser.instantiate_classes(parser.parse_object({"logger": settings})).logger
    if type(logger) is TensorBoardLogger:
        ours = RunLogger(run, resumed_step, Path(logger.log_dir), logger._prefix, **logger._kwargs)
        return ours, logger.version
    if isinstance(logger, TensorBoardLogger) and resumed_step is not None:
        logger._kwargs["purge_step"] = resumed_step + 1
    if isinstance(logger, CSVLogger) and "://" not in logger.log_dir:
        logger._experiment = _Rows(logger.log_dir, resumed_step)
    experiment = getattr(logger, "experiment", None)  # which opens it
    if callable(finish := getattr(experiment, "finish", None)):  # W&B's, or it would go on in the process's next run
        run.closing.callback(lambda: attempt(logger, finish, exit_code=int(sys.exc_info()[0] is not None)))
    for name in CALLED:
        if callable(method := getattr(logger, name, None)):
            setattr(logger, name, functools.partial(attempt, logger, method))
    if resumed_step is not None:
        done = resumed_step if run.tested_step == resumed_step else None  # only the test is left, as logged
        known = _known(logger, experiment, resumed_step)
        logger.log_metrics = functools.partial(_log_new, logger.log_metrics, done, known)
    logger.is_resumed = resumed_step is not None
    version = logger.version
    return logger, version if isinstance(version, (str, int)) else None


def _place(class_path: str, given: Namespace, run: Run, number: int) -> None:
    """Has a logger write into the run's folder, unless its settings name another place: the second one of a class into
    a folder of its own there, as far as Lightning's names of folders are asked for."""
    if "save_dir" not in given:
        return
    defaults: dict[str, Any] = {}
    for base in reversed(getattr(pkgutil.resolve_name(class_path), "__mro__", ())):  # some hand settings on by **kwargs
        defaults |= {key: parameter.default for key, parameter in inspect.signature(base.__init__).parameters.items()}
    default, place = defaults.get("save_dir"), given["save_dir"]
    roots = {run.root.resolve(), run.folder.resolve().parent.parent}
    if place not in (None, default) and Path(place).resolve() not in roots:
        return
    if defaults.get("name") != RUNS.name or not {"name", "version"} <= set(vars(given)):
        # absolute: W&B's service and MLflow's stores outlive a run, and know the working folder of their beginning
        given["save_dir"] = os.path.abspath(run.folder / (default if isinstance(default, str) else ""))
        return
    chosen = [part for part in (given["name"], given["version"]) if part not in (None, "", RUNS.name)]
    if number:
        chosen.append(f"{class_path.rsplit('.', 1)[-1].removesuffix('Logger').lower()}-{number + 1}")
    given["save_dir"], given["name"] = str(run.folder.parent), ""
    given["version"] = os.path.join(run.folder.name, *map(str, chosen))


def _begun(run: Run) -> dict[str, list[Any]]:
    """By class, under what its loggers in the run have begun; no path to elsewhere."""
    begun = {name: identities for name, identities in read_json(run.loggers).items() if isinstance(identities, list)}
    return {name: [one if _is_name(one) else None for one in identities] for name, identities in begun.items()}


def _is_name(identity: Any) -> bool:
    return isinstance(identity, (str, int)) and ".." not in str(identity) and not os.path.isabs(str(identity))


def _known(logger: Any, experiment: Any, resumed_step: int) -> dict[tuple[str, int], float]:
    """By tag and step, what MLflow, which cannot forget, has of the resumed step and of later ones."""
    if not isinstance(logger, MLFlowLogger):
        return {}
    names, history = experiment.get_run(logger.run_id).data.metrics, experiment.get_metric_history
    points = [point for name in names for point in history(logger.run_id, name) if point.step >= resumed_step]
    return {(point.key.removeprefix(f"{logger._prefix}-"), point.step): point.value for point in points}


def _log_new(
    log_metrics: Callable[..., Any],
    done: int | None,
    known: Mapping[tuple[str, int], float],
    metrics: Mapping[str, Any],
    step: int = 0,
) -> None:
    """Logs what is not logged already: nothing of a step that is `done`, nor what is `known`."""
    new = {name: value for name, value in metrics.items() if step != done and known.get((name, step)) != value}
    if new:
        log_metrics(new, step)
