"""Fixtures for all tests: a place of its own for each, a trained run, and commands as processes. The functions that
tests share are in helpers.py."""

import copy
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.summary.writer import event_file_writer
from torch.utils.data import BatchSampler, DataLoader

pytest.register_assert_rewrite("helpers")

from helpers import PYTHONPATH, Run  # noqa: E402

import lit_cifar.fit  # noqa: E402
import lit_cifar.process  # noqa: E402
from lit_cifar.cli import machine  # noqa: E402
from lit_cifar.data import shapes  # noqa: E402

# LightningCLI 2.6.6 calls names that jsonargparse 4.49 deprecates; not ours to fix
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
# a shell has it ignored in what it starts in the background, and commands would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _memory_is_given_back() -> Iterator[None]:
    """Commands let their process keep memory that it frees: too much for one process with hundreds of runs in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "keep_freed_memory", lambda: None)
        yield


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test runs in an empty folder with a cache of its own, on one thread, and leaves the state of torch
    and of the process alone, its environment too: Lightning writes there which rank it is."""
    environment = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_CIFAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # a process's files of events are numbered, and read in the order of their names: of one second, 10 before 9
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    torch.set_num_threads(1)
    random_state, mkldnn = torch.get_rng_state(), torch.backends.mkldnn.enabled
    interrupt, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    streams = sys.stdout, sys.stderr, lit_cifar.process._outputs.copy()
    yield
    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = hook
    sys.stdout, sys.stderr, lit_cifar.process._outputs[:] = streams
    for loader in (DataLoader, BatchSampler):
        _restore_loaders(loader)
    torch.backends.mkldnn.enabled = mkldnn
    torch.set_rng_state(random_state)
    os.environ.clear()
    os.environ.update(environment)


def _restore_loaders(kind: Any) -> None:
    """Lightning 2.6 patches torch's loaders around a hook that makes them, and leaves them so if the hook raises."""
    for cls in (kind, *kind.__subclasses__()):
        for name in ("__init__", "__setattr__", "__delattr__"):
            if f"__old{name}" in vars(cls):
                setattr(cls, name, vars(cls)[f"__old{name}"])
                delattr(cls, f"__old{name}")


drawn = functools.cache(shapes.draw_shapes)


@pytest.fixture(autouse=True)
def _shapes_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw them takes longer than many a test's training run. test_shapes.py draws them itself."""
    monkeypatch.setattr(shapes, "draw_shapes", lambda train: copy.deepcopy(drawn(train)))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on shapes, with test-time augmentation; nobody may change it."""
    place = tmp_path_factory.mktemp("trained")
    flags = ["--dataset", "shapes", "--batch_size", "100", "--lr", "0.02", "--max_epochs", "1"]
    lit_cifar.fit.main([*flags, "--model.tta", "mirror_shift", "--trainer.default_root_dir", str(place)])
    return place / "lightning_logs" / "version_0"


@pytest.fixture
def run_command(tmp_path: Path) -> Iterator[Run]:
    """Runs `python -m MODULE ARGS` in the test's folder, with whatever it starts, and stops what is left of it."""
    processes: list[subprocess.Popen[str]] = []

    def run(module: str, *args: object, timeout: float = 240, **env: str) -> "subprocess.CompletedProcess[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": PYTHONPATH, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    yield run
    for process in processes:
        if sys.platform == "win32":
            process.kill()  # the ranks that it started end with it
        else:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: this takes the ranks that it started along
            except ProcessLookupError:
                continue
        process.wait()
