"""The house: modules import from those to their left only, and importing does no work."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lit_cifar"
# from left to right; a group's modules do not import one another, but where an order is told
LAYERS = [
    {"errors", "files", "folders", "log", "text"},
    {"augment", "nets", "optim", "download", "shapes", "metrics", "watch"},
    {"sources"},
    {"loader"},
    {"report"},
    {"data", "module", "pictures"},
    {"checkpoint", "callbacks", "loop"},
    {"classifier"},
    {"cli"},
    {"fit", "test", "predict", "export", "runs"},
    {"bench", "sweep"},  # use fit
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _name(path: Path) -> str:
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
def test_modules_import_only_from_their_left(path: Path) -> None:
    layers = {name: position for position, layer in enumerate(LAYERS) for name in layer}
    name = _name(path)
    assert name in layers, f"{name} has no place in the house"
    for imported in _imports(path) - {name}:
        assert layers[imported] < layers[name], f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_opens_with_what_belongs_in_it(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_importing_the_package_does_no_work_and_needs_no_torch(tmp_path: Path) -> None:
    code = "import lit_cifar, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_importing_every_module_writes_prints_and_starts_nothing(tmp_path: Path) -> None:
    names = ", ".join(f"lit_cifar.{_name(path)}" for path in MODULES)
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
