"""What the parts of gpu.py measure, each in a process of its own: prints lines that gpu.py reads.

python benchmarks/gpu_parts.py environment DATA_DIR [FOLDER]
python benchmarks/gpu_parts.py runs RECIPE NUM_RUNS ENDS [FLAGS of lit_cifar.fit]
python benchmarks/gpu_parts.py waits [FLAGS of lit_cifar.fit]
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from gpu import RESULT, steps_seconds, within
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_cifar import fit
from lit_cifar.cli.command import set_up
from lit_cifar.results.report import commit, versions

RECIPES = ("tutorial", "speedrun94", "speedrun95", "speedrun96", "resnet18", "speedrun94 --compile true")
FIRST_STEP, LAST_STEP = 5, 14  # whose waits are counted: behind what comes once, before anything is logged
WINDOW = "steady steps"
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Event(NamedTuple):
    """Of a profiler; times in us."""

    name: str
    start: float
    end: float
    on_device: bool


def tell(**result: Any) -> None:
    print(RESULT + json.dumps(result), flush=True)


def environment(data_dir: Path, folder: Path | None) -> None:
    """Tells what figures depend on, decodes the data, and writes them as the peers read them."""
    from run_airbench import write_data

    from lit_cifar.data.source import find_source

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        tell(GPU=subprocess.run(query, capture_output=True, encoding="utf-8", timeout=30, check=True).stdout.strip())
    tell(**versions(), CUDA=torch.version.cuda, cuDNN=torch.backends.cudnn.version(), cores=os.cpu_count())
    tell(commit=os.environ.get("COMMIT") or commit(), date=time.strftime("%Y-%m-%d"))
    started = time.perf_counter()
    source = find_source(data_dir)
    source.prepare()
    num_images = " and ".join(f"{len(source.read(train).labels):,}" for train in (True, False))
    tell(data=f"{data_dir.name} ({num_images} images)", decoding=f"{time.perf_counter() - started:.1f} s")
    if folder is not None:
        write_data(data_dir, folder)


def own_flags(recipe: str, flags: list[str]) -> list[str]:
    return ["--config", f"configs/{recipe}.yaml", *([] if "cpu" in flags else ["--precision", "bf16-mixed"]), *flags]


def runs(recipe: str, num_runs: int, ends: float, flags: list[str]) -> None:
    """Tells results.json of one epoch, which warms up, and of as many runs as end in time, with seeds of their own."""
    num_epochs = yaml.safe_load(Path(f"configs/{recipe}.yaml").read_text(encoding="utf-8"))["trainer"]["max_epochs"]
    flags = own_flags(recipe, flags)
    if recipe.startswith("speedrun") and "cpu" not in flags:
        flags += ["--compile", "true"]
    for _ in range(2):  # what the first compiled in its steps does not count against the time that is left
        first = one_run(["--max_epochs", "1"], flags)
        if time.time() + num_epochs * steps_seconds(first) + first["seconds"]["test"] < ends:
            break
    else:
        print(f"no time for {num_epochs} epochs")
        return
    for seed in within(num_runs, ends):
        one_run(["--seed", str(seed)], flags)


def one_run(own: list[str], flags: list[str]) -> dict[str, Any]:
    """results.json of a run in this process, with the number of graphs compiled so far."""
    with tempfile.TemporaryDirectory(prefix="gpu-run-") as folder:
        fit.main([*flags, *own, "--trainer.default_root_dir", folder])
        (path,) = Path(folder).glob("lightning_logs/version_*/results.json")
        results = json.loads(path.read_text(encoding="utf-8"))
    results = {key: results[key] for key in ("accuracy", "seconds", "num_steps", "peak_memory")}
    results["seconds"].pop("pieces", None)
    dynamo = sys.modules.get("torch._dynamo.utils")
    graphs = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
    tell(**results, graphs=graphs, warms_up="--max_epochs" in own)
    return results


# ---- waits and copies ----


class Steady(Callback):
    """Profiles the steps FIRST_STEP to LAST_STEP, with all that callbacks do in them."""

    counts: dict[str, int]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == FIRST_STEP:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or copies from before would be counted
            self.profiler = torch.profiler.profile()  # of all kinds of activity that there are
            self.profiler.__enter__()
            self.window = torch.profiler.record_function(WINDOW)
            self.window.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == LAST_STEP:
            self.window.__exit__(None, None, None)
            self.profiler.__exit__(None, None, None)  # waits for the GPU, outside of the window
            on_cpu = torch.autograd.DeviceType.CPU
            self.counts = count_waits(
                [
                    Event(event.name, event.time_range.start, event.time_range.end, event.device_type != on_cpu)
                    for event in self.profiler.events() or ()
                ]
            )


def count_waits(events: list[Event]) -> dict[str, int]:
    """Waits of the host and kernels launched within the window, and all copies, by direction."""
    (window,) = (event for event in events if event.name == WINDOW and not event.on_device)
    called = [event.name for event in events if not event.on_device and window.start <= event.start <= window.end]
    done = [event.name for event in events if event.on_device]
    return {
        "waits": sum(name in WAITS for name in called),
        "to_host": sum(name.startswith("Memcpy DtoH") for name in done),
        "to_device": sum(name.startswith("Memcpy HtoD") for name in done),
        "kernels": sum(name.startswith(LAUNCHES) for name in called),
    }


def waits(flags: list[str]) -> int:
    """Tells for each recipe what its steady steps wait for and copy; the compiled one, which takes long, comes last.

    Returns:
        how many could not be measured; the others are.
    """
    num_failed = 0
    for recipe in RECIPES:
        name, *more = recipe.split()
        if more and "cpu" in flags:
            continue
        try:
            tell(recipe=recipe, steps=LAST_STEP - FIRST_STEP + 1, **steady_counts([*own_flags(name, flags), *more]))
        except Exception:
            traceback.print_exc()
            num_failed += 1
    return num_failed


def steady_counts(flags: list[str]) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="gpu-run-") as folder:
        limits = ["--max_epochs", "-1", "--trainer.max_steps", str(LAST_STEP + 1)]
        command = set_up(
            [*flags, *limits, "--trainer.default_root_dir", folder],
            prog="gpu_parts",
            description="",
            add_arguments=fit.add_arguments,
        )
        steady = Steady()
        command.trainer.callbacks.append(steady)  # type: ignore[attr-defined]
        fit.prepare(command, "fit", "test")
        try:
            fit.train(command, time.perf_counter())
        finally:
            if command.run is not None:
                command.run.unlock()
    return steady.counts


if __name__ == "__main__":
    part, *args = sys.argv[1:]
    if part == "environment":
        environment(Path(args[0]), Path(args[1]) if args[1:] else None)
    elif part == "runs":
        runs(args[0], int(args[1]), float(args[2]), args[3:])
    else:
        sys.exit(waits(args))
