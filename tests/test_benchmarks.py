"""benchmarks/gpu.py without a GPU: what it reads, how it shares its time, and that nothing ends it early; what
run_airbench.py makes of a peer's script, and compare.py of what it printed."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, SHORT, make_tree

sys.path.append(str(ROOT / "benchmarks"))

import compare
import gpu
import gpu_parts
import run_airbench

# what cifar10_speedrun.py prints, its lines torn by carriage returns, and airbench94_muon.py, which names a run once
HIVERGE = """\
|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |
|  warmup  |   eval  |     0.1111  |   0.0978  |       0.0963  |       40.5124  |
|       1  |   eval  |     0.9875  |   0.9314  |       0.9401  |        2.0133  |
Mean accuracy after 1 runs: 0.940100 | Mean time: 2.01s\r|    2  |   eval  | 0.9873 | 0.9346 | 0.9407 | 2.0153 |
peak GPU memory, bytes: 2500000000
"""
AIRBENCH = """|  warmup  |      0  |     0.1111  |   0.0978  |               |        1.1000  |
|          |   eval  |     0.1111  |   0.0978  |       0.0963  |        9.0000  |
|  0       |      7  |     0.9875  |   0.9314  |               |        2.5000  |
|          |   eval  |     0.9875  |   0.9314  |       0.9401  |        2.6000  |
"""
# built like the peers' scripts
SCRIPT = """
import torch
torch.load("cifar10/train.pt")
def main(run):
    torch.cuda._sleep(int(6000000000))
    print("|  %s  |   eval  |     0.9875  |   0.9314  |       0.94%02d  |        2.%04d  |" % ("", run, run))
    return 0.94
if __name__ == "__main__":
    accs = torch.tensor([main(run) for run in range(200)])
    print("Mean: %.4f    Std: %.4f" % (accs.mean(), accs.std()))
"""


def result(accuracy: float, warms_up: bool = False, **seconds: float) -> str:
    """A line of a run, as gpu_parts.py prints it."""
    run = {"accuracy": accuracy, "seconds": seconds, "num_steps": 10, "peak_memory": {"gpu": 10**9}, "graphs": 6}
    run["warms_up"] = warms_up
    return gpu.RESULT + json.dumps(run) + "\n"


def test_the_table_of_a_peer_is_read_without_its_first_run() -> None:
    found = gpu.peer(HIVERGE)
    assert (found["n"], found["seconds"], found["peak"]) == (2, [2.0133, 2.0153], 2500000000)
    assert found["accuracy"] == pytest.approx([94.01, 94.07])
    assert gpu.peer(AIRBENCH)["seconds"] == [2.6]
    assert gpu.peer(AIRBENCH[: AIRBENCH.index("2.6000") + 3])["n"] == 0  # cut off in its middle
    assert gpu.peer("Traceback")["n"] == 0


def test_the_seconds_of_ours_are_those_that_the_peers_count() -> None:
    first = result(0.5, True, fit=9.0, first_step=8.0, test=1.0)
    found = gpu.ours("noise\n" + first + result(0.9, fit=3.0, first_step=0.5, test=0.25) + "torn RESULT {")
    assert (found["n"], found["accuracy"], found["seconds"]) == (1, [90], [2.75])
    assert found["step_ms"] == 250
    assert "6 graphs" in found["figures"]
    found = gpu.ours(first + result(0.9, fit=3.0, first_step=0.5, steps=1.0, whitening=0.5, save=0.1, test=0.25))
    assert found["seconds"] == [1.75]
    assert "save 0.10 s" in found["figures"]
    alone = gpu.ours(first)
    assert (alone["n"], alone["seconds"]) == (0, [])
    assert alone["figures"].startswith("one epoch alone: fit 9.00 s")
    assert gpu.ours("Killed")["n"] == 0


def test_the_outcomes_of_tests_are_counted_and_failures_named() -> None:
    text = "tests/test_gpu.py::test_a[32-true] PASSED [ 1%]\ntests/test_gpu.py::test_b FAILED [ 2%]\n"
    assert gpu.tests(text + "FAILED tests/test_gpu.py::test_b - no\n= 1 failed, 1 passed in 3 s =") == {
        "n": 2,
        "figures": "1 passed, 1 failed; test_b",
    }


def test_waits_and_copies_of_the_steady_steps_alone_are_counted() -> None:
    def host(name: str, start: float, end: float = 0.0) -> gpu_parts.Event:
        return gpu_parts.Event(name, start, end, False)

    def device(name: str) -> gpu_parts.Event:
        return gpu_parts.Event(name, 15, 16, True)

    events = [
        host(gpu_parts.WINDOW, 10, 20),
        gpu_parts.Event(gpu_parts.WINDOW, 11, 21, True),  # the same, as the device sees it
        host("cudaDeviceSynchronize", 5),
        host("cudaLaunchKernel", 12),
        host("cuLaunchKernelEx", 13),
        host("cudaMemcpyAsync", 13),
        host("cudaStreamSynchronize", 14),
        host("aten::item", 14),
        host("cudaDeviceSynchronize", 25),  # of the profiler's end
        device("Memcpy DtoH (Device -> Pageable)"),
        device("Memcpy HtoD (Pinned -> Device)"),
        device("Memcpy DtoD (Device -> Device)"),
    ]
    assert gpu_parts.count_waits(events) == {"waits": 1, "to_host": 1, "to_device": 1, "kernels": 2}
    line = gpu.RESULT + json.dumps({"recipe": "tutorial", "steps": 10, **gpu_parts.count_waits(events)})
    assert gpu.waits(line)["figures"].startswith("tutorial: 1 waits, 1 copies to the host, 1 to the device")


def test_a_recipe_is_profiled_in_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)  # nothing is written there
    monkeypatch.setattr(gpu_parts, "RECIPES", ("tutorial",))
    gpu_parts.waits(SHORT)
    (found,) = gpu.printed(capfd.readouterr().out)
    assert found == {"recipe": "tutorial", "steps": 10, "waits": 0, "to_host": 0, "to_device": 0, "kernels": 0}


def test_runs_end_when_another_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    begun = []
    for run in gpu.within(20, 150.0):
        begun.append(run)
        now[0] += 30 if run == 0 else 6  # the first compiles
    assert begun == [0, 1, 2, 3]
    assert list(gpu.within(20, 0.0)) == [0]


def test_a_part_gets_its_share_and_no_less_than_it_needs() -> None:
    names = list(gpu.PARTS)
    left, begun = 510.0, []
    for index, name in enumerate(names):
        if left >= gpu.PARTS[name].least:
            seconds = gpu.allowed(names[index:], left)
            assert gpu.PARTS[name].least <= seconds <= left
            left -= 45 if name == "environment" else seconds  # it is done when the data are decoded
            begun.append(name)
    assert left >= 0
    assert begun[:7] == names[:7], "our 94 % recipe and both its peers, though each but the first took all that it may"
    assert gpu.allowed(["resnet18"], 300.0) == 300


def test_a_part_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = (
        "import subprocess, sys, time; print('begun', flush=True); subprocess.Popen(['sleep', '600']); time.sleep(600)"
    )
    began = time.monotonic()
    text, state = gpu.run([sys.executable, "-c", child], tmp_path, 3.0, tmp_path / "log")
    assert (text.strip(), state) == ("begun", "stopped after 3 s; last line: begun")
    assert time.monotonic() - began < 60
    text, state = gpu.run([sys.executable, "-c", "raise SystemExit('no | GPU')"], tmp_path, 60.0, tmp_path / "log")
    assert state == "failed (1): no | GPU"
    assert (tmp_path / "log").read_text().count("\n$ ") == 2


def test_the_table_names_what_was_not_measured_and_compares_the_rest() -> None:
    rows = {
        "environment": {"part": "environment", "figures": "GPU H100", "state": "ok", "took": 3.0},
        "speedrun94": {"part": "speedrun94", "n": 2, "accuracy": [94.0, 94.2], "seconds": [1.0, 2.0], "peak": 10**9},
        "loader": {"part": "loader", "rate": 2e6, "figures": "2,000,000 images/s", "state": "ok"},
        "cifar10_speedrun": {"part": "cifar10_speedrun", "n": 1, "accuracy": [94.0], "seconds": [2.0], "state": "ok"},
        "resnet18": {"part": "resnet18", "state": "failed (1): a | b"},
    }
    rows["speedrun94"] |= {"step_ms": 50.0, "figures": "", "state": "ok", "took": 60.0}
    text = gpu.table(rows)
    assert "| speedrun94 | 2 | 94.10 (std 0.14) | 1.500 (std 0.707) | 1,000 | - | 60 | ok |" in text
    assert "| resnet18 | - | - | - | - | - | 0 | failed (1): a / b |" in text
    assert "- speedrun94 against cifar10_speedrun: 0.750 of its seconds, accuracy +0.10 points (n = 2 and 1)" in text
    assert "- input pipeline of speedrun94: 2.0 % of a step, which takes 50.00 ms" in text


def test_a_script_that_does_not_warm_up_makes_a_run_more() -> None:
    assert "in within(4, 9.0)" in gpu.edited(SCRIPT, 3, 9.0)
    assert "in within(4, 9.0)" in gpu.edited(SCRIPT.replace("    accs", "    #main('warmup')\n    accs"), 3, 9.0)
    assert "in within(3, 9.0)" in gpu.edited(SCRIPT.replace("    accs", "    main('warmup')\n    accs"), 3, 9.0)


def test_a_script_that_is_not_the_peers_is_refused() -> None:
    with pytest.raises(ValueError, match="not the version that this was written for"):
        gpu.edited("print('hello')", 3, 0.0)


def test_whatever_is_missing_the_rest_goes_on(tmp_path: Path) -> None:
    """A whole call, with a peer that works, one that is another version and one that is absent."""
    peers = tmp_path / "peers" / "deep"
    peers.mkdir(parents=True)
    (peers / "cifar10_speedrun.py").write_text(SCRIPT)
    (peers / "airbench94_muon.py").write_text("print('hello')")
    flags = ["--peers", peers.parent, "--output", "out", "--runs", 3, "--accelerator", "cpu", "--only"]
    command = [sys.executable, ROOT / "benchmarks/gpu.py", make_tree(tmp_path / "tree", ("cat", "dog")), *flags]
    command += ["cifar10_speedrun", "airbench94_muon", "airbench95"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {row["part"]: row for row in map(json.loads, Path("out/gpu-results.jsonl").read_text().splitlines())}
    assert rows["environment"]["state"] == "ok", Path("out/gpu.log").read_text()
    assert "torch" in rows["environment"]["figures"]
    assert "8 and 8 images" in rows["environment"]["figures"]
    assert rows["cifar10_speedrun"]["state"] == "ok", Path("out/gpu.log").read_text()
    assert rows["cifar10_speedrun"]["seconds"] == [2.0001, 2.0002, 2.0003]
    assert "not the version" in rows["airbench94_muon"]["state"]
    assert "is not in" in rows["airbench95"]["state"]
    assert done.stdout.strip().endswith(Path("out/gpu-results.md").read_text().strip())


def test_an_output_folder_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "gpu-results.jsonl").write_text('{"part": "environ')
    for output in (tmp_path / "file" / "results", tmp_path):
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--output", str(output)])
        with pytest.raises(SystemExit, match="2"):
            gpu.main()
        assert f"gpu.py: error: --output {output}: " in capsys.readouterr().err


def test_data_that_are_not_there_cost_no_time(tmp_path: Path) -> None:
    args = argparse.Namespace(data_dir=tmp_path / "absent", peers=None, accelerator="cpu", flags=[], runs=1)
    for name in ("environment", "waits", "speedrun94", "loader"):
        assert gpu.measure(name, args, tmp_path, 60.0)["state"].startswith(f"no data at {tmp_path}")
    assert gpu.measure("airbench95", args, tmp_path, 60.0)["state"] == "not given: --peers FOLDER"


def test_one_recipe_that_fails_leaves_the_others_counts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def counts(flags: list[str]) -> dict[str, int]:
        if "configs/speedrun94.yaml" in flags:
            raise RuntimeError("no such kernel")
        return {"waits": 0, "to_host": 0, "to_device": 0, "kernels": 9}

    monkeypatch.setattr(gpu_parts, "steady_counts", counts)
    assert gpu_parts.waits(["--accelerator", "gpu"]) == 2  # compiled too
    shown = capfd.readouterr()
    assert [line["recipe"] for line in gpu.printed(shown.out)] == ["tutorial", "speedrun95", "speedrun96", "resnet18"]
    assert "no such kernel" in shown.err


@pytest.mark.slow
def test_every_kind_of_part_runs_on_the_cpu(tmp_path: Path) -> None:
    """Those of whole calls above besides; the recipes themselves are trained by other tests."""
    tree = make_tree(tmp_path / "tree", tuple(f"class_{i}" for i in range(10)), num_images=20)
    flags = ["--accelerator", "cpu", "--runs", 2, "--seconds", 3000, "--only", "waits", "tutorial", "loader"]
    limits = ["--batch_size", 10, "--trainer.limit_train_batches", 16]
    command = [*map(str, ["bash", ROOT / "benchmarks/gpu.sh", tree, *flags, *limits])]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    rows = {row["part"]: row for row in map(json.loads, Path("gpu-results/gpu-results.jsonl").read_text().splitlines())}
    log = done.stderr + Path("gpu-results/gpu.log").read_text()
    assert {row["state"] for row in rows.values()} == {"ok"}, log
    assert rows["waits"]["n"] == 5
    assert rows["tutorial"]["n"] == 2
    assert rows["loader"]["rate"] > 0


@pytest.mark.slow
def test_the_tests_for_a_gpu_can_be_run() -> None:
    """On the CPU, where those of one net and those of the data say whether their code still fits the package."""
    chosen = ["-m", "gpu", "-k", "tutorial or batches or epoch or float or resumed", ROOT / "tests/test_gpu.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *map(str, chosen)],
        cwd=ROOT,
        env={**os.environ, "LIT_CIFAR_TEST_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout
    assert gpu.tests(done.stdout)["figures"] == "6 passed"


# ---- peers on the CPU ----

# built like airbench96_faster.py, with a proxy that is trained before the net
FASTER = """
import torch
hyp = {'opt': {
    'train_epochs': 45.0,
}}
def make_net(width):
    net = torch.nn.Linear(4, width).half().cuda()
    return net
def train_proxy(model):
    masks = []
    for inputs in iter(lambda: torch.ones(2, 4, device='cuda').half(), None):
        current_steps = len(masks)
        masks.append(model(inputs))
        current_steps += 1
        if current_steps == hyp['opt']['train_epochs']:
            break
    return masks
def main(run, model_proxy, model):
    starter = torch.cuda.Event(enable_timing=True)
    ender = torch.cuda.Event(enable_timing=True)
    starter.record()
    masks = iter(train_proxy(model_proxy))
    current_steps = 0
    for mask in masks:
        logits = model(torch.ones(2, 4).half())
        current_steps += 1
    ender.record()
    torch.cuda.synchronize()
    assert logits.dtype in (torch.half, torch.float) and starter.elapsed_time(ender) > 0
    print("|   |   eval  |     0.9875  |   0.93%02d  |       0.94%02d  |        2.%04d  |" % (run, run, run))
    return 0.94
if __name__ == "__main__":
    model_proxy = make_net(3)
    model = make_net(3)
    model_proxy = torch.compile(model_proxy, mode='max-autotune')
    model = torch.compile(model, mode='max-autotune')
    accs = torch.tensor([main(run, model_proxy, model) for run in range(200)])
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "mixed"])
def test_a_peers_script_runs_on_the_cpu_and_its_loops_are_told_apart(dtype: str) -> None:
    source = run_airbench.edited(FASTER, dtype, 2, 9)
    found = run_airbench.run(source, dtype, 0)
    assert {loop: steps["num_steps"] for loop, steps in found["loops"].items()} == {"train_proxy": 18, "main": 18}
    assert all(steps["median_seconds"] > 0 < steps["mean_seconds"] for steps in found["loops"].values())
    assert found["accuracies"] == [0.94, 0.9401]
    assert found["accuracies_without_tta"] == [0.93, 0.9301]
    assert found["seconds"] == [2.0, 2.0001]
    stopped = run_airbench.run(source, dtype, 5)
    assert [steps["num_steps"] for steps in stopped["loops"].values()] == [5, 5], "both are timed, of the first run"
    assert stopped["seconds"] == []


def test_the_mean_step_is_of_whole_rounds_within_a_run() -> None:
    # every fourth step of a run takes longer; the first one warms up, and runs are far apart
    found = run_airbench.step_seconds([[7, 8, 9, 10, 14, 15], [1000, 1001, 1002, 1003, 1007]])
    assert found == {"num_steps": 11, "median_seconds": 1, "mean_seconds": 7 / 4}
    assert run_airbench.step_seconds([[7]])["mean_seconds"] == 0


@pytest.mark.parametrize("script", ["print('hello')", FASTER.replace("range(200)", "some"), f"{FASTER}torch.cuda.x()"])
def test_a_script_that_the_edits_do_not_fit_is_refused(script: str) -> None:
    with pytest.raises(ValueError, match="not a version of the script that these edits are for"):
        run_airbench.edited(script, "bfloat16", 1, None)


@pytest.mark.parametrize(
    ("ratio", "most", "least"), [(0.45, True, False), (0.4501, False, True), (0.4499, True, False)]
)
def test_a_bar_is_met_by_the_ratio_and_not_by_what_is_printed_of_it(ratio: float, most: bool, least: bool) -> None:
    row = compare.compared("fit, s", "9", "20", ratio, at_most=0.45)
    assert (row.bar, row.ratio, row.met) == ("at most 0.45", "0.450", most)
    assert compare.compared("images/s", "9", "20", ratio, at_least=0.45001).met == least
    assert compare.compared("step, ms", "9", "20", ratio).met is None


def test_a_recipe_stands_beside_what_its_peer_printed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "airbench95-mixed.log").write_text(
        AIRBENCH[AIRBENCH.index("|  0  ") :] + '{"dtype": "mixed", "loops": {}}\n'
    )
    ours = {
        "accuracy, %": [94.0, 94.20000000000002],
        "accuracy without TTA, %": [93.0, 93.0],
        "fit, s": [1.0],
        "test, s": [0.3],
    }
    asked = []

    def run_json(*command: object) -> dict[str, object]:
        asked.append(list(map(str, command)))
        return {"commit": "d12f906", **{name: {"values": values} for name, values in ours.items()}}

    monkeypatch.setattr(compare, "run_json", run_json)
    args = argparse.Namespace(runs=2, data_dir="data", precision="bf16-mixed", keep=Path("kept"), peers=tmp_path)
    section = compare.SECTIONS["speedrun95"](args)
    flags = ["--runs", "2", "--data_dir", "data", "--precision", "bf16-mixed", "--keep", str(Path("kept/speedrun95"))]
    assert asked[0][2:] == ["configs/speedrun95.yaml", *flags]
    text = "\n".join(section.lines())
    assert "Accuracies: [94.0, 94.2], trained at commit d12f906." in text
    assert "    python benchmarks/run_airbench.py airbench95.py data --dtype mixed > airbench95-mixed.log\n" in text
    assert "kept" not in text
    peer = "(n = 1, airbench95-mixed)"
    for row in (
        f"| accuracy, % | 94.10 (std 0.14, n = 2) | 94.01 {peer} | +0.09 points | no less | yes |",
        f"| accuracy without TTA, % | 93.00 (std 0.00, n = 2) | 93.14 {peer} | -0.14 points | - | - |",
        f"| fit and test, s | 1.30 (n = 1) | 2.60 {peer} | 0.500 | less | yes |",
    ):
        assert row in text
    assert "| accuracy, % | 94.10 (std 0.14, n = 2) | - | - | - | - |" in "\n".join(
        compare.SECTIONS["resnet18"](args).lines()
    )
