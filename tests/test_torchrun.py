"""torchrun on two nodes, here two loopback addresses: a worker or a node is killed, and the training ends the same."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from stress.kill import differences

RECIPE = (
    "--dataset shapes --accelerator cpu --batch_size 64 --lr 0.02 --max_epochs 4 --model.schedule onecycle "
    "--data.augment.crop 4 --data.num_val 500 --checkpoint.every_n_train_steps 20 --trainer.log_every_n_steps 10"
)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Node:
    """configs/cluster/torchrun.sh on one of the nodes, in a session of its own."""

    def __init__(self, folder: Path, number: int, port: int) -> None:
        script = (ROOT / "configs/cluster/torchrun.sh").read_text()
        for pattern, text in (
            (r"--config resnet18", RECIPE),
            # torchrun would take both addresses for this machine's, and whoever comes first for the host
            (r"exec torchrun ", f"exec torchrun --local-addr=127.0.0.{number} --rdzv-conf=is_host={number == 1} "),
        ):
            script, num_changes = re.subn(pattern, text, script, count=1)
            assert num_changes == 1, f"{pattern} is not in torchrun.sh"
        self.log = folder / f"node{number}-{len(list(folder.glob('node*')))}.out"
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "DEVICES": "1",
            "RDZV_ADDRESS": f"127.0.0.1:{port}",
            "GLOO_SOCKET_IFNAME": "lo",
            "ROOT": str(folder / "runs"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", script],
                cwd=folder,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[int]:
        """Ids of the training processes of this node."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def end(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        """A node is lost with all that ran there; torchrun's workers are in sessions of their own."""
        workers = self.workers()
        for kill, pid in ((os.killpg, self.process.pid), *((os.kill, worker) for worker in workers)):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    started: list[Node] = []
    yield started
    for node in started:
        node.kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two nodes to which nothing happened."""
    folder, port = tmp_path_factory.mktemp("whole"), _free_port()
    started = [Node(folder, number, port) for number in (1, 2)]
    try:
        assert [node.end() for node in started] == [0, 0], [node.output() for node in started]
    finally:
        for node in started:
            node.kill()
    return _run(folder)


def _run(folder: Path) -> Path:
    (run,) = folder.glob("runs/lightning_logs/version_*")
    return run


def _output(nodes: list[Node]) -> str:
    return "\n".join(f"--- {node.log.name}\n{node.output()}" for node in nodes)


def _wait_for_training(nodes: list[Node], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while "epoch 1 " not in _output(nodes):
        assert time.monotonic() < end, _output(nodes)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_started_again_on_both_nodes_and_ends_the_same(
    victim: int, nodes: list[Node], whole: Path, tmp_path: Path
) -> None:
    port = _free_port()
    nodes += [Node(tmp_path, number, port) for number in (1, 2)]
    _wait_for_training(nodes)
    os.kill(nodes[victim].workers()[0], signal.SIGKILL)
    assert [node.end() for node in nodes] == [0, 0], _output(nodes)
    assert _output(nodes).count("training 62,006 parameters") == 2, _output(nodes)
    assert differences(_run(tmp_path), whole) == []


@pytest.mark.slow
def test_a_lost_node_that_comes_back_joins_the_others_and_ends_the_same(
    nodes: list[Node], whole: Path, tmp_path: Path
) -> None:
    port = _free_port()
    nodes += [Node(tmp_path, number, port) for number in (1, 2)]
    _wait_for_training(nodes)
    nodes[1].kill()
    nodes.append(Node(tmp_path, 2, port))
    assert [nodes[0].end(), nodes[2].end()] == [0, 0], _output(nodes)
    assert differences(_run(tmp_path), whole) == []


@pytest.mark.slow
def test_the_others_end_when_the_rendezvous_is_lost_and_all_started_again_end_the_same(
    nodes: list[Node], whole: Path, tmp_path: Path
) -> None:
    port = _free_port()
    nodes += [Node(tmp_path, number, port) for number in (1, 2)]
    _wait_for_training(nodes)
    nodes[0].kill()
    assert nodes[1].end(seconds=60) == 1, _output(nodes)
    assert nodes[1].workers() == []
    nodes += [Node(tmp_path, number, port) for number in (1, 2)]
    assert [node.end() for node in nodes[2:]] == [0, 0], _output(nodes)
    assert differences(_run(tmp_path), whole) == []
