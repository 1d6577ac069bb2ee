"""Runs a copy of cifar10-airbench's airbench94_muon.py on the CPU, on the same images as lit_cifar.

    python benchmarks/run_airbench.py airbench94_muon.py DATA_DIR [--steps N] [--dtype bfloat16] [--runs 1]

The script itself is KellerJordan's (github.com/KellerJordan/cifar10-airbench, MIT) and not part of this project: fetch
it first. It is edited in memory: CUDA's devices, half precision, compilation and events become the CPU's. With --steps
it stops early, which is enough to time it: all its steps cost the same.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lit_cifar.data.source import find_source

EDITS = (
    ('torch.device("cuda")', 'torch.device("cpu")'),
    (".cuda()", ""),
    ("@torch.compile\n", ""),
    ('    model.compile(mode="max-autotune")\n', ""),
    ("torch.cuda.Event(enable_timing=True)", "Event()"),
    ("        torch.cuda.synchronize()\n", ""),
    ('    main("warmup", model)\n', ""),
)


class Event:
    """As much of a CUDA event as the script uses."""

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("script", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    source = args.script.read_text(encoding="utf-8")
    for old, new in EDITS:
        if old not in source:
            sys.exit(f"{args.script} is not the version that these edits are for: it lacks {old!r}")
        source = source.replace(old, new)
    source = source.replace(".half()", f".to(torch.{args.dtype})").replace("range(200)", f"range({args.runs})")
    source = source.replace("            step += 1\n", "            step += 1; on_step(step)\n")

    times: list[float] = []

    def on_step(step: int) -> None:
        times.append(time.perf_counter())
        if step == args.steps:
            raise Stopped

    with tempfile.TemporaryDirectory() as folder:
        write_data(args.data_dir, Path(folder) / "cifar10")
        os.chdir(folder)
        Path("script.py").write_text(source, encoding="utf-8")
        sys.argv = ["script.py"]
        names: dict[str, Any] = {"__name__": "__main__", "Event": Event, "on_step": on_step}
        with contextlib.suppress(Stopped):
            exec(compile(source, "script.py", "exec"), names)
    # steps of each run; the first warms up
    seconds = sorted(after - before for before, after in itertools.pairwise(times))
    result = {"dtype": args.dtype, "num_steps": len(times), "median_step_seconds": seconds[len(seconds) // 2]}
    if "accs" in names:
        result["accuracies"] = names["accs"].tolist()
    print(json.dumps({**result, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
