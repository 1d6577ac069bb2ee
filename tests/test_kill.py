"""The stress of `make test-stress`, short: trainings killed with SIGKILL at random moments end as if left alone."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from stress.kill import RECIPES, SHAPES, differences, stress
from test_fit import SHORT

import lit_cifar.fit
from lit_cifar.checkpoint import RunLogger


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "devices", "victim"),
    [
        ("onecycle", 1, "all"),
        ("transform", 1, "all"),
        ("onecycle", 2, "all"),
        ("onecycle", 2, "0"),
        ("onecycle", 2, "1"),
    ],
)
def test_a_killed_training_resumes_and_ends_the_same(recipe: str, devices: int, victim: str, tmp_path: Path) -> None:
    outcome = stress(tmp_path / "stress", recipe, devices, num_kills=3, victim=victim)
    assert outcome.faults == []
    assert sum(outcome.kills.values()) == outcome.resumed == 3


def test_the_stress_sees_what_a_resume_could_spoil() -> None:
    lit_cifar.fit.main([*SHORT, "--trainer.limit_train_batches", "60", "--trainer.log_every_n_steps", "20"])
    whole, run = Path("lightning_logs/version_0"), Path("lightning_logs/version_1")

    def spoilt() -> list[str]:
        found = differences(run, whole)
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        return found

    shutil.copytree(whole, run)
    assert spoilt() == []

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1e-7
    torch.save(checkpoint, run / "checkpoints/last.ckpt")
    assert len(spoilt()) == 1

    (run / "results.json").write_text((run / "results.json").read_text().replace('"num_steps": 60', '"num_steps": 59'))
    assert spoilt() == [f"{run}: num_steps in results.json differs"]

    logger = RunLogger(".", version=1, purge_step=40)  # forgets steps 40 and later
    logger.log_metrics({"train/loss": 1.0}, step=40)
    logger.save()
    logger.finalize("success")
    found = spoilt()
    assert f"{run}: train/gradient_norm lacks steps [40, 60] and has [] besides" in found
    assert f"{run}: train/loss lacks steps [60] and has [] besides" in found

    (run / "checkpoints/.last.ckpt.x.part").touch()
    assert len(spoilt()) == 1


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts configs/cluster/torchrun.sh, changed as its marks say, as a node with a loopback address of its own."""
    script = (ROOT / "configs/cluster/torchrun.sh").read_text()
    for text, by in (
        ("--config configs/resnet18.yaml", " ".join([*SHAPES, *RECIPES["onecycle"], "--data.num_val 500"])),
        # on one machine both nodes would take the rendezvous for theirs, and the faster one would hold it
        ("--rdzv-id=lit_cifar", '--rdzv-id=lit_cifar --local-addr="$LOCAL_ADDRESS" --rdzv-conf="is_host=$IS_HOST"'),
    ):
        assert text in script
        script = script.replace(text, by)
    (tmp_path / "torchrun.sh").write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes: list[subprocess.Popen[bytes]] = []

    def start(root: str, number: int) -> subprocess.Popen[bytes]:
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **{"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "NUM_NODES": "2", "DEVICES": "1", "ROOT": root},
            **{"RDZV_ADDRESS": f"127.0.0.1:{port}", "LOCAL_ADDRESS": f"127.0.0.{number}"},
            "IS_HOST": str(number == 1),
        }
        with (tmp_path / f"{root}-{number}.txt").open("ab") as log:
            node = subprocess.Popen(
                ["bash", "torchrun.sh", "--checkpoint.every_n_train_steps", "20"],
                env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        kill_node(node)


def kill_node(node: "subprocess.Popen[bytes]") -> None:
    """With its trainings, which torchrun starts in sessions of their own."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(node.pid)], capture_output=True, text=True)
    for pid in [node.pid, *map(int, found.stdout.split())]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


@pytest.mark.slow
def test_torchrun_goes_on_when_a_lost_node_is_back(
    start_node: Callable[[str, int], "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    whole = [start_node("whole", number) for number in (1, 2)]
    assert [node.wait(200) for node in whole] == [0, 0], (tmp_path / "whole-1.txt").read_text()

    first, second = (start_node("killed", number) for number in (1, 2))
    end = time.monotonic() + 120
    while not re.search("epoch 1 .*loss", "".join(path.read_text() for path in tmp_path.glob("killed-*.txt"))):
        assert time.monotonic() < end, (tmp_path / "killed-1.txt").read_text()
        time.sleep(0.05)
    kill_node(second)
    again = start_node("killed", 2)
    assert [first.wait(300), again.wait(300)] == [0, 0], (tmp_path / "killed-1.txt").read_text()
    runs = [tmp_path / root / "lightning_logs/version_0" for root in ("killed", "whole")]
    assert not (runs[0].parent / "version_1").exists()
    assert differences(*runs) == []
