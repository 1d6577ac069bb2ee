"""`python -m lit_cifar.fit`: trains, then tests once. `sweep` trains and tests with the same functions."""

import time

from lit_cifar import process

_started = time.perf_counter()  # before the imports, which are part of what a run costs
if __name__ == "__main__":
    process.begin()

import gc  # noqa: E402
import os  # noqa: E402
import warnings  # noqa: E402
from datetime import UTC, datetime  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from jsonargparse import Namespace  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import WeightAveraging  # noqa: E402

from lit_cifar import clock, log  # noqa: E402
from lit_cifar.cli import checks, finders, machine  # noqa: E402
from lit_cifar.cli.command import CLI, set_up  # noqa: E402
from lit_cifar.cli.configs import changes  # noqa: E402
from lit_cifar.cli.parser import TRUST, Parser  # noqa: E402
from lit_cifar.errors import UserError, calls_chosen  # noqa: E402
from lit_cifar.files import check_place, read_json, writing  # noqa: E402
from lit_cifar.model.classifier import checked_config  # noqa: E402
from lit_cifar.results.report import peak_memory, print_report, write_results  # noqa: E402
from lit_cifar.run.check import check_state  # noqa: E402
from lit_cifar.run.folder import Run  # noqa: E402
from lit_cifar.run.read import State, find_checkpoint, read_checkpoint  # noqa: E402
from lit_cifar.text import in_command, inherited  # noqa: E402

SECTIONS = ("seed_everything", "trainer", "model_class", "model", "data", "checkpoint", "running_loss")  # of a config
# what the end of a training run depends on
LIMITS = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "callbacks")
ORDER = ("dataset", "batch_size", "num_val", "drop_last")  # settings of data that the order of images follows from
RATES = ("scheduler_interval", "lr", "momentum", "weight_decay", "nesterov", "groups")
IMPORT_SECONDS = time.perf_counter() - _started


@in_command()
def main(args: list[str]) -> None:
    """Trains, tests and reports; `args` is the command line without the program's name."""
    started = time.perf_counter() - IMPORT_SECONDS
    command = set_up(
        args,
        prog="python -m lit_cifar.fit",
        description="Trains a net on CIFAR-10, then tests it once. Without arguments: PyTorch's CIFAR-10 tutorial.",
        start=_resumed,
        add_arguments=add_arguments,
    )
    prepare(command, "fit", "test")
    try:
        finish(command, started, train(command, started))
    finally:
        if command.run is not None:
            command.run.unlock()


def prepare(command: CLI, *stages: str) -> None:
    """Gets and reads the data of the stages, 'fit' among them, and checks that they can be trained on, and that a run
    to resume was trained on them.

    What can be wrong with the input is found here, before anything is written. Every process does it: locks let one of
    them download or decode, and no collective call can time out meanwhile.

    Raises:
        UserError: the data are missing or damaged, or the settings do not suit them.
    """
    data = command.datamodule
    with machine.on_each_node():
        data.prepare_data()
        for stage in stages:
            data.setup(stage)
    data.train_batches()
    finders.check_finders(command.trainer, command.model, data)
    command.model.trainer, command.trainer.datamodule = command.trainer, data  # type: ignore[attr-defined]
    if command.state:
        command.model.check_fits(command.state, data.classes)
        _check_unchanged(command.state.config, command.plain_config)
        check_state(command.state, command.trainer, command.model)
        _check_position(command.state, len(data.train_batches()))
        _check_length(command.state, command.trainer)
    command.model.set_classes(data.classes)
    checks.check_training(command.trainer, command.model, data)


@calls_chosen("in training")
def train(command: CLI, started: float) -> dict[str, float]:
    """Trains, from the command's state if it has one, and gives the seconds of `results.json` so far.

    Args:
        command: set up and prepared; it begins its run here.
        started: when the run began, on time.perf_counter's clock.

    Raises:
        UserError: the loss or a weight is no longer finite (DivergedError), or a file cannot be written.
    """
    trainer = command.trainer
    clock.reset()
    command.begin()
    if command.run is not None:
        command.run.started, command.run.earlier = started, _earlier_seconds(command.run, command.state)
        if command.trainer.is_global_zero:
            check_place(command.run.results, "move it away, or make its folder writable")
        if command.state and command.checkpoints and _is_stopped(command.state, command.plain_config):
            command.checkpoints.stopped = True
            if trainer.is_global_zero:
                log.tell("a callback has ended this run: to train longer, choose more --max_epochs or other callbacks")
        # ModelCheckpoint says it of a run that goes on
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    path = command.state.path if command.state else None
    command.state = None  # its tensors are as large as the net's
    gc.freeze()  # what is imported stays: searching it for garbage took 0.2 s before an epoch of 12,500 steps
    fit_started = time.perf_counter()
    try:
        with inherited(log.CHILD_VARIABLE, str(path or "")):
            trainer.fit(command.model, datamodule=command.datamodule, ckpt_path=path, weights_only=True)
    finally:
        gc.unfreeze()  # or what an earlier run of this process left, its images among it, would stay for ever
    fit_ended = time.perf_counter()
    # the first two if nothing was left to train
    return {"start": fit_ended - started, "first_step": 0.0, "fit": fit_ended - fit_started, **clock.seconds()}


@calls_chosen("in the test")
def finish(command: CLI, started: float, seconds: dict[str, float]) -> None:
    """Tests once, writes `results.json` and prints the report.

    The state that is tested is the best where validation chose one, else the last; it is one of the run's files.
    """
    trainer, model, data, run = command.trainer, command.model, command.datamodule, command.run
    test_started, compiled = time.perf_counter(), clock.seconds().get("compile", 0.0)
    tested = None
    if run is not None and (checkpoints := command.checkpoints) is not None:
        tested = "best" if data.num_val and checkpoints.has_best(trainer) else "last"
        if tested == "last" and checkpoints.has_final(trainer):
            tested = "final"
        elif tested == "last" and not run.checkpoint("last").is_file():
            tested = None  # no step was taken
    path = run.checkpoint(tested) if run and tested in ("best", "final") else None  # the last state is in memory
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback._average_model = None  # or the state's average would give way to the weights that it was made of
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback, but loading")
    trainer.test(model, datamodule=data, ckpt_path=path, weights_only=True, verbose=False)
    if not trainer.is_global_zero:
        return
    try:
        if run is not None:  # first: what is printed may fail, on a terminal that is gone or cannot show it
            now, compiled = time.perf_counter(), clock.seconds().get("compile", 0.0) - compiled  # for the test
            piece = {**seconds, "compile": seconds.get("compile", 0.0) + compiled}
            piece |= {"test": now - test_started - compiled, "total": now - started}
            pieces = [*run.earlier, piece]
            whole = {key: sum(piece.get(key, 0.0) for piece in pieces) for key in piece}
            again = f", then test again with --resume {run.folder}" if run.checkpoint("last").is_file() else ""
            with writing(run.results, f"make room or fix the folder{again}"):
                write_results(run.results, _results(command, tested, {**whole, "pieces": pieces}))
    finally:
        print_report(model.reports["test"], model.reports.get("plain"), num_all=len(data.test.labels))
    if run is not None:
        print(f"\nRun: {run.folder}\nDashboards: tensorboard --logdir {run.folder.parent}")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--resume",
        type=str,
        default=None,
        help="go on with a run: 'auto' for the newest ('if-any': or start one), its folder, or a .ckpt file",
    )
    parser.add_argument("--trust", type=bool, default=False, help=TRUST)


def _resumed(settings: Namespace) -> tuple[State, dict[str, Any]] | None:
    """The state that --resume means, and its config."""
    machine.set_log_level(settings.log_level)
    resume = os.environ.get(log.CHILD_VARIABLE, settings.resume)
    try:
        path = find_checkpoint(resume, Path(settings["trainer.default_root_dir"] or ".")) if resume else None
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"--resume {resume}: {error.filename} cannot be read ({error.strerror})") from None
    if path is None:
        return None
    state = read_checkpoint(path)
    if state.is_net:
        raise UserError(
            f"--resume {resume}: it is a net alone, without the state of a training run to go on with; start a run "
            "with --config, or give the net to lit_cifar.test, predict or export"
        )
    return state, checked_config(state, settings, dict.fromkeys(SECTIONS))


def _check_length(state: State, trainer: Trainer) -> None:
    """What a run has behind it cannot be taken back; as much again is a run with nothing left to train."""
    (position,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    num_epochs = position["epoch"] + (position["batch"] > 0)  # begun
    for flag, limit, done in (
        ("max_epochs", trainer.max_epochs, num_epochs),
        ("max_steps", trainer.max_steps, state.step),
    ):
        if limit is not None and 0 <= limit < done:
            raise UserError(
                f"--{flag} {limit} is less than the {done} that {state.path} has behind it: choose at least {done}, or "
                "resume from an earlier checkpoint"
            )


def _is_stopped(state: State, config: dict[str, Any]) -> bool:
    """Whether a callback, such as EarlyStopping, has ended the run, which is resumed as it was: EarlyStopping itself
    would train until the next validation, with another end than that of a run that was not killed in its test."""
    before, now = state.config.get("trainer", {}), config["trainer"]
    same = all(before.get(key) == now[key] for key in LIMITS)
    return state.chosen.get("stopped") is True and same and bool(now["callbacks"])  # without: a sweep ended it


def _earlier_seconds(run: Run, state: State | None) -> list[dict[str, float]]:
    """Seconds of each piece of the run that led to a state: of results.json, if that is of this state and so knows of
    its test too, else of the state; empty where neither was noted."""
    if state is None:
        return []
    noted: Any = state.chosen.get("seconds")
    results = read_json(run.results) if run.is_claimed else {}
    if results.get("num_steps") == state.step:
        whole = results.get("seconds")
        noted = whole.get("pieces", [whole]) if isinstance(whole, dict) else noted
    if not (isinstance(noted, list) and all(isinstance(piece, dict) for piece in noted)):
        return []
    return [
        {key: float(value) for key, value in piece.items() if type(value) in (int, float) and 0 <= value < 1e12}
        for piece in noted
    ]


def _check_unchanged(then: dict[str, Any], now: dict[str, Any]) -> None:
    """What a run keeps: the order of its images, and the class of its optimiser. With a scheduler of the user's also
    what that goes by: its state holds what it was made with, and torch restores it over what is wanted."""
    models = then.get("model", {}), now["model"]
    has_scheduler = all(model.get("scheduler") for model in models)
    changed = list(changes(then.get("seed_everything", now["seed_everything"]), now["seed_everything"], "--seed"))
    for section, keys in (("data", ORDER), ("model", ("optimizer", "scheduler", *(RATES if has_scheduler else ())))):
        for key in keys:
            after = now[section].get(key)
            before = then.get(section, {}).get(key, after)
            if key == "optimizer" and not has_scheduler:
                before, after = (value["class_path"] if isinstance(value, dict) else value for value in (before, after))
            changed += changes(before, after, f"--{section}.{key}")
    if changed:
        raise UserError(f"--resume: {', '.join(changed)}; a run goes on with what it began with: leave the flag out")


def _check_position(state: State, num_batches: int) -> None:
    """A position in an epoch means something only in the batches that it was counted in."""
    (position,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    if position["batch"] > num_batches:
        raise UserError(
            f"--resume: the checkpoint has {position['batch']} batches of an epoch behind it, which has {num_batches} "
            "now: use the data that the run began with"
        )


def _results(command: CLI, tested: str | None, seconds: dict[str, Any]) -> dict[str, Any]:
    data = command.datamodule
    return {
        "recipe": command.model.recipe,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),  # of the run's end
        "num_train": len(data.train.labels),
        "num_val": data.num_val,
        "batch_size": data.batch_size,
        "lr": command.model.lr,
        "peak_memory": peak_memory(),
        **command.results(tested, command.trainer.global_step, seconds),
    }


if __name__ == "__main__":
    machine.run(main)
