"""Versions that stand in several places agree; what is used of other packages' internals exists; workers start in each
of Python's ways."""

import ast
import importlib
import inspect
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import PYTHONPATH, ROOT, SHORT, assert_same_run, error_of
from packaging.requirements import Requirement
from test_package import MODULES, PACKAGE

import lit_cifar.fit
from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.data.split import Split

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

# ---- bounds ----


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    bounds = {}
    for requirement in map(Requirement, lines):
        lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if requirement.name != "lit_cifar":
            assert len(lowest) == 1, f"{requirement} needs a lower bound"
            bounds[requirement.name] = lowest[0]
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "tests/lowest.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(pins) == bounds


def test_packages_whose_internals_are_used_have_an_upper_bound() -> None:
    bounded = {
        requirement.name
        for requirement in map(Requirement, PROJECT["project"]["dependencies"])
        if any(bound.operator == "<" for bound in requirement.specifier)
    }
    assert bounded == {"lightning", "tensorboard", "jsonargparse"}


def test_all_places_name_the_same_pythons() -> None:
    project = PROJECT["project"]
    assert project["requires-python"] == f">={PYTHONS[0]}"
    assert project["classifiers"] == [f"Programming Language :: Python :: {version}" for version in PYTHONS]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"python{PYTHONS[0]}" in (ROOT / "Makefile").read_text(encoding="utf-8")


# ---- internals ----

EVENTS = "tensorboard.summary.writer.event_file_writer"
LIGHTNING = "lightning.pytorch"
EPOCH_LOOP = f"{LIGHTNING}.loops.training_epoch_loop:_TrainingEpochLoop"
# private names of other packages that this one uses, and where each of them is
INTERNALS = {
    "_action_groups": ["argparse:_ActionsContainer"],
    "_actions": ["argparse:_ActionsContainer"],
    "_apply": ["torch.nn:Module", "torchmetrics:Metric"],
    "_apply_actions": ["jsonargparse:ArgumentParser"],
    "_apply_batch_transfer_handler": [f"{LIGHTNING}:LightningModule"],
    "_async_writer": [f"{EVENTS}:EventFileWriter"],
    "_attr_name": [f"{LIGHTNING}.callbacks:LearningRateFinder"],
    "_average_model": [f"{LIGHTNING}.callbacks:WeightAveraging"],
    "_batch_arg_name": [f"{LIGHTNING}.callbacks:BatchSizeFinder"],
    "_broadcast_sigterm_tensor": [EPOCH_LOOP],
    "_call_children_scripts": [f"{LIGHTNING}.strategies.launchers.subprocess_script:_SubprocessScriptLauncher"],
    "_can_stop_early": [f"{LIGHTNING}.loops.fit_loop:_FitLoop"],
    "_check_cuda_matmul_precision": ["lightning.fabric.accelerators.cuda"],
    "_check_log_dir_exists": ["lightning.fabric.loggers.csv_logs:_ExperimentWriter"],
    "_checkpoint_connector": [f"{LIGHTNING}:Trainer"],
    "_combined_loader": [f"{LIGHTNING}.loops.fit_loop:_FitLoop"],
    "_current_fx_name": [f"{LIGHTNING}:LightningModule"],
    "_data_fetcher": [f"{LIGHTNING}.loops.fit_loop:_FitLoop"],
    "_data_source": [f"{LIGHTNING}.loops.fit_loop:_FitLoop", f"{LIGHTNING}.loops.evaluation_loop:_EvaluationLoop"],
    "_default_root_dir": [f"{LIGHTNING}:Trainer"],
    "_determine_batch_limits": [f"{LIGHTNING}.trainer.setup"],
    "_dynamo": ["torch"],
    "_evaluation_loop": [f"{LIGHTNING}:Trainer"],
    "_first_loop_iter": [f"{LIGHTNING}.trainer.connectors.logger_connector.logger_connector:_LoggerConnector"],
    "_get_file_writer": ["torch.utils.tensorboard:SummaryWriter"],
    "_group_actions": ["argparse:_ArgumentGroup"],
    "_idx": [f"{LIGHTNING}.utilities.combined_loader:_ModeIterator"],
    "_init_debugging_flags": [f"{LIGHTNING}.trainer.setup"],
    "_init_val": [f"{LIGHTNING}.callbacks:BatchSizeFinder"],
    "_inside_ddp_forward": ["torch.nn.parallel:DistributedDataParallel"],
    "_iterator": [f"{LIGHTNING}.utilities:CombinedLoader", "torch.utils.data:DataLoader"],
    "_kwargs": ["lightning.fabric.loggers:TensorBoardLogger"],
    "_launcher": [f"{LIGHTNING}.strategies:Strategy"],
    "_logged_outputs": [f"{LIGHTNING}.loops.evaluation_loop:_EvaluationLoop"],
    "_logger_connector": [f"{LIGHTNING}:Trainer"],
    "_make_pruning_permanent": [f"{LIGHTNING}.callbacks:ModelPruning"],
    "_max_trials": [f"{LIGHTNING}.callbacks:BatchSizeFinder"],
    "_max_val": [f"{LIGHTNING}.callbacks:BatchSizeFinder"],
    "_mode": [f"{LIGHTNING}.callbacks:BatchSizeFinder"],
    "_model_averager": [f"{LIGHTNING}.strategies:DDPStrategy"],
    "_num_ready_batches_reached": [EPOCH_LOOP],
    "_num_training_steps": [f"{LIGHTNING}.callbacks:LearningRateFinder"],
    "_option_string_actions": ["argparse:_ActionsContainer"],
    "_orig_mod": ["torch._dynamo.eval_frame:OptimizedModule"],
    "_original_layers": [f"{LIGHTNING}.callbacks:ModelPruning"],
    "_parameters": ["torch.nn:Module"],
    "_parameters_to_prune": [f"{LIGHTNING}.callbacks:ModelPruning"],
    "_iteration_based_training": [f"{LIGHTNING}.loops.fit_loop:_FitLoop"],
    "_prefix": ["lightning.fabric.loggers:TensorBoardLogger"],
    "_parse_ckpt_path": [f"{LIGHTNING}.trainer.connectors.checkpoint_connector:_CheckpointConnector"],
    "_proc_member": ["tarfile:TarInfo"],
    "_process_group_backend": [f"{LIGHTNING}.strategies:DDPStrategy"],
    "_results": [EPOCH_LOOP],
    "_rewrite_with_new_header": ["lightning.fabric.loggers.csv_logs:_ExperimentWriter"],
    "_set_seed": [f"{LIGHTNING}.cli:LightningCLI"],
    "_should_check_val_epoch": [EPOCH_LOOP],
    "_should_check_val_fx": [EPOCH_LOOP],
    "_timeout": [f"{LIGHTNING}.strategies:DDPStrategy"],
    "_trainer": [f"{LIGHTNING}:LightningModule"],
    "_typehint": ["jsonargparse._typehints:ActionTypeHint"],
    "_version": ["torch:Tensor"],
    "_workers": ["torch.utils.data.dataloader:_MultiProcessingDataLoaderIter"],
    "_writer": [f"{EVENTS}:_AsyncWriter", "tensorboard.summary.writer.record_writer:RecordWriter"],
}
DOCUMENTED = re.compile(r"_exit|_replace|_foreach_\w+")  # of os, named tuples and torch


def _is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[a-z]\w*", name) is not None


def _names(source: str) -> tuple[set[str], set[str]]:
    """Private names that a module asks of objects, or has in texts as getattr takes them; and those that it defines."""
    used, defined, of_super, parts = set(), set(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.JoinedStr):
            parts |= set(node.values)
        elif isinstance(node, ast.Constant) and node not in parts:
            used.add(node.value)
        elif isinstance(node, ast.Attribute):
            of = ast.unparse(node.value)
            if of in ("self", "cls") and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            (of_super if of == "super()" else used).add(node.attr)
    return {name for name in (used - defined) | of_super if _is_private(name)}, defined


def _overridden() -> set[str]:
    """Private names in the package's classes that replace those of other packages' classes."""
    found = set()
    for path in MODULES:
        module = importlib.import_module(f"lit_cifar.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}")
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            theirs = [base for base in cls.__mro__ if not base.__module__.startswith("lit_cifar")]
            own = {name for name in vars(cls) if _is_private(name) and inspect.isfunction(vars(cls)[name])}
            found |= {name for name in own for base in theirs if name in vars(base)}
    return found


def test_internals_of_other_packages_are_listed() -> None:
    modules = [_names(path.read_text(encoding="utf-8")) for path in MODULES]
    ours = set().union(*(defined for _, defined in modules))  # which other modules may use
    used = set().union(*(used for used, _ in modules))
    found = {name for name in used if name not in ours or name in INTERNALS} | _overridden()
    new = {name for name in found - INTERNALS.keys() if not DOCUMENTED.fullmatch(name)}
    assert new == set(), "list them in INTERNALS, or do without"
    assert INTERNALS.keys() - found == set(), "nothing uses these any more"


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in INTERNALS.items() for place in places])
def test_internals_exist_in_the_versions_installed(name: str, place: str) -> None:
    owner = pkgutil.resolve_name(place)
    assert hasattr(owner, name) or re.search(rf"\bself\.{name}\b", inspect.getsource(owner)), f"{place} has no {name}"


# ---- workers ----

# Python 3.12 and later warn when a process with threads forks
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@contextmanager
def started_by(method: str) -> Iterator[None]:
    """Python's way to start a process, as a script or a newer Python chooses it."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


# a process of its own: what hundreds of tests leave in this one is not what is sent to a worker
STARTED = """
import multiprocessing, sys
import lit_cifar.fit
flags = sys.argv[1:]
lit_cifar.fit.main([*flags, "--data.num_workers", "0"])
for method in multiprocessing.get_all_start_methods():
    multiprocessing.set_start_method(method, force=True)
    lit_cifar.fit.main([*flags, "--data.num_workers", "2"])
"""


@pytest.mark.slow
def test_a_run_is_the_same_however_its_workers_are_started() -> None:
    transform = ["--data.transform", "[torchvision.transforms.v2.RandAugment]"]
    flags = [*SHORT, "--trainer.limit_train_batches", "8", *transform]
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, "-c", STARTED, *flags], env=env, stderr=subprocess.PIPE, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    for number, _ in enumerate(multiprocessing.get_all_start_methods(), start=1):
        assert_same_run("version_0", f"version_{number}")


class Locked(torch.nn.Module):
    """A transform that pickle refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image


class Shared(torch.nn.Module):
    """A transform with a value that all processes see, which can be sent as a process starts and at no other time."""

    def __init__(self) -> None:
        super().__init__()
        self.value = multiprocessing.Value("i", 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.add(self.value.value)


def _loader(transform: torch.nn.Module, num_workers: int) -> DeviceLoader:
    split = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4) % 2, ("cat", "dog"))
    return DeviceLoader(split, TrainBatches(4, 2), torch.device("cpu"), transform=transform, num_workers=num_workers)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_transform_that_cannot_be_sent_is_one_line_before_anything_is_written(method: str) -> None:
    with started_by(method):
        message = error_of(lit_cifar.fit.main, [*SHORT, "--data.transform", "[test_versions.Locked]"])
        assert len(list(_loader(Locked(), num_workers=0))) == 2
    assert message.startswith("--data.transform: Locked cannot be sent to the processes of --data.num_workers (")
    assert "_thread.lock" in message
    assert not Path("lightning_logs").exists()


@forks
def test_a_fork_sends_any_transform() -> None:
    with started_by("fork"):
        assert len(list(_loader(Locked(), num_workers=1))) == 2


def test_a_transform_may_share_a_value_with_its_workers() -> None:
    with started_by("forkserver"):
        assert all(bool((images == 3).all()) for images, _ in _loader(Shared(), num_workers=1))
