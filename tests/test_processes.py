"""A command as a process: nothing outlives what started it, nothing waits for ever, Ctrl-C ends it in silence, and
output that cannot be written costs nothing."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FaultyTransform
from helpers import PYTHONPATH, ROOT, SHAPES, SHORT, Run, error_of

import lit_cifar.fit
from lit_cifar import bench
from lit_cifar.cli import launch, machine
from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError

COMMANDS = ("fit", "test", "predict", "export", "bench", "sweep")
RECIPE = str(ROOT / "configs/tutorial.yaml")
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals and streams")


def command(body: str) -> list[str]:
    """A command that needs no torch and starts at once; it has done its work when the file `done` is there."""
    lines = "\n    ".join(body.splitlines())
    return [
        sys.executable,
        "-c",
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom lit_cifar import errors\n"
        f"def main(args):\n    {lines}\n    Path('done').touch()\nerrors.run(main)",
    ]


def call(args: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, **options.pop("env", {})}  # type: ignore[dict-item]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(args, env=env, encoding="latin-1", timeout=60, **{**streams, **options})  # type: ignore[call-overload]


@pytest.fixture
def full() -> Iterator[int]:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    handle = os.open("/dev/full", os.O_WRONLY)
    yield handle
    os.close(handle)


# ---- start ----


def test_a_command_collects_no_garbage_while_it_imports_and_does_from_then_on() -> None:
    body = (
        "import gc; from lit_cifar import errors, process; process.begin(); before = gc.isenabled()\n"
        "errors.run(lambda args: print(before, gc.isenabled(), gc.get_freeze_count() > 0))"
    )
    assert call([sys.executable, "-c", body]).stdout.split() == ["False", "True", "True"]


# ---- standard streams ----


@pytest.mark.parametrize("size", [1, 100_000])  # written at the end, and in between
def test_a_full_disk_under_the_output_is_one_line_and_costs_nothing(size: int, full: int) -> None:
    done = call(command(f"print('x' * {size}); print('y')"), stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        "lit_cifar: error: the standard output cannot be written (No space left on device): "
        "make room, or send it elsewhere\n"
    )
    assert Path("done").exists()


def test_a_full_disk_under_the_messages_costs_nothing(full: int) -> None:
    body = "print('warned', file=sys.stderr, flush=True); print('result')"
    done = call(command(body), stderr=full)
    assert (done.returncode, done.stdout) == (0, "result\n")
    assert call(command(body), stdout=full, stderr=full).returncode == 2
    assert call(command("raise errors.UserError('wrong')"), stderr=full).returncode == 2


@posix
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_stream_costs_nothing(closed: str) -> None:
    body = (
        "with open('data', 'w') as file:\n"
        "    print('result', flush=True); print('warned', file=sys.stderr, flush=True); os.write(1, b'raw')\n"
        "    file.write('data')\n"
        "sys.stdin.read()"
    )
    done = call(["sh", "-c", f'exec "$@" {closed}', "sh", *command(body)], stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert Path("done").exists()
    assert Path("data").read_text() == "data"
    assert done.stdout == ("" if ">&- " in f"{closed} " and closed != "2>&-" else "result\nraw")
    assert done.stderr == ("" if "2>&-" in closed else "warned\n")


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "cp1252:strict"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_no_character_is_beyond_a_stream(encoding: str, unbuffered: str) -> None:
    body = "print('caf\\u00e9 \\u65e5 \\udcff'); print('\\u65e5', file=sys.stderr); raise errors.UserError('\\u65e5')"
    done = call(command(body), env={"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    assert "\\u65e5 \\udcff\n" in done.stdout
    assert done.stderr == "\\u65e5\nlit_cifar: error: \\u65e5\n"


def test_a_reader_that_has_gone_ends_the_command() -> None:
    read, write = os.pipe()
    os.close(read)
    done = call(command("print('x' * 100_000, flush=True)"), stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    assert not Path("done").exists()


def test_a_reader_that_has_gone_is_left_to_the_first_rank() -> None:
    read, write = os.pipe()
    os.close(read)
    env = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1"}
    done = call(command("print('rank 1 of 2', flush=True)"), stdout=write, env=env)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("done").exists()


@posix
def test_a_disk_that_takes_a_part_of_the_output_is_full_without_a_buffer_too() -> None:
    args = ["sh", "-c", 'ulimit -f 1; exec "$@" > output', "sh", *command("sys.stdout.write('x' * 5000)")]
    done = call(args, env={"PYTHONUNBUFFERED": "1"})
    assert Path("output").stat().st_size < 5000
    assert done.returncode == 2
    assert done.stderr.startswith("lit_cifar: error: the standard output cannot be written")


@posix
def test_what_a_process_with_closed_streams_starts_has_streams() -> None:
    """Else the first file that it opens becomes its standard output."""
    child = "import os; [os.fstat(number) for number in (0, 1, 2)]; open('opened', 'w')"
    body = f"import subprocess\nsubprocess.run([sys.executable, '-c', {child!r}], close_fds=False)"
    call(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command(body)])
    assert Path("opened").exists()


def test_messages_that_nobody_reads_cost_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    done = call(command("print('warned', file=sys.stderr, flush=True); print('result')"), stderr=write)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "result\n")


class Tee:
    """What many scripts put in place of the standard output."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("stream", [Tee(), None])
def test_a_script_may_put_anything_in_place_of_its_streams(stream: Tee | None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    lit_cifar.fit.main([*SHORT, "--trainer.max_steps", "2"])
    assert sys.stdout is stream
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert Path("lightning_logs/version_0/results.json").exists()
    if stream:
        assert "rank 0 of 1" in stream.text
        assert "Accuracy on" in stream.text


# ---- Ctrl-C ----


@posix
@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_during_the_imports_ends_in_silence(name: str, tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    path = f"{stub}{os.pathsep}{PYTHONPATH}"
    done = call([sys.executable, "-m", f"lit_cifar.{name}"], env={"PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


INTERRUPT = "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
CLEANED = "finally: Path('cleaned').touch()"


@posix
@pytest.mark.parametrize(
    ("body", "cleaned"),
    [
        (f"try: {INTERRUPT}\n{CLEANED}", True),
        # again, while the first is dealt with
        (f"try: {INTERRUPT}\nfinally:\n    {INTERRUPT}\n    Path('cleaned').touch()", False),
        # what Lightning and others make of it
        (f"try: {INTERRUPT}\nexcept KeyboardInterrupt: sys.exit(1)\n{CLEANED}", True),
        (f"try: {INTERRUPT}\nexcept KeyboardInterrupt: raise RuntimeError('odd')\n{CLEANED}", True),
        # in Python's own end
        (f"import atexit; atexit.register(lambda: ({INTERRUPT.replace('; ', ', ')}))\nreturn", False),
    ],
)
def test_an_interrupt_ends_a_command_in_order_and_a_second_one_at_once(body: str, cleaned: bool) -> None:
    done = call(command(body))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert Path("cleaned").exists() == cleaned
    assert not Path("done").exists()


@posix
def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    args = command("os.kill(os.getpid(), signal.SIGINT)")
    done = call(["sh", "-c", 'trap "" INT; exec "$@"', "sh", *args])  # as nohup does
    assert done.returncode == 0, done.stderr
    assert Path("done").exists()


# ---- the process that started this one ----

FOLLOWER = "from lit_cifar import process; process.begin(); print('began', flush=True); time.sleep(600)"


# windows.py's kernel32 tells whether a process is still the parent
PRELUDES = {
    "prctl": "import time\n",
    "a thread": "import sys, time, types\nsys.modules['ctypes'] = types.ModuleType('ctypes')\n",
    "Windows": "import sys, time, windows\nfrom lit_cifar import process\n"
    "process.sys, sys.modules['ctypes'] = windows.WINDOWS['sys'], windows.WINDOWS['ctypes']\n",
}


@posix
@pytest.mark.parametrize("prelude", PRELUDES.values(), ids=PRELUDES)
def test_a_process_ends_with_the_one_that_started_it(prelude: str) -> None:
    body = (
        "import subprocess\n"
        "env = {**os.environ, 'LIT_CIFAR_LAUNCHER': str(os.getpid())}\n"
        f"subprocess.Popen([sys.executable, '-c', {prelude + FOLLOWER!r}], env=env)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        command(body),
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            assert launcher.stdout is not None
            assert launcher.stdout.readline() == "began\n"
            launcher.kill()
            _wait_for_the_end_of_session(launcher)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)


def _wait_for_the_end_of_session(leader: "subprocess.Popen[str]", seconds: float = 60) -> None:
    """Until none of the processes is left that a leader of a session has started."""
    end = time.monotonic() + seconds
    leader.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(leader.pid, 0)
            assert time.monotonic() < end, "a process outlives the one that started it"
            time.sleep(0.1)


@posix
@pytest.mark.parametrize("prelude", PRELUDES.values(), ids=PRELUDES)
def test_a_process_whose_launcher_has_gone_before_ends_at_once(prelude: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    follower = f"{prelude}{FOLLOWER.replace(' print', ' time.sleep(30); print')}"
    done = call([sys.executable, "-c", follower], env={"LIT_CIFAR_LAUNCHER": str(gone.pid)})
    assert (done.returncode, done.stdout) == (1, "")


def test_what_a_process_starts_does_not_follow_its_launcher() -> None:
    body = "assert 'LIT_CIFAR_LAUNCHER' not in os.environ"
    assert call(command(body), env={"LIT_CIFAR_LAUNCHER": str(os.getpid())}).returncode == 0


@pytest.mark.parametrize(
    "variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE", "LIT_CIFAR_TIMEOUT"]
)
@pytest.mark.parametrize("value", ["abc", "-1", ""])
def test_an_environment_without_sense_is_one_line(variable: str, value: str) -> None:
    env = {"TORCHELASTIC_RUN_ID": "x", "LIT_CIFAR_RESUME": ""} if value == "abc" else {}
    done = call([sys.executable, "-m", "lit_cifar.fit"], env={**env, variable: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"lit_cifar: error: {variable}={value!r} in the environment is not a whole number: correct or unset it\n"
    )


# ---- processes that train together ----


def _listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen()
    return listener


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"LIT_CIFAR_TIMEOUT": "1"}, r"Timed out after \d+ seconds waiting for clients. 1/2 clients joined"),
        ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR=nowhere.invalid"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
        ({"MASTER_PORT": "taken"}, "address already in use"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not one of 2 devices"),
        ({"LIT_CIFAR_TIMEOUT": "0"}, "LIT_CIFAR_TIMEOUT=0 in the environment: expected 1 to"),
    ],
)
def test_a_rank_that_finds_no_others_says_so_in_a_line(
    env: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _listening() as taken:
        for name, value in {"LOCAL_RANK": "0", **env}.items():  # started by hand: no other rank is
            monkeypatch.setenv(name, str(taken.getsockname()[1]) if value == "taken" else value)
        message = error_of(lit_cifar.fit.main, [*SHORT, "--devices", "2"])
    assert re.search(words, message), message
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"TORCHELASTIC_RUN_ID": "1"}, "LOCAL_RANK is not in the environment"),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, "the world size (4)"),
        ({"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, "SLURM_NODEID is not in the environment"),
    ],
)
def test_an_environment_that_lacks_something_is_one_line(
    env: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert words in error_of(lit_cifar.fit.main, [*SHORT, "--devices", "2"])


def test_what_somebody_configured_keeps_its_timeout() -> None:
    def timeout(strategy: str) -> float:
        cli = lit_cifar.fit.CLI(
            [*SHAPES, "--devices", "2", "--strategy", strategy], prog="", description="", add_arguments=lambda _: None
        )
        return cli.trainer.strategy._timeout.total_seconds()

    assert timeout("ddp") == timeout("ddp_find_unused_parameters_true") == launch.TIMEOUT_SECONDS
    made = "{class_path: DDPStrategy, init_args: {timeout: '0:00:07'}}"
    assert timeout(made) == 7


@posix
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_a_rank_is_killed_before_they_meet_the_other_ends(victim: int, tmp_path: Path) -> None:
    faults = ["--trainer.callbacks", "faults.KillBeforeMeeting", "--trainer.callbacks.rank", str(victim)]
    with (
        open("output", "w+") as output,
        subprocess.Popen(
            [sys.executable, "-m", "lit_cifar.fit", *SHORT, "--devices", "2", *faults],
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        ) as leader,
    ):
        try:
            _wait_for_the_end_of_session(leader, seconds=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader.pid, signal.SIGKILL)
    said = Path("output").read_text()
    assert leader.returncode == (1 if victim else -signal.SIGKILL), said
    if victim:
        assert said.count("\n") == 1, said
        assert said.startswith("lit_cifar: error: rank 1 was ended by SIGKILL")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_wrong_on_one_rank_alone_is_reported_once(rank: int, run_command: Run) -> None:
    faults = ["--trainer.callbacks", "faults.FailOnRank", "--trainer.callbacks.rank", rank]
    done = run_command("lit_cifar.fit", *SHORT, "--devices", 2, *faults, "--log_level", "warning")
    assert done.returncode == 2, done.stderr
    who = f"rank 1 on {socket.gethostname()}: " if rank else ""
    assert done.stderr == f"lit_cifar: error: {who}this rank alone\n"


# ---- bench ----


@posix
def test_bench_takes_its_run_of_fit_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for fit has bench ended by a signal, and would go on."""
    stand_in = tmp_path / "fit"
    # not before bench waits for it: one that is just being started is left to what it does when its launcher ends
    wait = f"until [ -e {tmp_path}/waited_for ]; do sleep 0.1; done"
    started = f"echo $$ $LIT_CIFAR_LAUNCHER > {tmp_path}/started"
    stand_in.write_text(f"#!/bin/sh\n{started}\n{wait}\nkill -TERM {os.getpid()}\nexec sleep 600\n")
    stand_in.chmod(0o755)

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def communicate(self, *args: Any, **options: Any) -> Any:
            (tmp_path / "waited_for").touch()
            return super().communicate(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(bench.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(sys, "executable", str(stand_in))
    with pytest.raises(SystemExit) as ended:
        bench.main([RECIPE, "--runs", "1", *SHAPES])
    assert ended.value.code == 128 + signal.SIGTERM
    pid, launcher = map(int, (tmp_path / "started").read_text().split())
    assert launcher == os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@posix
@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("kill -KILL $$", "a run was ended by SIGKILL, perhaps for want of memory"),
        ("echo 'lit_cifar: error: rank 1 was ended by SIGKILL' >&2; exit 1", "rank 1 was ended by SIGKILL"),
        ("echo 'lit_cifar: SIGTERM: the state is saved' >&2; exit 75", "SIGTERM: the state is saved"),
    ],
)
def test_bench_says_in_a_line_what_ended_its_run_of_fit(
    end: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "fit"
    monkeypatch.setattr(sys, "executable", str(stand_in))
    stand_in.write_text(f"#!/bin/sh\n{end}\n")
    stand_in.chmod(0o755)
    assert error_of(bench.main, [RECIPE, "--runs", "1", *SHAPES]) == words
    stand_in.write_text("#!/bin/sh\necho 'AssertionError: a bug' >&2; exit 1\n")
    with pytest.raises(RuntimeError, match="AssertionError: a bug"):
        bench.main([RECIPE, "--runs", "1", *SHAPES])


# ---- DataLoader workers ----


def _loader(transform: torch.nn.Module) -> DeviceLoader:
    split = Split(torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.arange(64) % 2, ("cat", "dog"))
    return DeviceLoader(split, TrainBatches(64, 32), torch.device("cpu"), transform=transform, num_workers=1)


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_worker_that_dies_is_one_line(name: str) -> None:
    def load() -> None:
        with machine.workers_watched():
            list(_loader(FaultyTransform(getattr(signal, name))))

    message = error_of(load)
    assert message.startswith("a process of num_workers has died")
    assert message.endswith("choose fewer, or num_workers=0")
    assert ("want of memory" in message) == (name == "SIGKILL")


def test_a_transform_that_fails_is_one_line_with_its_place() -> None:
    message = error_of(list, _loader(FaultyTransform()))
    assert message.startswith("transform: FaultyTransform fails ")
    assert r"KeyError: 'no\nsuch pixel'" in message
    assert "tests/faults.py:" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", "shared memory (/dev/shm)"),
        ("unable to write to file </torch_7_8_9>: No space left on device (28)", "--shm-size 1g"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "has died (for want of memory, perhaps)"),
    ],
)
def test_what_workers_lack_is_named_with_the_way_out(text: str, words: str) -> None:
    from lit_cifar.data.workers import worker_error

    assert words in str(worker_error(RuntimeError(text)))
    assert worker_error(RuntimeError("a bug of ours")) is None
    with pytest.raises(RuntimeError, match="a bug of ours"), machine.workers_watched():
        raise RuntimeError("a bug of ours, not of shared memory")


def test_a_small_shared_memory_is_one_line() -> None:
    unshare = shutil.which("unshare")
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if not unshare or call([unshare, "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("this system gives no user a /dev/shm of his own")
    code = (
        "import torch; from lit_cifar.data.loader import DeviceLoader, TrainBatches; "
        "from lit_cifar.data.split import Split; "
        "split = Split(torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64).long(), ('cat', )); "
        "device = torch.device('cpu'); batches = TrainBatches(64, 32); "
        "list(DeviceLoader(split, batches, device, transform=torch.nn.Identity(), num_workers=1))"
    )
    done = call([unshare, "-rm", "sh", "-c", f'{mount}; exec "$0" -c "{code}"', sys.executable])
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{UserError.__module__}.UserError: the shared memory (/dev/shm) is too small"), done.stderr
