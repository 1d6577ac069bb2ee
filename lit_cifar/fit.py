"""`python -m lit_cifar.fit`: trains, then tests once. `sweep` trains and tests with the same functions."""

import time

_started = time.perf_counter()  # before the imports, which are part of what a run costs

import gc  # noqa: E402
import os  # noqa: E402
from datetime import datetime, timezone  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from lit_cifar.cli import machine  # noqa: E402
from lit_cifar.cli.command import CLI  # noqa: E402
from lit_cifar.cli.parser import Parser, value_of  # noqa: E402
from lit_cifar.errors import UserError  # noqa: E402
from lit_cifar.model.classifier import check_net  # noqa: E402
from lit_cifar.results.report import peak_memory, print_report, write_results  # noqa: E402
from lit_cifar.run.folder import RESULTS  # noqa: E402
from lit_cifar.run.read import check_state, find_checkpoint, read_checkpoint  # noqa: E402
from lit_cifar.run.trust import checkpoint_config  # noqa: E402
from lit_cifar.training.progress import Progress  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - _started

# Settled in the first process and inherited by those that it starts on its node, which must resume the same run.
RESUME_VARIABLE = "LIT_CIFAR_RESUME"


def main(args: list[str]) -> None:
    """Trains, tests and reports; `args` is the command line without the program's name."""
    started = time.perf_counter() - IMPORT_SECONDS
    path, checkpoint, base = _resume(args)
    command = CLI(
        args,
        prog="python -m lit_cifar.fit",
        description="Trains a net on CIFAR-10, then tests it once. Without arguments: PyTorch's CIFAR-10 tutorial.",
        base=base,
        resume=(path, checkpoint["global_step"]) if path else None,
        add_arguments=_add_arguments,
    )
    prepare(command, "fit", "test", checkpoint=checkpoint)
    if path:
        command.model.recipe = checkpoint["lit_cifar"].get("recipe")  # the run keeps its name
    del checkpoint
    finish(command, started, train(command, started, path))


def prepare(command: CLI, *stages: str, checkpoint: dict[str, Any] | None = None) -> None:
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
    if checkpoint:
        command.model.check_fits(checkpoint, data.classes)
        command.model.trainer, command.trainer.datamodule = command.trainer, data  # type: ignore[attr-defined]
        check_state(checkpoint, command.trainer, command.model)
        _check_position(checkpoint, command.plain_config, len(data.train_batches()))
    command.model.set_classes(data.classes)


def train(command: CLI, started: float, path: Path | None = None) -> dict[str, float]:
    """Trains, from the checkpoint at `path` if there is one, and gives the seconds of `results.json` so far.

    Args:
        started: when the run began, on time.perf_counter's clock.

    Raises:
        UserError: the loss or a weight is no longer finite (DivergedError), or a checkpoint cannot be written.
    """
    trainer = command.trainer
    gc.freeze()  # what is imported stays: searching it for garbage took 0.2 s before an epoch of 12,500 steps
    fit_started = time.perf_counter()
    trainer.fit(command.model, datamodule=command.datamodule, ckpt_path=path, weights_only=True)
    fit_seconds = time.perf_counter() - fit_started
    progress = next(callback for callback in trainer.callbacks if isinstance(callback, Progress))  # type: ignore[attr-defined]
    return {
        "start": progress.train_started - started,
        "first_step": progress.first_step_seconds,
        "fit": fit_seconds,
    }


def finish(command: CLI, started: float, seconds: dict[str, float]) -> None:
    """Tests once, the best checkpoint where validation chose one, prints the report and writes `results.json`."""
    trainer, model, data = command.trainer, command.model, command.datamodule
    test_started = time.perf_counter()
    run = Path(trainer.log_dir or ".")  # asked for on every rank: rank 0 broadcasts it
    best = run / "checkpoints" / "best.ckpt"
    select = bool(data.num_val) and best.is_file()
    if select:
        read_checkpoint(best)  # of a resumed run, it may be anyone's
    trainer.test(model, datamodule=data, ckpt_path=best if select else None, weights_only=True, verbose=False)
    if not trainer.is_global_zero:
        return
    lasting = not trainer.fast_dev_run  # type: ignore[attr-defined]
    if lasting:  # first: what is printed may fail, on a terminal that is gone or cannot show it
        now = time.perf_counter()
        seconds = {**seconds, "test": now - test_started, "total": now - started}
        write_results(run / RESULTS, _results(command, seconds, "best" if select else "last"))
    print_report(model.reports["test"], model.reports.get("plain"))
    if lasting:
        print(f"\nRun: {run}\nDashboards: tensorboard --logdir {run.parent}")


def _add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--resume",
        type=str,
        default=None,
        help="go on with a run: 'auto' for the newest ('if-any': or start one), its folder, or a .ckpt file",
    )
    parser.add_argument(
        "--trust", type=bool, default=False, help="true: make classes that a resumed checkpoint names, of any package"
    )


def _resume(args: list[str]) -> tuple[Path | None, dict[str, Any], dict[str, Any] | None]:
    resume = os.environ.get(RESUME_VARIABLE) or value_of("resume", args)
    if not resume:
        return None, {}, None
    path = find_checkpoint(resume, Path(value_of("trainer.default_root_dir", args) or "."))
    if path is None:
        return None, {}, None
    os.environ[RESUME_VARIABLE] = str(path)
    checkpoint = read_checkpoint(path)
    trust = value_of("trust", args) == "true"
    config = checkpoint_config(checkpoint, trust)
    if not trust and "net" in config.get("model", {}):
        check_net(config["model"]["net"], checkpoint["state_dict"])
    return path, checkpoint, config


def _check_position(checkpoint: dict[str, Any], config: dict[str, Any], num_batches: int) -> None:
    """A position in an epoch means something only in the order and batches that it was counted in."""
    then = checkpoint["lit_cifar"].get("config") or {}
    before = {**then.get("data", {}), "seed": then.get("seed_everything", config["seed_everything"])}
    now = {**config["data"], "seed": config["seed_everything"]}
    for key in ("dataset", "batch_size", "num_val", "drop_last", "seed"):
        if before.get(key, now[key]) != now[key]:
            raise UserError(
                f"--resume: --{key} was {before[key]} and is now {now[key]}; "
                "a run goes on with what it began with: leave the flag out"
            )
    (position,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    if position["batch"] > num_batches:
        raise UserError(
            f"--resume: the checkpoint has {position['batch']} batches of an epoch behind it, which has {num_batches} "
            "now: use the data that the run began with"
        )


def _results(command: CLI, seconds: dict[str, float], tested: str) -> dict[str, Any]:
    data, trainer = command.datamodule, command.trainer
    return {
        "recipe": command.model.recipe,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # of the run's end
        "dataset": data.dataset,
        "num_train": len(data.train.labels),
        "num_val": data.num_val,
        **command.model.reports["test"].results(),
        **({"accuracy_without_tta": plain.accuracy} if (plain := command.model.reports.get("plain")) else {}),
        "checkpoint": tested,
        "num_steps": trainer.global_step,
        "batch_size": data.batch_size,
        "devices": trainer.world_size,
        "seconds": seconds,
        "peak_memory": peak_memory(),
        "seed": command.plain_config["seed_everything"],
    }


if __name__ == "__main__":
    machine.run(main)
