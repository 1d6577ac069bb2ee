"""Runs a copy of one of cifar10-airbench's scripts on the CPU, on the same images as lit_cifar.

    python benchmarks/run_airbench.py airbench94_muon.py DATA_DIR [--steps N] [--epochs N] [--dtype bfloat16] [--runs 1]

The scripts (airbench94_muon.py, airbench96_faster.py, legacy/airbench95.py) are KellerJordan's
(github.com/KellerJordan/cifar10-airbench, MIT) and not part of this project: fetch them first. One is edited in
memory: CUDA's devices, half precision, compilation and events become the CPU's. `--dtype mixed` keeps the weights in
float32 and computes the net in bfloat16, as bf16-mixed does: bfloat16 weights have fewer bits than the float16 that the
scripts were tuned with.

It prints what the script prints, and as its last line JSON: seconds of a step in each of the script's loops; and of
each run that ended its accuracies and seconds, as the script prints them. With --steps each loop ends after so many
steps, which is enough to time them; with --epochs it is a shorter training run.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lit_cifar.data.source import find_source

# What each script has of these is replaced. Whatever of CUDA is left after them is an error.
EDITS = (
    (r'torch\.device\("cuda"\)|torch\.device\(gpu\)|"cuda"|\'cuda\'', 'torch.device("cpu")'),
    (r"\.cuda\(\)", ""),
    (r"@torch\.compile\n", ""),
    (r' *model\.compile\(mode="max-autotune"\)\n', ""),
    (r" *(\w+) = torch\.compile\(\1, .*\)\n", ""),
    (r"\._orig_mod\b", ""),
    (r"torch\.cuda\.Event\(enable_timing=True\)", "Event()"),
    (r" *torch\.cuda\.synchronize\(\)\n", ""),
    (r' *main\("warmup", model\)\n', ""),
    # a loop of another function than main, such as the proxy's in airbench96_faster.py, ends before its time
    (r"( *)(current_steps|step) \+= 1\n", r"\1\2 += 1\n\1if on_step(sys._getframe().f_code.co_name, \2): break\n"),
)
# what the scripts print of a run that ended
RUN = re.compile(r"\|\s*eval\s*\|.*\|\s*([\d.]+)\s*\|\s*([\d.]+)\s*\|\s*([\d.]+)\s*\| *$", re.MULTILINE)
ROUND = 4  # steps: the proxy of airbench96_faster.py trains in one of four


class Event:
    """As much of a CUDA event as the scripts use."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other.time - self.time)


class Stopped(Exception):
    pass


def write_data(data_dir: Path, folder: Path) -> None:
    """Writes train.pt and test.pt as the peers read them."""
    folder.mkdir()
    for name in ("train", "test"):
        split = find_source(data_dir).read(name == "train")
        images = split.images.permute(0, 2, 3, 1).contiguous()
        torch.save({"images": images, "labels": split.labels, "classes": list(split.classes)}, folder / f"{name}.pt")


def edited(source: str, dtype: str, runs: int, epochs: int | None) -> str:
    """The script for the CPU.

    Raises:
        ValueError: it is not built like the scripts that this was written for.
    """
    for pattern, new in EDITS:
        source = re.sub(pattern, new, source)
    source = re.sub(r"(\.half\(\))|torch\.half", lambda found: ".to(kept)" if found[1] else "kept", source)
    source, num_found = re.subn(r"for run in range\(\d+\)", f"for run in range({runs})", source)
    if dtype == "mixed":
        source = re.sub(r"\b(net|model\w*) = ((?:CifarNet|make_net)\(.*)", r"\1 = mixed(\2)", source)
    if epochs is not None:
        source = re.sub(r"('train_epochs': |total_train_steps = ceil\()[\d.]+", rf"\g<1>{epochs}", source)
    if num_found != 1 or "on_step" not in source or "cuda" in re.sub(r"torch\.backends\.cudnn|#.*", "", source):
        raise ValueError("this is not a version of the script that these edits are for")
    return f"import sys\n{source}"


def mixed(net: torch.nn.Module) -> torch.nn.Module:
    """The net, whose forward computes in bfloat16 and whose logits are float32."""
    forward = torch.autocast("cpu", torch.bfloat16)(net.forward)
    net.forward = lambda *args, **kwargs: forward(*args, **kwargs).float()
    return net


def ended_runs(printed: str) -> dict[str, list[float]]:
    """Accuracies (0 to 1) and seconds of the runs in what a script printed."""
    runs = [tuple(map(float, found)) for found in RUN.findall(printed)]
    names = ("accuracies_without_tta", "accuracies", "seconds")
    return {name: [run[column] for run in runs] for column, name in enumerate(names)}


def run(source: str, dtype: str, num_steps: int) -> dict[str, Any]:
    """Runs an edited script in this process and folder; gives what the last line says.

    Args:
        source: of the script.
        dtype: a name of torch's, or 'mixed'.
        num_steps: after which each of its loops ends, the last of them with the script; 0: as the script ends.
    """
    loops: dict[str, list[list[float]]] = {}  # the moments at which steps ended, of each run
    printed: list[str] = []

    def on_step(loop: str, step: int) -> bool:
        runs = loops.setdefault(loop, [])
        if step == 1:
            runs.append([])
        runs[-1].append(time.perf_counter())
        if step == num_steps and loop == "main":
            raise Stopped
        return step == num_steps

    def show(*values: object) -> None:
        print(*values, flush=True)
        printed.append(" ".join(map(str, values)))

    kept = torch.float32 if dtype == "mixed" else getattr(torch, dtype)
    names = {"__name__": "__main__", "Event": Event, "on_step": on_step, "print": show, "mixed": mixed, "kept": kept}
    with contextlib.suppress(Stopped):
        exec(compile(source, "script.py", "exec"), names)
    seconds = {"loops": {loop: step_seconds(runs) for loop, runs in loops.items()}}
    return {"dtype": dtype, **seconds, **ended_runs("\n".join(printed)), "torch": torch.__version__}


def step_seconds(runs: list[list[float]]) -> dict[str, float]:
    """Of a loop's steps, from the moments at which they ended in each run; the first step of a run warms up. The median
    passes over evaluations between two steps; the mean is for a loop whose steps differ, and is of whole rounds."""
    seconds = [[after - before for before, after in itertools.pairwise(moments)] for moments in runs]
    every = [value for of_run in seconds for value in of_run] or [0.0]
    rounds = [value for of_run in seconds for value in of_run[: len(of_run) // ROUND * ROUND]] or every
    num_steps = sum(map(len, runs))
    return {
        "num_steps": num_steps,
        "median_seconds": statistics.median(every),
        "mean_seconds": statistics.fmean(rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("script", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "mixed"])
    args = parser.parse_args()
    try:
        source = edited(args.script.read_text(encoding="utf-8"), args.dtype, args.runs, args.epochs)
    except (OSError, ValueError) as error:
        parser.error(f"{args.script}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        write_data(args.data_dir, Path(folder) / "cifar10")
        os.chdir(folder)
        Path("script.py").write_text(source, encoding="utf-8")  # the scripts read their own text
        sys.argv = ["script.py"]
        result = run(source, args.dtype, args.steps)
        os.chdir(tempfile.gettempdir())  # Windows removes no folder that a process is in
    print(json.dumps(result))


if __name__ == "__main__":
    main()
