"""`python -m lit_cifar.bench CONFIG`: measures a recipe, or one stage of it. Measures only: fit.py trains, and
data/loader.py loads."""

from lit_cifar import process

if __name__ == "__main__":
    process.begin()  # before the imports, which take seconds

import argparse
import contextlib
import io
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_cifar import clock, fit, log
from lit_cifar.cli import machine
from lit_cifar.cli.command import CLI, set_up
from lit_cifar.cli.configs import find_config, recipes
from lit_cifar.cli.parser import truth
from lit_cifar.errors import FlagParser, UserError
from lit_cifar.model.classifier import normalise
from lit_cifar.process import LAUNCHER_VARIABLE
from lit_cifar.results.report import commit, versions
from lit_cifar.run.folder import RESULTS, RUNS
from lit_cifar.run.stop import Stopped
from lit_cifar.text import definitions, in_command, wrapped

STAGES = ("fit", "step", "loader")
USAGE = "python -m lit_cifar.bench CONFIG [--runs N] [--stage STAGE] [--warm true] [any flag of lit_cifar.fit]"
FLAGS = [
    ("--runs N", "how many runs, or repetitions of a stage (default: 3); run i has seed --seed + i"),
    ("--stage fit", "trains and tests N times as lit_cifar.fit does, each run in its own process (default)"),
    ("--stage step", "milliseconds per training step, and their ratio to those under the Trainer's barebones"),
    ("--stage loader", "images per second of the input pipeline: order, augmentation, scaling, normalising"),
    (
        "--warm true",
        "fit: all runs in one process, after one run of a few steps that is not counted, so that compiling is not "
        "counted N times; for one device",
    ),
    ("others", "go to lit_cifar.fit: --data_dir, --devices, --precision, --trainer.max_steps, ..."),
]
# two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
WARM_UP_STEPS = 8
TIMED_STEPS, UNTIMED_STEPS = 200, 20  # in a repetition of --stage step
SECONDS_A_REPETITION = 2.0  # of --stage loader, at least


@in_command()
def main(args: list[str]) -> None:
    """Measures and prints; `args` is the command line without the program's name."""
    if not args or {"-h", "--help"} & set(args):
        print(wrapped(f"usage: {USAGE}", others=" " * 7))
        print("\nMeasures a recipe; the last line it prints is JSON.\n")
        what = f"file of settings in YAML, or a recipe: {', '.join(recipes())}"
        print(definitions([("CONFIG", what), *FLAGS]))
        return
    config, own, rest = split_flags(args)
    flags = ["--config", config, *rest]
    if own.stage == "fit":
        result = _bench_fit(config, own.runs, own.warm, flags)
    elif own.stage == "step":
        result = _bench_step(config, own.runs, flags)
    else:
        result = _bench_loader(config, own.runs, flags)
    where = {"config": config, "stage": own.stage, "flags": rest}
    if not log.rank():
        print(json.dumps({**where, **result, "versions": versions(), "commit": commit()}))


def split_flags(args: list[str]) -> tuple[str, argparse.Namespace, list[str]]:
    """The config, the flags of this command, and those of lit_cifar.fit.

    Raises:
        UserError: there is no config, or a flag of this command does not take such a value.
    """
    if args[0].startswith("-"):
        raise UserError(f"the recipe comes first: {USAGE}")
    find_config(args[0], "CONFIG")  # there is one
    parser = FlagParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--stage", default="fit")
    parser.add_argument("--warm", type=truth, default=False)
    own, rest = parser.parse_known_args(args[1:])
    if own.runs < 1:
        raise UserError(f"--runs: expected a number from 1, got {own.runs}")
    if own.stage not in STAGES:
        raise UserError(f"--stage: expected one of {', '.join(STAGES)}, got {own.stage}")
    return args[0], own, rest


def summary(values: list[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation, n, and half the width of the mean's 95 % interval by Student's t."""
    n = len(values)
    deviation = statistics.stdev(values) if n > 1 else None
    half_width = None if deviation is None else (T95[n - 2] if n - 2 < len(T95) else 1.96) * deviation / math.sqrt(n)
    return {"mean": statistics.fmean(values), "std": deviation, "n": n, "ci95": half_width}


def table(rows: dict[str, tuple[list[float], int]]) -> str:
    """Lines for people: mean, standard deviation, n and interval of each quantity.

    Args:
        rows: by quantity, its values and how many decimals to print.
    """
    width = max(map(len, rows))
    lines = [f"{'':<{width}}  {'mean':>12}  {'std':>10}   n  95 % interval of the mean"]
    for name, (values, decimals) in rows.items():
        found = summary(values)
        mean, deviation, half = found["mean"], found["std"], found["ci95"]
        assert mean is not None
        spread = "-" if deviation is None else f"{deviation:,.{decimals}f}"
        interval = "-" if half is None else f"{mean - half:,.{decimals}f} to {mean + half:,.{decimals}f}"
        lines.append(f"{name:<{width}}  {mean:>12,.{decimals}f}  {spread:>10}  {found['n']:>2}  {interval}")
    return "\n".join(lines)


def device(accelerator: str = "auto") -> str:
    """The device that a figure is measured on, in words, by --accelerator."""
    threads = f"{torch.get_num_threads()} threads"
    if accelerator != "cpu" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if accelerator != "cpu" and torch.backends.mps.is_available():
        return f"Apple GPU (mps), {platform.machine()}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), model)
    return f"CPU, {os.cpu_count()} cores, {threads}: {model}"


def _settings(flags: list[str]) -> Namespace:
    """The settings of a run of fit, read before the first one starts.

    Raises:
        UserError: one of them is wrong.
    """
    return CLI(
        flags, prog="python -m lit_cifar.bench", description="", add_arguments=fit.add_arguments, build=False
    ).config


def _bench_fit(config: str, num_runs: int, warm: bool, flags: list[str]) -> dict[str, Any]:
    settings = _settings(flags)
    if settings.trainer.limit_test_batches == 0:
        raise UserError("--trainer.limit_test_batches 0: bench measures the accuracy of tests, leave it out")
    seed = settings.seed_everything
    results = []
    with _ended_in_order(), _folder_for_runs() as folder:
        flags = [*flags, "--trainer.default_root_dir", folder]
        if warm:
            _fit_here([*flags, "--trainer.max_steps", str(WARM_UP_STEPS)], Path(folder))
        for run in range(num_runs):
            args = [*flags, "--seed", str(seed + run)]
            results.append((_fit_here if warm else _fit_in_process)(args, Path(folder)))
            newest = results[-1]
            print(
                f"run {run + 1} of {num_runs}: seed {newest['seed']}, accuracy {100 * newest['accuracy']:.2f} %, "
                f"fit {newest['seconds']['fit']:.1f} s, of it steps {newest['seconds']['steps']:.1f} s, whole process "
                f"{newest['seconds']['total']:.1f} s",
                flush=True,
            )
    quantities: dict[str, tuple[Callable[[dict[str, Any]], float | None], int]] = {
        "accuracy, %": (lambda run: 100 * run["accuracy"], 2),
        "accuracy without TTA, %": (lambda run: _percent(run.get("accuracy_without_tta")), 2),
        "fit, s": (lambda run: run["seconds"]["fit"], 2),
        "of it training steps, s": (lambda run: run["seconds"]["steps"], 2),
        "of it first step (warm-up, compile), s": (lambda run: run["seconds"]["first_step"], 2),
        "start to first step, s": (lambda run: run["seconds"]["start"], 2),
        "whole process, s": (lambda run: run["seconds"]["total"], 2),
        "images/s of the fit": (lambda run: run["num_steps"] * run["batch_size"] / run["seconds"]["fit"], 0),
        "peak resident memory, MB": (lambda run: _megabytes(run["peak_memory"]["resident"]), 0),
        "peak GPU memory, MB": (lambda run: _megabytes(run["peak_memory"]["gpu"]), 0),
    }
    rows = {}
    for name, (read, decimals) in quantities.items():
        values = [value for run in results if (value := read(run)) is not None]
        if values:
            rows[name] = (values, decimals)
    place = device(str(settings.trainer.accelerator))
    print(f"\n{config} on {results[0]['dataset']}, {results[0]['num_train']:,} training images; {place}")
    print(table(rows), flush=True)
    return {
        "device": place,
        "dataset": results[0]["dataset"],
        "warm": warm,
        "seeds": [run["seed"] for run in results],
        **{name: {**summary(values), "values": values} for name, (values, _) in rows.items()},
    }


def _folder_for_runs() -> "tempfile.TemporaryDirectory[str]":
    # on Windows what somebody still reads, such as a virus scanner, stays, and that is no reason to lose the figures
    return tempfile.TemporaryDirectory(prefix="lit_cifar-bench-", ignore_cleanup_errors=True)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Lets a signal that would end this process end the run of fit and remove the folder first."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        sys.exit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    except Stopped:  # a run in this process that took the signal
        sys.exit(128 + signal.SIGTERM)
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _megabytes(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / 1e6


def _fit_in_process(args: list[str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "lit_cifar.fit", *args]
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        stdin=subprocess.DEVNULL,
        env={**os.environ, LAUNCHER_VARIABLE: str(os.getpid()), "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode < 0:
        raise UserError(f"a run was ended by {signal.Signals(-done.returncode).name}, perhaps for want of memory")
    last = (done.stderr.splitlines() or [""])[-1]
    if done.returncode and last.startswith("lit_cifar: "):  # not with a traceback
        raise UserError(last.removeprefix("lit_cifar: ").removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return _newest_results(folder)


def _fit_here(args: list[str], folder: Path) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        fit.main(args)
    return _newest_results(folder)


def _newest_results(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob(f"{RUNS}/version_*/{RESULTS}"), key=lambda path: path.stat().st_mtime_ns)
    results: dict[str, Any] = json.loads(newest.read_bytes())
    return results


class _Stopwatch(Callback):
    """Notes the time after two of the steps, once the device has finished them."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.times: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in (self.first, self.last):
            clock.wait_for(pl_module.device)
            self.times.append(time.perf_counter())

    @property
    def seconds_a_step(self) -> float:
        return (self.times[1] - self.times[0]) / (self.last - self.first)


def _bench_step(config: str, num_runs: int, flags: list[str]) -> dict[str, Any]:
    """Measures the recipe's step as configured and under barebones, in turn."""
    settings = _settings(flags)
    limit = settings.trainer.max_steps
    if limit in (0, 1):
        raise UserError(f"--trainer.max_steps {limit}: --stage step needs 2 or more")
    num_steps = limit if limit >= 0 else TIMED_STEPS + UNTIMED_STEPS
    untimed = min(UNTIMED_STEPS, num_steps // 2)
    milliseconds: dict[str, list[float]] = {"as configured": [], "barebones": []}
    with _ended_in_order(), _folder_for_runs() as folder:
        for _ in range(num_runs):
            for kind, measured in milliseconds.items():
                stopwatch = _Stopwatch(untimed, num_steps)
                limits = ["--trainer.max_steps", str(num_steps), "--trainer.max_epochs", "-1"]
                with contextlib.redirect_stdout(io.StringIO()):
                    command = set_up(
                        [*flags, "--trainer.default_root_dir", folder, *limits],
                        prog="python -m lit_cifar.bench",
                        description="",
                        logs=kind != "barebones",
                        add_arguments=fit.add_arguments,
                    )
                    command.datamodule.prepare_data()
                    command.datamodule.setup("fit")
                    trainer = command.trainer
                    if kind == "barebones":
                        given = command.config["trainer"]
                        trainer = Trainer(
                            barebones=True,
                            callbacks=[stopwatch],
                            max_steps=num_steps,
                            use_distributed_sampler=False,
                            **{key: given[key] for key in ("accelerator", "devices", "precision", "num_nodes")},
                        )
                        command.datamodule.trainer = trainer
                    else:
                        trainer.callbacks.append(stopwatch)  # type: ignore[attr-defined]
                        command.begin()
                    trainer.fit(command.model, datamodule=command.datamodule)
                    if command.run is not None:
                        command.run.unlock()
                measured.append(1000 * stopwatch.seconds_a_step)
    ratios = [a / b for a, b in zip(milliseconds["as configured"], milliseconds["barebones"], strict=True)]
    place = device(str(settings.trainer.accelerator))
    if not log.rank():  # --devices N: the other ranks run this command too
        print(f"milliseconds a step of {config}, {num_steps - untimed} steps a repetition; {place}")
        print(table({**{name: (values, 3) for name, values in milliseconds.items()}, "ratio": (ratios, 3)}), flush=True)
    named = {**milliseconds, "ratio": ratios}
    return {"device": place, "num_steps": num_steps - untimed} | {
        name: {**summary(values), "median": statistics.median(values), "values": values}
        for name, values in named.items()
    }


def _bench_loader(config: str, num_runs: int, flags: list[str]) -> dict[str, Any]:
    command = set_up(
        flags, prog="python -m lit_cifar.bench", description="", logs=False, add_arguments=fit.add_arguments
    )
    data, model = command.datamodule, command.model
    data.prepare_data()
    data.setup("fit")
    root = command.trainer.strategy.root_device
    model.to(root)
    loader = data.train_dataloader()
    rates = []
    for run in range(num_runs + 1):
        num_images, epoch, started = 0, 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS_A_REPETITION:
            loader.set_epoch(run * 1000 + epoch)
            for images, _ in loader:
                num_images += len(normalise(images, model.mean, model.std))
            epoch += 1
        clock.wait_for(root)
        rates.append(num_images / (time.perf_counter() - started))
    rates = rates[1:]  # the first warms up
    print(f"images/s of {config}'s input pipeline, batch {data.batch_size}; {device(root.type)}")
    print(table({"images/s": (rates, 0)}), flush=True)
    return {"device": device(root.type), "dataset": data.dataset, "images/s": {**summary(rates), "values": rates}}


if __name__ == "__main__":
    machine.run(main)
