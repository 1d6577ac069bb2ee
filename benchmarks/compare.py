"""Measures every bar of BENCHMARKS.md in one go and writes it: lit_cifar beside plain PyTorch, plain Lightning,
torchvision's DataLoader, and a peer's speedrun if its script is given. Run it on a quiet machine.

    python benchmarks/compare.py DATA_DIR [--only NAME ...] [--airbench94 SCRIPT] [--keep FOLDER] [--peers FOLDER]

DATA_DIR is an image tree or an archive of one. With --only, the other sections of BENCHMARKS.md stay as they are. The
recipes that train for hours, `speedrun95`, `speedrun96` and `resnet18`, are measured when --only names them.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from run_airbench import ended_runs

from lit_cifar.bench import device
from lit_cifar.results.report import commit, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEER_STEPS = 10  # steps in each timing of a peer's run; the first warms up
DTYPE = re.compile(r'"dtype": "(\w+)"')  # in the line that run_airbench.py ends with


@dataclass
class Row:
    """One quantity; `met` is None where there is no bar."""

    quantity: str
    ours: str
    reference: str = "-"
    ratio: str = "-"
    bar: str = "-"
    met: bool | None = None


@dataclass
class Section:
    """What one measurement writes: its commands, a table of bars, and lines below it."""

    title: str
    commands: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines = [f"## {self.title}", "", *(f"    {command}" for command in self.commands), ""]
        lines += ["| quantity | lit_cifar | reference | ratio | bar | met |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            met = "-" if row.met is None else "yes" if row.met else "**no**"
            lines.append(f"| {row.quantity} | {row.ours} | {row.reference} | {row.ratio} | {row.bar} | {met} |")
        return [*lines, "", *(f"{note}\n" for note in self.notes)]


def compared(
    quantity: str,
    ours: str,
    reference: str,
    ratio: float,
    at_most: float | None = None,
    at_least: float | None = None,
    decimals: int = 3,
) -> Row:
    """The row of a ratio, and of its bar where it has one."""
    row = Row(quantity, ours, reference, f"{ratio:.{decimals}f}")
    if at_most is not None:
        row.bar, row.met = f"at most {at_most:.3g}", ratio <= at_most
    elif at_least is not None:
        row.bar, row.met = f"at least {at_least:.3g}", ratio >= at_least
    return row


def run(*args: object, **env: str) -> str:
    """Standard output of a Python command, which must succeed."""
    command = [sys.executable, *map(str, args)]
    print("$ python", *command[1:], flush=True)
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    return done.stdout


def run_json(*args: object, **env: str) -> dict[str, Any]:
    """The JSON in the last line of a command's standard output."""
    result: dict[str, Any] = json.loads(run(*args, **env).splitlines()[-1])
    return result


def fit(*flags: object, **env: str) -> dict[str, Any]:
    """results.json of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run("-m", "lit_cifar.fit", *flags, "--trainer.default_root_dir", folder, **env)
        results: dict[str, Any] = json.loads((Path(folder) / "lightning_logs/version_0/results.json").read_bytes())
        return results


def per_cent(share: float) -> str:
    return f"{100 * share:.2f} %"


def tutorial(args: argparse.Namespace) -> Section:
    """Whole processes in turn: plain PyTorch, ours, plain Lightning."""
    plain, ours = [], []
    for seed in range(args.pairs):
        plain.append(run_json(HERE / "plain_pytorch.py", args.data_dir, "--seed", seed))
        ours.append(fit("--data_dir", args.data_dir, "--seed", seed))
    lightning = run_json(HERE / "plain_lightning.py", args.data_dir, "--max_steps", args.lightning_steps)
    ratio = statistics.median(a["seconds"]["total"] / b["seconds"]["total"] for a, b in zip(ours, plain, strict=True))
    plain_step, our_step = (
        1000 * statistics.median(values)
        for values in (
            [result["seconds"]["train"] / result["num_steps"] for result in plain],
            [result["seconds"]["fit"] / result["num_steps"] for result in ours],
        )
    )
    peak = max(result["peak_memory"]["resident"] for result in ours) / 1e9
    lightning_step = 1000 * lightning["seconds"]["train"] / lightning["num_steps"]
    return Section(
        "The tutorial, whole process",
        [
            f"python benchmarks/plain_pytorch.py {args.data_dir} --seed 0",
            f"python -m lit_cifar.fit --data_dir {args.data_dir} --seed 0",
            f"python benchmarks/plain_lightning.py {args.data_dir} --max_steps {args.lightning_steps}",
        ],
        [
            compared(
                f"imports to report, s (medians, n = {args.pairs})",
                f"{statistics.median(result['seconds']['total'] for result in ours):.1f}",
                f"{statistics.median(result['seconds']['total'] for result in plain):.1f} (plain script)",
                ratio,
                at_most=1 / 3,
            ),
            *(
                compared("training step, ms", f"{our_step:.2f}", f"{other:.2f} ({name})", our_step / other)
                for name, other in {"plain script": plain_step, "plain Lightning": lightning_step}.items()
            ),
            Row(
                "accuracy on 10,000 images",
                ", ".join(per_cent(result["accuracy"]) for result in ours),
                ", ".join(per_cent(result["accuracy"]) for result in plain),
                bar="equal",
            ),
            Row("peak resident memory, GB", f"{peak:.2f}", bar="at most 1.1", met=peak <= 1.1),
        ],
    )


def step(args: argparse.Namespace) -> Section:
    """Everything on against barebones, and against a loop by hand."""
    flags = ["configs/tutorial.yaml", "--stage", "step", "--runs", "9", "--data_dir", args.data_dir]
    flags += ["--trainer.max_steps", "2500"]
    result = run_json("-m", "lit_cifar.bench", *flags)
    by_hand = run_json(HERE / "loop_by_hand.py", args.data_dir, "--runs", 5)
    ratio, of_hand = result["ratio"]["median"], by_hand["ratio"]["median"]
    return Section(
        "A training step with everything on, against the same under barebones, and by hand",
        [
            f"python -m lit_cifar.bench {' '.join(map(str, flags))}",
            f"python benchmarks/loop_by_hand.py {args.data_dir} --runs 5",
        ],
        [
            compared(
                f"tutorial step, ms (medians, n = {result['ratio']['n']})",
                f"{result['as configured']['median']:.3f}",
                f"{result['barebones']['median']:.3f} (barebones)",
                ratio,
                at_most=1.05,
            ),
            compared(
                f"the same, us of CPU time (medians, n = {len(by_hand['ratio']['values'])})",
                f"{by_hand['ours, us']['median']:.0f}",
                f"{by_hand['by hand, us']['median']:.0f} (loop by hand on images in memory)",
                of_hand,
                at_most=1.03,
            ),
        ],
        [
            f"Ratios of the pairs: {', '.join(f'{value:.3f}' for value in sorted(measured['ratio']['values']))}."
            for measured in (result, by_hand)
        ],
    )


def loader(args: argparse.Namespace) -> Section:
    """Crop, flip, scale and normalise, in turn with torchvision's."""
    flags = ["configs/resnet18.yaml", "--stage", "loader", "--runs", "3", "--data_dir", args.data_dir]
    flags += ["--data.augment.cutout", "0", "--data.augment.pad", "zeros"]  # what the reference does, no more
    ours, theirs = [], []
    for _ in range(3):
        ours.append(run_json("-m", "lit_cifar.bench", *flags, OMP_NUM_THREADS="1")["images/s"]["mean"])
        theirs.append(run_json(HERE / "torchvision_loader.py", args.data_dir)["images/s"])
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Section(
        "The input pipeline: crop, flip, scaling, normalising, batch 512",
        [
            f"OMP_NUM_THREADS=1 python -m lit_cifar.bench {' '.join(map(str, flags))}",
            f"python benchmarks/torchvision_loader.py {args.data_dir}",
        ],
        [
            compared(
                "images/s (medians, n = 3)",
                f"{statistics.median(ours):,.0f} (one thread)",
                f"{statistics.median(theirs):,.0f} (torchvision, 2 workers)",
                ratio,
                at_least=20,
                decimals=1,
            )
        ],
    )


def speedrun94(args: argparse.Namespace) -> Section:
    """Ours over some seeds, in the faster precision. A whole run of the peer takes long: its steps are timed before and
    after ours."""
    flags = bench_flags(args, "speedrun94", 5)
    step_seconds = {precision: _speedrun_step(args, precision) for precision in ("32-true", "bf16-mixed")}
    if not args.precision:
        flags += ["--precision", min(step_seconds, key=step_seconds.__getitem__)]
    commands = [f"python -m lit_cifar.bench {' '.join(map(str, flags))}"]
    peers: dict[str, list[float]] = {"bfloat16": [], "float32": []}

    def time_peer() -> None:
        for dtype, measured in peers.items():
            peer = [HERE / "run_airbench.py", args.airbench94, args.data_dir, "--steps", PEER_STEPS, "--dtype", dtype]
            measured.append(run_json(*peer)["loops"]["main"]["median_seconds"])

    if args.airbench94:
        peer = f"airbench94_muon.py {args.data_dir} --steps {PEER_STEPS} --dtype bfloat16"
        commands.append(f"python benchmarks/run_airbench.py {peer}")
        time_peer()
    result = bench(args, "speedrun94", flags)
    if args.airbench94:
        time_peer()
    seconds, accuracy, plain = (result[name] for name in ("fit, s", "accuracy, %", "accuracy without TTA, %"))
    rows = []
    for dtype, times in peers.items():
        if times:
            peer_seconds = 200 * statistics.fmean(times)
            ratio = seconds["mean"] / peer_seconds
            reference = f"{peer_seconds:.0f} (airbench94_muon in {dtype}: 200 steps of {peer_seconds / 200:.2f} s)"
            quantity, at_most = f"fit, s (mean, n = {seconds['n']})", 0.45 if dtype == "bfloat16" else None
            rows.append(compared(quantity, f"{seconds['mean']:.0f}", reference, ratio, at_most))
    rows.append(
        Row(
            "a step of ours, s (mean over its sides)",
            ", ".join(f"{value:.2f} ({precision})" for precision, value in step_seconds.items()),
        )
    )
    found = f"{accuracy['mean']:.2f} (std {accuracy['std'] or 0:.2f})"
    rows.append(
        Row(
            f"accuracy with TTA, % (mean, n = {accuracy['n']})",
            found,
            "90.7 on the JPEG data",
            bar="at least 90.7",
            met=accuracy["mean"] >= 90.7,
        )
    )
    rows.append(Row("accuracy without TTA, %", f"{plain['mean']:.2f}", "89.5 on the JPEG data"))
    return Section("speedrun94 on the CPU", commands, rows, [each_run(result)])


def bench_flags(args: argparse.Namespace, recipe: str, num_runs: int) -> list[object]:
    """Of `lit_cifar.bench` for a recipe's training runs, as many as were asked for, or else `num_runs`."""
    flags = [f"configs/{recipe}.yaml", "--runs", args.runs or num_runs, "--data_dir", args.data_dir]
    return flags + (["--precision", args.precision] if args.precision else [])


def bench(args: argparse.Namespace, recipe: str, flags: list[object]) -> dict[str, Any]:
    """What bench measures of a recipe, whose runs are kept or found where --keep says."""
    return run_json("-m", "lit_cifar.bench", *flags, *(["--keep", args.keep / recipe] if args.keep else []))


def trained(recipe: str, num_runs: int, peer: str = "") -> Callable[[argparse.Namespace], Section]:
    """The section of a recipe that trains for hours, beside a peer's script that did so before.

    Args:
        recipe: its name.
        num_runs: how many runs it is given.
        peer: of the files in --peers that run_airbench.py printed, what their names begin with.
    """

    def section(args: argparse.Namespace) -> Section:
        flags = bench_flags(args, recipe, num_runs)
        result = bench(args, recipe, flags)
        commands = [f"python -m lit_cifar.bench {' '.join(map(str, flags))}"]
        peers = {}
        for file in sorted(args.peers.glob(f"{peer}*.log")) if args.peers and peer else []:
            printed = file.read_text(encoding="utf-8")
            peers[file.stem] = ended_runs(printed)
            dtype = "".join(f" --dtype {name}" for name in DTYPE.findall(printed))
            commands.append(f"python benchmarks/run_airbench.py {peer}.py {args.data_dir}{dtype} > {file.name}")
        return Section(f"{recipe} on the CPU", commands, beside_peers(result, peers), [each_run(result)])

    return section


def each_run(result: dict[str, Any]) -> str:
    """The accuracies of bench's runs, and the commit that trained them: runs that were kept may be older."""
    accuracies = [round(value, 2) for value in result["accuracy, %"]["values"]]
    return f"Accuracies: {accuracies}, trained at commit {result['commit']}."


def beside_peers(result: dict[str, Any], peers: dict[str, dict[str, list[float]]]) -> list[Row]:
    """Rows of a recipe's accuracies and seconds, one for each peer that has runs, or one without.

    Args:
        result: of bench.
        peers: what ended_runs gives, by name.
    """

    def of_ours(name: str) -> list[float]:
        return result.get(name, {}).get("values", [])

    both = zip(of_ours("fit, s"), of_ours("test, s"), strict=True)
    quantities = [
        ("accuracy, %", of_ours("accuracy, %"), "accuracies", 100),
        ("accuracy without TTA, %", of_ours("accuracy without TTA, %"), "accuracies_without_tta", 100),
        ("fit and test, s", [fit_seconds + test_seconds for fit_seconds, test_seconds in both], "seconds", 1),
    ]
    rows = []
    for name, values, key, factor in quantities:
        for peer, runs in peers.items() or [("", {})]:
            row = Row(name, spread(values))
            theirs = [factor * value for value in runs.get(key, [])]
            if values and theirs:
                row.reference = spread(theirs, peer)
                mean, other = statistics.fmean(values), statistics.fmean(theirs)
                row.ratio = f"{mean / other:.3f}" if factor == 1 else f"{mean - other:+.2f} points"
                if key != "accuracies_without_tta":
                    row.bar, row.met = ("less", mean < other) if factor == 1 else ("no less", mean >= other)
            rows.append(row)
    return rows


def spread(values: list[float], of: str = "") -> str:
    """Mean, standard deviation and n, and what they are `of`."""
    deviation = f"std {statistics.stdev(values):.2f}, " if len(values) > 1 else ""
    named = f", {of}" if of else ""
    return f"{statistics.fmean(values):.2f} ({deviation}n = {len(values)}{named})" if values else "-"


def _speedrun_step(args: argparse.Namespace, precision: str) -> float:
    """Mean seconds of three steps at each of the three sides, after a first step."""
    flags = ["--config", "configs/speedrun94.yaml", "--data_dir", args.data_dir, "--precision", precision]
    flags += ["--trainer.max_steps", 10, "--trainer.limit_test_batches", 1, "--trainer.enable_checkpointing", "false"]
    seconds = fit(*flags)["seconds"]
    return float(seconds["fit"] - seconds["first_step"]) / 9


def processes(args: argparse.Namespace) -> Section:
    """Seconds a step from the times at which a run prints its steps' lines, for one and two processes."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.pairs):
        for devices, measured in times.items():
            measured.append(_seconds_a_step(args, devices))
    speedup = statistics.median(one / two for one, two in zip(*times.values(), strict=True))
    one, two = (statistics.median(measured) for measured in times.values())
    flags = ["tutorial", "--stage", "step", "--devices", "2", "--batch_size", "64", "--accelerator", "cpu"]
    flags += ["--runs", "5", "--data_dir", args.data_dir, "--trainer.max_steps", "1500"]
    small = run_json("-m", "lit_cifar.bench", *flags, OMP_NUM_THREADS="1")
    ratio = small["ratio"]["median"]
    return Section(
        "Two processes",
        [
            f"OMP_NUM_THREADS=1 python -m lit_cifar.fit {' '.join(_resnet18_steps('N'))}",
            f"OMP_NUM_THREADS=1 python -m lit_cifar.bench {' '.join(map(str, flags))}",
        ],
        [
            compared(
                f"ResNet-18, batch 512, s a step (medians, n = {args.pairs})",
                f"{two:.2f} (2 processes)",
                f"{one:.2f} (1 process)",
                speedup,
                at_least=1.85,
                decimals=2,
            ),
            compared(
                f"the tutorial's net, batch 64, ms a step (medians, n = {small['ratio']['n']})",
                f"{small['as configured']['median']:.2f}",
                f"{small['barebones']['median']:.2f} (Lightning's own loop)",
                ratio,
                at_most=0.7,
            ),
        ],
    )


def _resnet18_steps(devices: object) -> list[str]:
    """Flags of `lit_cifar.fit` for eight steps that are all alike, a line for each."""
    flags = ["--config", "configs/resnet18.yaml", "--accelerator", "cpu", "--devices", str(devices)]
    return [*flags, "--model.sides", "null", "--trainer.max_steps", "8", "--running_loss.every_n_steps", "1"]


def _seconds_a_step(args: argparse.Namespace, devices: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lit_cifar.fit", *_resnet18_steps(devices)]
        command += ["--data_dir", str(args.data_dir), "--trainer.default_root_dir", folder]
        command += ["--trainer.limit_test_batches", "1", "--trainer.enable_checkpointing", "false"]
        print("$ python", *command[1:], flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        arrived = []
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, encoding="utf-8") as process:
            assert process.stdout is not None
            for line in process.stdout:
                if re.match(r"epoch 1  step", line):
                    arrived.append(time.perf_counter())
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    # the first two warm up
    return statistics.median(after - before for before, after in itertools.pairwise(arrived[1:]))


DECODE = """
from pathlib import Path
from lit_cifar import cli, fit
from lit_cifar.results import report
from lit_cifar.data.source import find_source
find_source({!r}).prepare()
print(report.peak_memory()["resident"])
"""


def start(args: argparse.Namespace) -> Section:
    """To the first step, against importing Lightning and reading the same data; and the memory of a first use."""
    read = (
        "import time; started = time.perf_counter(); import lightning.pytorch; from pathlib import Path; "
        "from lit_cifar.data.datamodule import CIFAR10DataModule; "
        f"data = CIFAR10DataModule({str(args.data_dir)!r}); data.prepare_data(); "
        "data.setup('fit'); data.setup('test'); import json; print(json.dumps(time.perf_counter() - started))"
    )
    alone = "import time; begun = time.perf_counter(); import lightning.pytorch; print(time.perf_counter() - begun)"
    ours, floors, imports = [], [], []
    for _ in range(5):
        imports.append(float(run("-c", alone)))
        floors.append(float(run("-c", read)))
        ours.append(fit("--data_dir", args.data_dir, "--trainer.max_steps", 1)["seconds"]["start"])
    ratio = statistics.median(a / b for a, b in zip(ours, floors, strict=True))
    of_import = statistics.median(a / b for a, b in zip(ours, imports, strict=True))
    with tempfile.TemporaryDirectory() as cache:
        peak = float(run("-c", DECODE.format(str(args.data_dir)), LIT_CIFAR_CACHE=cache)) / 1e9
    return Section(
        "Start, and the memory of a first use",
        [f"python -m lit_cifar.fit --data_dir {args.data_dir} --trainer.max_steps 1"],
        [
            compared(
                "to the first step, s (medians, n = 5)",
                f"{statistics.median(ours):.2f}",
                f"{statistics.median(floors):.2f} (import lightning.pytorch, read the data)",
                ratio,
                at_most=1.5,
                decimals=2,
            ),
            compared(
                "to the first step, s (medians, n = 5)",
                f"{statistics.median(ours):.2f}",
                f"{statistics.median(imports):.2f} (import lightning.pytorch alone)",
                of_import,
                at_most=1.1,
                decimals=2,
            ),
            Row(
                "peak resident memory of decoding 60,000 images, with all that fit imports, GB",
                f"{peak:.2f}",
                bar="under 1",
                met=peak < 1,
            ),
        ],
    )


def scale(args: argparse.Namespace) -> Section:
    """As many classes and images as ImageNet has, against 50,000 images: memory, and what an epoch costs a step."""
    script = "tests/stress/scale.py"
    memory = run_json(script, "--json")
    costs = run_json(script, "--rounds", 5, "--json")
    images, peak, (few, many) = memory["images"] / 1e9, memory["peak"] / 1e9, costs["with the net's steps"]
    return Section(
        "1,000 classes, 1.28 million images (synthetic)",
        [f"python {script}", f"python {script} --rounds 5"],
        [
            compared(
                "peak resident memory of a whole run, GB",
                f"{peak:.2f}",
                f"{images:.2f} (bytes of the images)",
                peak / images,
                at_most=1.3,
            ),
            compared(
                "whole epochs, ms a step of 500 images of the tutorial's net (medians, n = 5)",
                f"{many:.3f}",
                f"{few:.3f} (50,000 images)",
                many / few,
                at_most=1.05,
            ),
        ],
    )


SECTIONS: dict[str, Callable[[argparse.Namespace], Section]] = {
    "tutorial": tutorial,
    "step": step,
    "loader": loader,
    "start": start,
    "processes": processes,
    "scale": scale,
    "speedrun94": speedrun94,
    "speedrun95": trained("speedrun95", 3, "airbench95"),
    "speedrun96": trained("speedrun96", 2, "airbench96_faster"),
    "resnet18": trained("resnet18", 1),
}
HOURS = ("speedrun95", "speedrun96", "resnet18")
MARK = "<!-- {} -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument(
        "--only", nargs="*", choices=list(SECTIONS), default=[name for name in SECTIONS if name not in HOURS]
    )
    parser.add_argument("--runs", type=int, help="of each recipe, in place of 5, 3, 2 and 1")
    parser.add_argument("--precision", help="of the recipes' runs; else speedrun94's faster one, and the others' own")
    parser.add_argument("--keep", type=Path, help="where the recipes' runs stay, for the same command to go on with")
    parser.add_argument("--peers", type=Path, help="files that run_airbench.py printed: airbench95.log, ...")
    parser.add_argument("--pairs", type=int, default=3, help="of the tutorial and of one and two processes")
    parser.add_argument("--lightning_steps", type=int, default=3000, help="of the plain Lightning script")
    parser.add_argument("--airbench94", type=Path, help="a copy of airbench94_muon.py; see benchmarks/README.md")
    parser.add_argument("--output", type=Path, default=ROOT / "BENCHMARKS.md")
    args = parser.parse_args()
    made_by = commit()  # before BENCHMARKS.md is changed
    for name in args.only:
        section = SECTIONS[name](args)
        software = ", ".join(f"{package} {version}" for package, version in versions().items())
        stamp = f"{time.strftime('%Y-%m-%d')}; {device()}; {software}; commit {made_by}."
        text = "\n".join([MARK.format(name), "", *section.lines(), stamp, "", MARK.format(f"end of {name}")])
        write(args.output, name, text)
        print(text, flush=True)


def write(output: Path, name: str, text: str) -> None:
    """Puts a section in its place between its marks, or at the end."""
    whole = output.read_text(encoding="utf-8") if output.exists() else "# Benchmarks\n"
    pattern = re.compile(re.escape(MARK.format(name)) + ".*" + re.escape(MARK.format(f"end of {name}")), re.DOTALL)
    whole = pattern.sub(lambda _: text, whole) if pattern.search(whole) else f"{whole.rstrip()}\n\n{text}\n"
    output.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
