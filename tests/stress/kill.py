"""Kills training runs with SIGKILL at random moments, resumes them, and compares what is left in the end with a run
that nobody killed. Signals that a run can answer are in tests/test_stop.py, faults of a cluster in test_slurm.py."""

import argparse
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import ROOT, SHAPES, results, scalars, weights

AUGMENT = ["--data.augment.crop", "4", "--data.augment.flip", "random", "--data.augment.cutout", "8"]
OFTEN = ["--checkpoint.every_n_train_steps", "7", "--trainer.log_every_n_steps", "10", "--data.num_val", "500"]
RECIPES = {
    "onecycle": [
        *("--batch_size", "64", "--max_epochs", "4", "--lr", "0.02", "--trainer.limit_train_batches", "100"),
        *("--model.schedule", "onecycle", *AUGMENT),
    ],
    "transform": [
        *("--batch_size", "32", "--max_epochs", "3", "--lr", "0.02", "--trainer.limit_train_batches", "100"),
        *("--model.schedule", "onecycle", "--data.num_workers", "1"),
        *("--data.transform", "[torchvision.transforms.v2.RandAugment]"),
    ],
    "speedrun94": [
        *("--config", str(ROOT / "configs/speedrun94.yaml"), "--max_epochs", "3", "--model.net.widths", "[8, 16, 16]"),
        *("--batch_size", "20", "--trainer.limit_train_batches", "100", "--model.sides", "[16, 20, 24]"),
    ],
}
MOMENTS = ("start", "train", "save", "save", "test")
ENDS_WITHIN = 60  # seconds, for the ranks that are left when one is killed
ITS_OWN = {"seconds", "peak_memory", "when", "commit"}  # what no two runs share in results.json


class Training:
    """`python -m lit_cifar.fit` in `folder` and in a session of its own, its output in a file."""

    def __init__(self, folder: Path, *args: str, num_threads: int = 1) -> None:
        self.folder = folder
        self.args = args
        self.log = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(num_threads)}
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lit_cifar.fit", *args],
                cwd=folder,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, come: Callable[[], bool], seconds: float = 300) -> bool:
        """Whether `come` was true before the training ended by itself."""
        end = time.monotonic() + seconds
        while not come():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"nothing came in {seconds} s:\n{self.output()}")
            time.sleep(0.0005)
        return True

    def trains(self) -> bool:
        return "training " in self.output()

    def tests(self) -> bool:
        """Whether its last epoch is over; a run that goes on after that trains no epoch."""
        epochs = self.args[self.args.index("--max_epochs") + 1]
        return f"epoch {epochs}  validation" in self.output()

    def saves(self) -> bool:
        return any(self.folder.glob("lightning_logs/version_*/checkpoints/.*.part"))

    def processes(self) -> list[int]:
        """Ids of what is left of it, rank 0's first while it is there, then in the order of their start."""
        found = subprocess.run(
            ["ps", "-o", "pid=,stat=", "--sort=start_time,pid", "-g", str(self.process.pid)],
            capture_output=True,
            text=True,
        )
        lines = [line.split() for line in found.stdout.splitlines()]
        return [int(pid) for pid, state in lines if not state.startswith("Z")]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while self.processes():
            time.sleep(0.01)


@dataclass
class Outcome:
    """What a stress did, a row of the table."""

    recipe: str
    devices: int
    victim: str
    kills: dict[str, int] = field(default_factory=dict)  # by the moment they came at
    resumed: int = 0  # kills after which the training went on and ended like the one left alone
    runs: int = 0
    seconds: float = 0.0
    slowest_end: float = 0.0  # of the ranks that were left, in seconds after one was killed
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        kills = ", ".join(f"{number} {moment}" for moment, number in sorted(self.kills.items()))
        end = f"{self.slowest_end:.1f}" if self.slowest_end else "-"
        return (
            f"{self.recipe:<11} {self.devices:>7}  {self.victim:<6} {sum(self.kills.values()):>5} {self.resumed:>7} "
            f"{self.runs:>4} {self.seconds:>7.0f}  {end:>14}  {kills}"
        )


HEADER = f"{'recipe':<11} devices  victim kills resumed runs seconds  others end (s)  moments"


def stress(
    folder: Path, recipe: str, devices: int, num_kills: int, seed: int = 0, victim: str = "all", num_threads: int = 1
) -> Outcome:
    """Kills trainings of a recipe `num_kills` times; as many runs, one after the other, as take so many.

    Args:
        folder: an empty folder to work in.
        victim: 'all' kills the whole process group, '0' or '1' that rank alone.
        num_threads: of each process.
    """
    draws = random.Random(f"{seed} {recipe} {devices} {victim}")
    args = [*RECIPES[recipe], *SHAPES, *OFTEN, "--devices", str(devices)]
    outcome = Outcome(recipe, devices, victim)
    began = time.monotonic()

    (folder / "whole").mkdir(parents=True)
    whole = Training(folder / "whole", *args, num_threads=num_threads)
    assert whole.wait_until(whole.trains), whole.output()
    start_seconds = time.monotonic() - whole.started
    assert whole.wait_until(whole.tests), whole.output()
    fit_seconds = time.monotonic() - whole.started - start_seconds
    whole.process.wait()
    assert whole.process.returncode == 0, whole.output()
    test_seconds = time.monotonic() - whole.started - start_seconds - fit_seconds

    while sum(outcome.kills.values()) < num_kills and not outcome.faults:
        outcome.runs += 1
        place = folder / f"killed-{outcome.runs}"
        place.mkdir()
        sent = 0
        while True:
            resume = ["--resume", "if-any"] if sent else []
            training = Training(place, *args, *resume, num_threads=num_threads)
            left = num_kills - sum(outcome.kills.values())
            if not left:
                training.wait_until(lambda: False)
                break
            moment = draws.choice(MOMENTS) if victim == "all" else "train"
            # a few kills for each run: so much of it passes before the next
            pause = draws.uniform(0, fit_seconds / 5)
            if moment == "start":
                alive = training.wait_until(_passed(draws.uniform(0.1, start_seconds)))
            elif moment == "test":
                alive = training.wait_until(training.tests) and training.wait_until(
                    _passed(draws.uniform(0, test_seconds))
                )
            else:
                alive = training.wait_until(training.trains) and training.wait_until(_passed(pause))
                if alive and moment == "save":
                    alive = training.wait_until(training.saves)
            if not alive:
                break
            if victim == "all":
                training.kill()
            else:
                _kill_rank(training, int(victim), devices, outcome)
            sent += 1
            outcome.kills[moment] = outcome.kills.get(moment, 0) + 1
            if outcome.faults:
                break
        if not outcome.faults:
            if training.process.returncode != 0:
                outcome.faults.append(f"{training.log}: exit code {training.process.returncode}\n{training.output()}")
            else:
                outcome.faults += differences(_run(place), _run(folder / "whole"))
        if not outcome.faults:
            outcome.resumed += sent
    outcome.seconds = time.monotonic() - began
    return outcome


def _passed(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _kill_rank(training: Training, rank: int, devices: int, outcome: Outcome) -> None:
    ranks = training.processes()[:devices]
    if len(ranks) < devices:
        return
    os.kill(ranks[rank], signal.SIGKILL)
    killed = time.monotonic()
    while training.process.poll() is None or training.processes():
        if time.monotonic() > killed + ENDS_WITHIN:
            outcome.faults.append(f"{training.log}: ranks are left {ENDS_WITHIN} s after rank {rank} was killed")
            training.kill()
            return
        time.sleep(0.05)
    outcome.slowest_end = max(outcome.slowest_end, time.monotonic() - killed)
    if training.process.returncode == 0:
        outcome.faults.append(f"{training.log}: exit code 0 although rank {rank} was killed")


def _run(place: Path) -> Path:
    """The newest run in a folder; before a killed one made its first checkpoint, the next starts another."""
    return max(place.glob("lightning_logs/version_*"), key=lambda run: int(run.name.split("_")[1]))


def differences(run: Path, whole: Path) -> list[str]:
    """How a run differs from one that was left alone: weights, TensorBoard's scalars, results.json, debris."""
    found = []
    ours, theirs = weights(run.absolute()), weights(whole.absolute())
    if ours.keys() != theirs.keys():
        found.append(f"{run}: other weights: {sorted(ours.keys() ^ theirs.keys())}")
    found += [
        f"{run}: {name} differs" for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])
    ]

    ours_scalars, theirs_scalars = scalars(run.absolute()), scalars(whole.absolute())
    for tag in sorted(ours_scalars.keys() | theirs_scalars.keys()):
        ours_series, theirs_series = ours_scalars.get(tag, []), theirs_scalars.get(tag, [])
        steps = [step for step, _ in ours_series]
        if steps != sorted(set(steps)):
            found.append(f"{run}: {tag} is no monotone series: {steps}")
        missing = sorted({step for step, _ in theirs_series} - set(steps))
        added = sorted(set(steps) - {step for step, _ in theirs_series})
        if missing or added:
            found.append(f"{run}: {tag} lacks steps {missing} and has {added} besides")
        elif ours_series != theirs_series:
            found.append(f"{run}: {tag} differs: {ours_series} and {theirs_series}")

    ours_results, theirs_results = results(run.absolute()), results(whole.absolute())
    found += [
        f"{run}: {key} in results.json differs"
        for key in sorted((ours_results.keys() | theirs_results.keys()) - ITS_OWN)
        if ours_results.get(key) != theirs_results.get(key)
    ]
    found += [f"{path} is left" for path in (run / "checkpoints").glob(".*.part")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="for each recipe and number of devices (default: 20)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--devices", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    parser.add_argument("--victims", nargs="+", choices=["all", "0", "1"], default=["all", "0", "1"],
                        help="the whole process group, or one rank alone, on 2 devices")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; without it a temporary folder, removed in the end")
    options = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each purge, which is what resuming does
    with tempfile.TemporaryDirectory() if options.folder is None else contextlib.nullcontext(options.folder) as folder:
        print(HEADER, flush=True)
        faults: list[str] = []
        for recipe in options.recipes:
            for devices in options.devices:
                for victim in options.victims:
                    if victim != "all" and devices == 1:
                        continue
                    place = Path(folder) / f"{recipe}-{devices}-{victim}"
                    num_kills = options.kills if victim == "all" else max(1, options.kills // 5)
                    outcome = stress(place, recipe, devices, num_kills, options.seed, victim, options.threads)
                    print(outcome.row(), *outcome.faults, sep="\n", flush=True)
                    faults += outcome.faults
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
