"""The house: modules import from those to their left only, and importing does no work."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "lit_cifar"
# rooms from left to right; those of one layer do not import one another
ROOMS = [
    {"clock", "errors", "files", "log", "process", "text"},
    {"nets", "data", "results"},
    {"run"},
    {"model"},
    {"training"},
    {"cli"},
    {"fit", "test", "predict", "export", "bench", "runs", "sweep"},
]
COMMANDS = ROOMS[-1]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lit_cifar":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("lit_cifar."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lit_cifar.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_from_rooms_to_their_left(path: Path) -> None:
    position = {name: number for number, room in enumerate(ROOMS) for name in room}
    room = _room(path)
    assert room in position, f"{room} has no place in the house"
    for imported in _imports(path) - {room}:
        within = {room, imported} <= COMMANDS | ROOMS[0]  # bench and sweep use fit; log words what errors raise
        assert position[imported] < position[room] or within, f"{room} imports {imported}"


def test_there_are_seven_rooms_and_no_others() -> None:
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith(("_", "py."))}
    assert found == set().union(*ROOMS)
    assert len(ROOMS) == 7


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_opens_with_what_belongs_in_it(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_importing_the_package_does_no_work_and_needs_no_torch(tmp_path: Path) -> None:
    code = "import lit_cifar, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_importing_every_module_writes_prints_and_starts_nothing(tmp_path: Path) -> None:
    names = ", ".join(f"lit_cifar.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}" for path in MODULES)
    code = (
        f"import threading, {names}; "
        "assert threading.active_count() == 1, threading.enumerate(); "
        "import torch; assert not torch.cuda.is_initialized() and torch.initial_seed() != 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
