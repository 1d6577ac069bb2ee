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
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from lit_cifar import clock, fit, log
from lit_cifar.cli import finders, machine
from lit_cifar.cli.command import CLI, set_up
from lit_cifar.cli.configs import find_config, recipes
from lit_cifar.cli.parser import truth
from lit_cifar.errors import FlagParser, UserError
from lit_cifar.files import local_path
from lit_cifar.model.classifier import normalise
from lit_cifar.results.report import commit, versions
from lit_cifar.seeds import ended_in_order, fit_alone, fit_here, runs_of
from lit_cifar.text import columns, definitions, in_command, wrapped

STAGES = ("fit", "step", "loader")
PROGRAM = "python -m lit_cifar.bench"
OF_COMMAND: dict[str, Any] = {"prog": PROGRAM, "description": "", "add_arguments": fit.add_arguments}
USAGE = f"{PROGRAM} CONFIG [--runs N] [--keep FOLDER] [--stage STAGE] [--warm true] [any flag of lit_cifar.fit]"
FLAGS = [
    ("--runs N", "how many runs, or repetitions of a stage (default: 3); run i has seed --seed + i"),
    ("--stage fit", "trains and tests N times as lit_cifar.fit does, each run in its own process (default)"),
    ("--keep FOLDER", "fit: runs stay in FOLDER/seed_S, and the same command goes on where it was stopped"),
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
# of --stage fit: where results.json has them, and decimals to print
QUANTITIES: dict[str, tuple[Callable[[dict[str, Any]], float], int]] = {
    "accuracy, %": (lambda run: 100 * run["accuracy"], 2),
    "accuracy without TTA, %": (lambda run: 100 * run["accuracy_without_tta"], 2),
    "fit, s": (lambda run: run["seconds"]["fit"], 2),
    "of it training steps, s": (lambda run: run["seconds"]["steps"], 2),
    "of it first step (warm-up, compile), s": (lambda run: run["seconds"]["first_step"], 2),
    "test, s": (lambda run: run["seconds"]["test"], 2),
    "start to first step, s": (lambda run: run["seconds"]["start"], 2),
    "whole process, s": (lambda run: run["seconds"]["total"], 2),
    "images/s of the fit": (lambda run: run["num_steps"] * run["batch_size"] / run["seconds"]["fit"], 0),
    "peak resident memory, MB": (lambda run: run["peak_memory"]["resident"] / 1e6, 0),
    "peak GPU memory, MB": (lambda run: run["peak_memory"]["gpu"] / 1e6, 0),
}
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
        result = _bench_fit(config, own, flags, again=f"{PROGRAM} {shlex.join(args)}")
    elif own.stage == "step":
        result = _bench_step(config, own.runs, flags)
    else:
        result = _bench_loader(config, own.runs, flags)
    where = {"config": config, "stage": own.stage, "flags": rest}
    if not log.rank():  # --stage step --devices N: the other ranks run this command too
        print(json.dumps({**where, "versions": versions(), "commit": commit(), **result}))


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
    parser.add_argument("--keep")
    own, rest = parser.parse_known_args(args[1:])
    if own.runs < 1:
        raise UserError(f"--runs: expected a number from 1, got {own.runs}")
    if own.stage not in STAGES:
        raise UserError(f"--stage: expected one of {', '.join(STAGES)}, got {own.stage}")
    if own.stage != "fit" and (own.keep or own.warm):
        raise UserError("--keep and --warm are for --stage fit: leave them out")
    return args[0], own, rest


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation, n, and half the width of the mean's 95 % interval by Student's t."""
    n = len(values)
    deviation = statistics.stdev(values) if n > 1 else None
    half_width = None if deviation is None else (T95[n - 2] if n - 2 < len(T95) else 1.96) * deviation / math.sqrt(n)
    return {"mean": statistics.fmean(values), "std": deviation, "n": n, "ci95": half_width}


def table(rows: dict[str, tuple[list[float], int]]) -> str:
    """Lines for people: mean, standard deviation, n and interval of each quantity, from its values and its decimals."""
    lines = [("", "mean", "std", "n", "95 % interval of the mean")]
    for name, (values, decimals) in rows.items():
        mean, deviation, n, half = summary(values).values()
        spread = "-" if deviation is None else f"{deviation:,.{decimals}f}"
        interval = "-" if half is None else f"{mean - half:,.{decimals}f} to {mean + half:,.{decimals}f}"
        lines.append((name, f"{mean:,.{decimals}f}", spread, str(n), interval))
    return columns(lines, right=(1, 2, 3))


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


def _figures(title: str, rows: dict[str, tuple[list[float], int]]) -> dict[str, Any]:
    """Prints the table of some quantities, and gives what the last line says of each."""
    if not log.rank():
        print(title)
        print(table(rows), flush=True)
    return {
        name: {**summary(values), "median": statistics.median(values), "values": values}
        for name, (values, _) in rows.items()
    }


# ---- fit ----


def _bench_fit(config: str, own: argparse.Namespace, flags: list[str], again: str) -> dict[str, Any]:
    command = CLI(flags, **OF_COMMAND, build=bool(own.keep))
    trainer = command.config.trainer
    if trainer.limit_test_batches == 0 or trainer.fast_dev_run:
        flag = "fast_dev_run" if trainer.fast_dev_run else "limit_test_batches 0"
        raise UserError(f"--trainer.{flag}: bench measures the accuracy of tests, leave it out")
    if own.keep and finders.without_finders(trainer.callbacks) is not trainer.callbacks:
        raise UserError(
            "--keep knows its runs by their settings, and LearningRateFinder and BatchSizeFinder change these: search "
            "once with lit_cifar.fit, then measure with what it found; or leave --keep out"
        )
    with ended_in_order(again if own.keep else None), _folder_for_runs() as temporary:
        if own.warm:
            fit_here([*flags, "--trainer.max_steps", str(WARM_UP_STEPS), "--trainer.default_root_dir", temporary])
        folder = local_path(own.keep or temporary, "--keep")
        wanted = command.plain_config if own.keep else {}
        first = command.config.seed_everything
        runs = []
        for run in runs_of(range(first, first + own.runs), flags, folder, wanted, fit_here if own.warm else fit_alone):
            runs.append(run)
            seconds = run["seconds"]
            print(
                f"run {len(runs)} of {own.runs}: seed {run['seed']}, accuracy {100 * run['accuracy']:.2f} %, "
                f"fit {seconds['fit']:.1f} s, of it steps {seconds['steps']:.1f} s, whole process "
                f"{seconds['total']:.1f} s",
                flush=True,
            )
    place = device(str(trainer.accelerator))
    title = f"\n{config} on {runs[0]['dataset']}, {runs[0]['num_train']:,} training images; {place}"
    # seconds of the others are sums over several processes, without what a kill lost
    whole = [run for run in runs if len(run["seconds"].get("pieces", ())) < 2]
    if len(whole) < len(runs):
        title += f"\nseconds and memory are those of the {len(whole)} of {len(runs)} runs that were never resumed"
    if left_out := max(run.get("num_test_left_out", 0) for run in runs):
        title += f"\naccuracies leave out {left_out:,} test images (--trainer.limit_test_batches)"
    rows: dict[str, tuple[list[float], int]] = {}
    for name, (read, decimals) in QUANTITIES.items():
        for run in runs if name.startswith("accuracy") else whole:
            with contextlib.suppress(KeyError, TypeError):  # absent or null
                value = read(run)
                rows.setdefault(name, ([], decimals))[0].append(value)
    commits = list(dict.fromkeys(run["commit"] for run in runs))
    return {
        "device": place,
        "dataset": runs[0]["dataset"],
        "warm": own.warm,
        "seeds": [run["seed"] for run in runs],
        "commit": commits if commits[1:] else commits[0],
        **_figures(title, rows),
    }


def _folder_for_runs() -> "tempfile.TemporaryDirectory[str]":
    # on Windows what somebody still reads, such as a virus scanner, stays, and that is no reason to lose the figures
    return tempfile.TemporaryDirectory(prefix="lit_cifar-bench-", ignore_cleanup_errors=True)


# ---- step ----


def take_steps(
    flags: list[str], num_steps: int, barebones: bool, after_step: Callable[[Trainer, LightningModule], None]
) -> None:
    """Trains for so many steps, as `flags` of lit_cifar.fit configure it or under the Trainer's barebones, and calls
    `after_step` behind each."""
    watch = LambdaCallback(on_train_batch_end=lambda trainer, module, *rest: after_step(trainer, module))
    limits = ["--trainer.max_steps", str(num_steps), "--trainer.max_epochs", "-1"]
    with contextlib.redirect_stdout(io.StringIO()):
        command = set_up([*flags, *limits], **OF_COMMAND, logs=not barebones)
        command.datamodule.prepare_data()
        command.datamodule.setup("fit")
        trainer = command.trainer
        if barebones:
            given = command.config["trainer"]
            trainer = Trainer(
                barebones=True,
                callbacks=[watch],
                max_steps=num_steps,
                use_distributed_sampler=False,
                **{key: given[key] for key in ("accelerator", "devices", "precision", "num_nodes")},
            )
            command.datamodule.trainer = trainer
        else:
            trainer.callbacks.append(watch)  # type: ignore[attr-defined]
            command.begin()
        trainer.fit(command.model, datamodule=command.datamodule)
        if command.run is not None:
            command.run.unlock()


def _bench_step(config: str, num_runs: int, flags: list[str]) -> dict[str, Any]:
    """Measures the recipe's step as configured and under barebones, in turn."""
    given = CLI(flags, **OF_COMMAND, build=False).config.trainer
    if given.max_steps in (0, 1):
        raise UserError(f"--trainer.max_steps {given.max_steps}: --stage step needs 2 or more")
    num_steps = given.max_steps if given.max_steps >= 0 else TIMED_STEPS + UNTIMED_STEPS
    untimed = min(UNTIMED_STEPS, num_steps // 2)
    times: list[float] = []

    def note(trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step in (untimed, num_steps):
            clock.wait_for(module.device)
            times.append(time.perf_counter())

    measured: dict[str, list[float]] = {"as configured": [], "barebones": []}
    with ended_in_order(), _folder_for_runs() as folder:
        for _ in range(num_runs):
            for kind, values in measured.items():
                take_steps([*flags, "--trainer.default_root_dir", folder], num_steps, kind == "barebones", note)
                values.append(1000 * (times[-1] - times[-2]) / (num_steps - untimed))
    measured["ratio"] = [ours / bare for ours, bare in zip(*measured.values(), strict=True)]
    place = device(str(given.accelerator))
    title = f"milliseconds a step of {config}, {num_steps - untimed} steps a repetition; {place}"
    rows = {kind: (values, 3) for kind, values in measured.items()}
    return {"device": place, "num_steps": num_steps - untimed, **_figures(title, rows)}


# ---- loader ----


def _bench_loader(config: str, num_runs: int, flags: list[str]) -> dict[str, Any]:
    command = set_up(flags, **OF_COMMAND, logs=False)
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
    place = device(root.type)
    title = f"images/s of {config}'s input pipeline, batch {data.batch_size}; {place}"
    # the first warms up
    return {"device": place, "dataset": data.dataset, **_figures(title, {"images/s": (rates[1:], 0)})}


if __name__ == "__main__":
    machine.run(main)
