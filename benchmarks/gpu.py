"""Measures lit_cifar on one GPU beside its peers, within so many seconds, and ends in a table.

    python benchmarks/gpu.py DATA_DIR [--peers FOLDER] [--seconds 520] [--output FOLDER] [--only PART ...]

DATA_DIR is what --data_dir takes; the folder of --peers holds the peers' scripts, at any depth (README.md says where to
get them); any other flag goes to each run of lit_cifar. Each part is a process with a time to end by. One that fails,
hangs or runs out of time leaves a row that says so, and the rest goes on. After each part gpu-results.jsonl and
gpu-results.md are written into the output folder, and another call with --only adds to them.

gpu_parts.py has what a part does in its process. Only the standard library is imported here, so that whatever is broken
on a machine ends no more than its part.
"""

import argparse
import contextlib
import inspect
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT = "RESULT "  # opens a line that is read, with a JSON object
PEAK = "peak GPU memory, bytes:"
GRACE_SECONDS = 5.0  # from a part's own end to its SIGTERM, and from there to its SIGKILL
Row = dict[str, Any]


# ---- what parts print, however far they came, and what a row makes of it ----


def printed(text: str) -> list[Row]:
    return [json.loads(line.removeprefix(RESULT)) for line in text.splitlines() if line.startswith(RESULT)]


def environment(text: str) -> Row:
    return {"figures": ", ".join(f"{name} {value}" for line in printed(text) for name, value in line.items())}


def tests(text: str) -> Row:
    """Counts of pytest's outcomes, and the names of what failed."""
    found = re.findall(r"^\S*::(.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    kinds = [kind for _, kind in found]
    counts = ", ".join(f"{kinds.count(kind)} {kind.lower()}" for kind in dict.fromkeys(kinds))
    failed = [name for name, kind in found if kind in ("FAILED", "ERROR")]
    return {"n": len(found), "figures": "; ".join([counts, *failed])}


def ours(text: str) -> Row:
    """Of results.json of each run; those of one epoch warm up and are not counted.

    `seconds` are those that the peers' clocks count too: whitening, steps, and the test with its augmentation.
    """
    first, runs = ([run for run in printed(text) if run["warms_up"] is kind] for kind in (True, False))
    row: Row = {"n": len(runs), "accuracy": [100 * run["accuracy"] for run in runs]}
    row["seconds"] = [
        steps_seconds(run) + run["seconds"].get("whitening", 0.0) + run["seconds"]["test"] for run in runs
    ]
    shown = runs or first[-1:]
    if shown:
        means = {name: statistics.fmean(run["seconds"][name] for run in shown) for name in shown[0]["seconds"]}
        parts = ", ".join(f"{name} {mean:.2f} s" for name, mean in means.items())
        row["figures"] = f"{'' if runs else 'one epoch alone: '}{parts}; {shown[-1]['graphs']} graphs compiled"
        row["peak"] = shown[-1]["peak_memory"]["gpu"]
        row["step_ms"] = 1000 * steps_seconds(shown[-1]) / shown[-1]["num_steps"]
    return row


def steps_seconds(run: Row) -> float:
    """Of a run's steps: after a synchronisation, where results.json has it; else the fit without its first step."""
    seconds = run["seconds"]
    return float(seconds.get("steps", seconds["fit"] - seconds["first_step"]))


def peer(text: str) -> Row:
    """Of the table that peers print: rows 'eval' end in accuracy with augmentation and seconds. The first run warms up,
    or compiles, and is not counted."""
    runs = [row.split("|")[-2:] for row in re.findall(r"\|\s*eval\s*\|([\d. |]+)\| *\n", text)][1:]
    peak = re.findall(rf"^{PEAK} (\d+)", text, re.MULTILINE)
    row: Row = {"n": len(runs), "peak": int(peak[-1]) if peak else None}
    return row | {"accuracy": [100 * float(run[0]) for run in runs], "seconds": [float(run[1]) for run in runs]}


def waits(text: str) -> Row:
    template = "{recipe}: {waits} waits, {to_host} copies to the host, {to_device} to the device, {kernels} kernels"
    lines = [template.format(**line) + f" in {line['steps']} steps" for line in printed(text)]
    return {"n": len(lines), "figures": "; ".join(lines)}


def loader(text: str) -> Row:
    """Of the JSON in bench's last line."""
    rates = [json.loads(line)["images/s"]["mean"] for line in text.splitlines() if line.startswith('{"config"')]
    return {"rate": rates[0], "figures": f"{rates[0]:,.0f} images/s"} if rates else {}


@dataclass(frozen=True)
class Part:
    """One measurement.

    Args:
        read: makes a row of what its process printed.
        share: its share of the time that is left, beside those of the other parts.
        least: seconds without which it is not begun.
        arguments: of gpu_parts.py, or of Python where they begin with '-m'.
        peer_of: of a peer's script, which is named in place of them, the recipe that it stands beside.
    """

    read: Callable[[str], Row]
    share: float
    least: float
    arguments: tuple[str, ...]
    peer_of: str = ""


TESTS = ("-m", "pytest", "-v", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "tests/test_gpu.py")
LOADER = ("-m", "lit_cifar.bench", "configs/speedrun94.yaml", "--stage", "loader", "--runs", "2")
PARTS = {  # in the order of their importance; seconds are guesses for an H100, where most of a part is compiling
    "environment": Part(environment, 90, 90, ("environment",)),
    "tests": Part(tests, 100, 100, TESTS),
    "waits": Part(waits, 60, 60, ("waits",)),
    "speedrun94": Part(ours, 110, 100, ("runs", "speedrun94")),
    "loader": Part(loader, 25, 20, LOADER),
    "cifar10_speedrun": Part(peer, 90, 80, ("cifar10_speedrun.py",), "speedrun94"),
    "airbench94_muon": Part(peer, 90, 80, ("airbench94_muon.py",), "speedrun94"),
    "speedrun96": Part(ours, 90, 70, ("runs", "speedrun96")),
    "airbench96_faster": Part(peer, 120, 100, ("airbench96_faster.py",), "speedrun96"),
    "speedrun95": Part(ours, 60, 50, ("runs", "speedrun95")),
    "airbench95": Part(peer, 50, 40, ("airbench95.py",), "speedrun95"),
    "tutorial": Part(ours, 40, 25, ("runs", "tutorial")),
    "resnet18": Part(ours, 90, 25, ("runs", "resnet18")),
}


# ---- time ----


def within(num_runs: int, ends: float) -> Iterator[int]:
    """0, 1, ... as long as another run like the newest ends in time; at least one. Peers' scripts get a copy of it.

    Args:
        num_runs: how many at most.
        ends: on time.time()'s clock, which all processes share.
    """
    started = time.time()
    for run in range(num_runs):
        yield run
        now = time.time()
        if now + (now - started) / (1 if run else 4) > ends:  # the first may have compiled
            return
        started = now


def allowed(names: list[str], left: float) -> float:
    """Seconds for the first of the parts that are left: its share of the time, and no less than it needs to begin."""
    part = PARTS[names[0]]
    return min(left, max(part.least, left * part.share / sum(PARTS[name].share for name in names)))


def edited(source: str, num_runs: int, ends: float) -> str:
    """A peer's script that makes as many runs as fit, besides one to warm up, and tells its peak memory.

    Raises:
        ValueError: it is not built like the scripts that this was written for.
    """
    warms_up = re.search(r"^ *main\(.warmup.", source, re.MULTILINE)  # by itself; else its first run does
    num_runs += not warms_up
    text, found = re.subn(r"for run in range\(\d+\)", f"for run in within({num_runs}, {ends})", source)
    if found != 1:
        raise ValueError("it has no 'for run in range(N)': not the version that this was written for")
    # a pause between runs to cool the GPU, which no clock counts and no other script here makes
    text = re.sub(r"torch\.cuda\._sleep\(.*\)", "None", text)
    head = f"import time\nfrom collections.abc import Iterator\n\n\n{inspect.getsource(within)}\n"
    return f"{head}\n{text}\nprint('{PEAK}', torch.cuda.max_memory_allocated())\n"


# ---- running ----


def run(command: list[str], folder: Path, seconds: float, log: Path) -> tuple[str, str]:
    """What a command printed, and its end in words: 'ok', or why not. It and what it started have ended then."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("ab+") as output:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        begin, streams = output.tell(), {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(GRACE_SECONDS)
        output.seek(begin)
        text = output.read().decode(errors="replace")
    last = ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1][:200]
    if code is None:
        return text, f"stopped after {seconds:.0f} s; last line: {last}"
    return text, f"failed ({code}): {last}" if code else "ok"


def command_of(name: str, args: argparse.Namespace, work: Path, ends: float) -> tuple[list[str], Path]:
    """The command of a part and the folder to run it in.

    Raises:
        ValueError: there is nothing to run.
    """
    first, *rest = PARTS[name].arguments
    if PARTS[name].peer_of:
        if args.peers is None:
            raise ValueError("not given: --peers FOLDER")
        found = sorted(args.peers.rglob(first), key=lambda path: len(path.parts))
        if not found:
            raise ValueError(f"{first} is not in {args.peers}")
        if not (work / "cifar10/test.pt").exists():
            raise ValueError("the data could not be written for it: see environment")
        (work / first).write_text(edited(found[0].read_text(encoding="utf-8"), args.runs, ends), encoding="utf-8")
        return [sys.executable, first], work
    if name != "tests" and not args.data_dir.exists():
        raise ValueError(f"no data at {args.data_dir}: nothing is downloaded here")
    given = ["--data_dir", str(args.data_dir), "--accelerator", args.accelerator, *args.flags]
    if name == "environment":
        given = [str(args.data_dir), *([str(work / "cifar10")] if args.peers else [])]
    elif name == "tests":
        given = []
    elif first == "runs":
        given = [str(args.runs), str(ends), *given]
    own = [] if first == "-m" else [str(HERE / "gpu_parts.py")]
    return [sys.executable, *own, first, *rest, *given], ROOT


def measure(name: str, args: argparse.Namespace, work: Path, seconds: float) -> Row:
    """The row of a part, whatever happens to it."""
    started, row = time.time(), {"part": name}
    try:
        command, folder = command_of(name, args, work, started + seconds - 2 * GRACE_SECONDS)
    except (OSError, ValueError) as error:
        return row | {"state": str(error)}
    text, state = run(command, folder, seconds - GRACE_SECONDS, args.output / "gpu.log")
    try:
        row |= PARTS[name].read(text)
    except Exception as error:  # a line cut in its middle, a file of another version
        state += f"; its output cannot be read ({type(error).__name__}: {error})"
    return row | {"state": state, "took": time.time() - started}


# ---- the table ----


def spread(values: list[float], decimals: int) -> str:
    """Mean and standard deviation."""
    deviation = f" (std {statistics.stdev(values):.{decimals}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{decimals}f}{deviation}" if values else "-"


def table(rows: dict[str, Row]) -> str:
    """The rows in Markdown, and below them ours beside the peers."""
    lines = ["| part | n | accuracy, % | seconds | peak GPU memory, MB | figures | took, s | state |", "|" + "---|" * 8]
    for name, row in rows.items():
        cells = [name, row.get("n", "-"), spread(row.get("accuracy", []), 2), spread(row.get("seconds", []), 3)]
        cells += [f"{row['peak'] / 1e6:,.0f}" if row.get("peak") else "-", row.get("figures") or "-"]
        cells += [f"{row.get('took', 0):.0f}", row["state"]]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    lines.append("")
    for name, part in PARTS.items():
        one, other = rows.get(part.peer_of, {}), rows.get(name, {})
        if one.get("seconds") and other.get("seconds"):
            ratio = statistics.fmean(one["seconds"]) / statistics.fmean(other["seconds"])
            gain = statistics.fmean(one["accuracy"]) - statistics.fmean(other["accuracy"])
            line = f"- {part.peer_of} against {name}: {ratio:.3f} of its seconds, accuracy {gain:+.2f} points"
            lines.append(f"{line} (n = {one['n']} and {other['n']})")
    rate, step_ms = rows.get("loader", {}).get("rate"), rows.get("speedrun94", {}).get("step_ms")
    if rate and step_ms:
        share = 1000 * 2000 / rate / step_ms
        lines.append(f"- input pipeline of speedrun94: {100 * share:.1f} % of a step, which takes {step_ms:.2f} ms")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--peers", type=Path, help="a folder with the peers' scripts")
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--runs", type=int, default=20, help="of each recipe and each peer, at most")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT", "gpu-results"))
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu", help="cpu: to try this program out")
    args, args.flags = parser.parse_known_args()
    if args.flags and not args.flags[0].startswith("-"):
        parser.error(f"what is {args.flags[0]}? --peers names the folder of the peers' scripts")
    ends = time.time() + args.seconds
    if args.accelerator == "cpu":
        os.environ["LIT_CIFAR_TEST_DEVICE"] = "cpu"  # of tests/test_gpu.py
    for name in ("data_dir", "peers", "output"):
        setattr(args, name, path.resolve() if (path := getattr(args, name)) else None)
    kept = args.output / "gpu-results.jsonl"
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
        rows = {row["part"]: row for row in map(json.loads, lines)}
    except (OSError, ValueError) as error:  # no folder to write in, or a file cut short
        parser.error(f"--output {args.output}: {error}; choose another")
    names = [name for name in PARTS if name in args.only or name == "environment"]
    signal.signal(signal.SIGTERM, lambda *given: sys.exit(143))  # what runs is ended, and the table printed
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as work:
            for index, name in enumerate(names):
                left = ends - time.time() - 2 * GRACE_SECONDS
                rows[name] = {"part": name, "state": "no time left"}
                if left >= PARTS[name].least:
                    rows[name] = measure(name, args, Path(work), allowed(names[index:], left))
                print(f"{name}: {rows[name]['state']}; {rows[name].get('figures', '')}", flush=True)
                kept.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
                (args.output / "gpu-results.md").write_text(table(rows), encoding="utf-8")
    finally:
        print(f"\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
