"""A two-node Slurm on this machine preempts, requeues, cuts off and breaks a job, which resumes by itself and ends the
same."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from stress.kill import differences

# `up DIR` starts the cluster and prints what to export, `down DIR` stops it
UP = Path(os.environ.get("LIT_CIFAR_SLURM_UP") or ROOT.parent / "shared" / "cluster" / "slurm")
PROGRAMS = ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged")
missing = [program for program in PROGRAMS if shutil.which(program) is None]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(not UP.is_file(), reason=f"no script {UP} that starts a Slurm: name one by LIT_CIFAR_SLURM_UP"),
]
RECIPE = (
    "--dataset shapes --accelerator cpu --batch_size 64 --lr 0.02 --max_epochs 6 --model.schedule onecycle "
    "--data.augment.crop 4 --data.num_val 500 --checkpoint.every_n_train_steps 20 --trainer.log_every_n_steps 10"
)


class Cluster:
    """Submits copies of configs/cluster/slurm.sbatch, changed as its marks say, and watches their jobs."""

    def __init__(self, folder: Path, conf: str) -> None:
        self.folder = folder
        os.environ["SLURM_CONF"] = conf
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",  # the nodes n1 and n2 have no addresses of their own
        }

    def submit(self, time_limit: str = "00:10:00", signal_seconds: int = 120, devices: str = "1") -> str:
        script = (ROOT / "configs/cluster/slurm.sbatch").read_text()
        for pattern, text in (
            (r"--ntasks-per-node=4", "--ntasks-per-node=1"),
            (r"#SBATCH --gpus-per-node.*\n", ""),
            (r"--cpus-per-task=4", "--cpus-per-task=1"),
            (r"--time=\S+", f"--time={time_limit}"),
            (r"TERM@120", f"TERM@{signal_seconds}"),
            (r"--config resnet18", RECIPE),
            (r'--devices "\$SLURM_NTASKS_PER_NODE"', f"--devices {devices}"),
        ):
            script, num_changes = re.subn(pattern, text, script, count=1)
            assert num_changes == 1, f"{pattern} is not in slurm.sbatch"
        (self.folder / "job.sbatch").write_text(script)
        return self.call("sbatch", "--parsable", "job.sbatch").strip()

    def call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        return dict(
            item.split("=", 1) for item in self.call("scontrol", "-o", "show", "job", job).split() if "=" in item
        )

    def output(self, job: str) -> str:
        path = self.folder / f"lit_cifar-{job}.out"
        return path.read_text() if path.exists() else ""

    def wait_for(self, job: str, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in self.output(job):
            assert time.monotonic() < end, f"no {text!r} in {seconds} s: {self.job(job)}\n{self.output(job)}"
            time.sleep(0.1)

    def end(self, job: str, seconds: float = 400) -> dict[str, str]:
        """The job's record when it has ended for good."""
        end = time.monotonic() + seconds
        while True:
            now = self.job(job)
            if now["JobState"] == "PENDING" and now["Reason"] == "BeginTime":
                # Slurm holds requeued jobs 2 minutes, since it refuses a start in the second of the requeue
                time.sleep(5)
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
            if now["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
                return now
            assert time.monotonic() < end, f"not ended in {seconds} s: {now}\n{self.output(job)}"
            time.sleep(0.5)

    def clear(self) -> None:
        """Cancels what a failed test left, on nodes that the next one needs."""
        jobs = self.call("squeue", "--noheader", "--format=%i").split()
        for job in jobs:
            self.call("scancel", "--full", job)
            self.end(job)

    def run(self, job: str) -> Path:
        runs = list((self.folder / "runs" / job).glob("lightning_logs/version_*"))
        assert len(runs) == 1, runs
        return runs[0]

    def processes(self, job: str) -> list[int]:
        """Ids of the job's training processes, rank 0's first."""
        found: dict[int, int] = {}
        for pid, command, environ in _all_processes():
            if "lit_cifar.fit" in command and not command.startswith("srun") and f"SLURM_JOB_ID={job}" in environ:
                rank = next((item for item in environ if item.startswith("SLURM_PROCID=")), None)
                if rank and "SLURM_STEP_ID=0" in environ:
                    found[int(rank.split("=")[1])] = pid
        return [found[rank] for rank in sorted(found)]

    def lose(self, node: str, job: str) -> None:
        """Kills the node's daemon and all of the job there: step daemons, tasks, and on n1 the script with its srun."""
        task = self.processes(job)[int(node[1]) - 1]
        victims = [int((self.folder / "state" / f"slurmd-{node}.pid").read_text()), _parent(task), task]
        if node == "n1":
            victims += [
                pid
                for pid, command, environ in _all_processes()
                if command.startswith(f"slurmstepd: [{job}.batch]")
                or {"SLURM_PROCID=0", f"SLURM_JOB_ID={job}"} <= set(environ)
            ]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):  # srun's second process ends with its first
                os.kill(pid, signal.SIGKILL)

    def start(self, node: str) -> None:
        self.call("slurmd", "-N", node, "-f", os.environ["SLURM_CONF"])


def _all_processes() -> Iterator[tuple[int, str, list[str]]]:
    """(id, command, environment) of each that can be read."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environ = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            yield int(folder.name), command, environ


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    state = folder / "state"
    try:
        # not captured by pipes, which the daemons would hold open
        with (folder / "up").open("w") as output:
            done = subprocess.run([str(UP), "up", str(state)], stdout=output, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            pytest.skip(f"the Slurm did not start: {(folder / 'up').read_text()}")
        conf = state / "slurm.conf"
        with conf.open("a") as file:
            file.write("SlurmdTimeout=10\n")  # 5 minutes by default, until a lost node counts as down
        made = Cluster(folder, str(conf))
        made.call("scontrol", "reconfigure")
        yield made
        made.clear()
    finally:
        subprocess.run([str(UP), "down", str(state)], check=False)
        os.environ.pop("SLURM_CONF", None)


@pytest.fixture(autouse=True)
def _no_job_is_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.clear()


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """The run of a job that nothing happened to."""
    job = cluster.submit()
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), cluster.output(job)
    return cluster.run(job)


def _lose_node(cluster: Cluster, job: str, node: str) -> None:
    cluster.lose(node, job)
    end = time.monotonic() + 200
    while "DOWN" not in cluster.call("scontrol", "show", "node", node):
        assert time.monotonic() < end
        time.sleep(1)
    cluster.start(node)


def _restart_node(cluster: Cluster, job: str) -> None:
    cluster.lose("n2", job)
    cluster.start("n2")


FAULTS = {
    "preemption": lambda cluster, job: cluster.call("scancel", "--signal=TERM", job),
    "requeue": lambda cluster, job: cluster.call("scontrol", "requeue", job),
    "kill rank 0": lambda cluster, job: os.kill(cluster.processes(job)[0], signal.SIGKILL),
    "kill rank 1": lambda cluster, job: os.kill(cluster.processes(job)[1], signal.SIGKILL),
    "lost first node": lambda cluster, job: _lose_node(cluster, job, "n1"),
    "lost second node": lambda cluster, job: _lose_node(cluster, job, "n2"),
    "node that is back at once": _restart_node,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_job_goes_on_by_itself_after(fault: str, cluster: Cluster, whole: Path) -> None:
    job = cluster.submit()
    cluster.wait_for(job, "epoch 1 ")
    FAULTS[fault](cluster, job)
    ended = cluster.end(job)
    output = cluster.output(job)
    assert ended["JobState"] == "COMPLETED", output
    assert int(ended["Restarts"]) == 1, output
    assert output.count("training ") == 2, output
    if fault == "preemption":
        assert output.count("lit_cifar: stopped by ") == 1, output
    assert differences(cluster.run(job), whole) == []


def test_a_job_goes_on_by_itself_after_its_time_limit(cluster: Cluster, whole: Path) -> None:
    job = cluster.submit(time_limit="00:01:00", signal_seconds=20)
    cluster.wait_for(job, "global batch 64")
    for pid in cluster.processes(job):
        # or it may end within the minute that limits are made of: 16 s on one machine; Slurm wakes what it signals
        os.kill(pid, signal.SIGSTOP)
    cluster.wait_for(job, "lit_cifar: stopped by ")
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    ended = cluster.end(job)
    assert ended["JobState"] == "COMPLETED", cluster.output(job)
    assert int(ended["Restarts"]) >= 1
    assert differences(cluster.run(job), whole) == []


def test_a_cancelled_job_is_not_started_again(cluster: Cluster) -> None:
    job = cluster.submit()
    cluster.wait_for(job, "epoch 1 ")
    cluster.call("scancel", job)
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), cluster.output(job)


@pytest.mark.parametrize(("devices", "words"), [("2", "Slurm started 2 tasks"), ("1 --num_nodes 1", "makes 1:")])
def test_an_allocation_that_differs_from_the_devices_ends_in_one_line(
    devices: str, words: str, cluster: Cluster
) -> None:
    job = cluster.submit(devices=devices)
    ended = cluster.end(job)
    output = cluster.output(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), output
    lines = [line for line in output.splitlines() if not line.startswith(("srun: ", "slurmstepd"))]
    assert len(lines) == 1, output
    assert lines[0].startswith("lit_cifar: error: Slurm started 2 tasks")
    assert words in lines[0]
