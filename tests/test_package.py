"""The house: modules import from those to their left only, and importing does no work. The wheel: what is in it, and
that it works outside the repository."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, SHORT
from PIL import Image

import lit_cifar

PACKAGE = ROOT / "lit_cifar"
# rooms from left to right; those of one layer do not import one another
ROOMS = [
    {"clock", "errors", "files", "log", "process", "settings", "text"},
    {"nets", "data", "results"},
    {"run"},
    {"model"},
    {"training"},
    {"cli"},
    {"__main__", "fit", "test", "predict", "export", "bench", "seeds", "runs", "sweep"},
]
COMMANDS = ROOMS[-1]
NO_ROOMS = ("__init__.py", "__pycache__", "py.typed", "trained")
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
    found = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in NO_ROOMS}
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


# ---- the wheel ----

LEFT_OUT = {"data", "lightning_logs", "build", "dist"}  # may be large, or made by other tools


def _left_out(folder: str, names: list[str]) -> set[str]:
    hidden = {name for name in names if name.startswith(".") and name not in (".ci", ".pre-commit-config.yaml")}
    return {"__pycache__"} | (LEFT_OUT | hidden if Path(folder) == ROOT else set())


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the repository, and the wheel that is built of that sdist, without a network."""
    pytest.importorskip("setuptools", "77", reason="setuptools is missing or old, which builds the wheel")
    place = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, place / "source", ignore=_left_out)
    for trap in ("data/cifar.bin", "lightning_logs/version_0/run.json", "build/lib/lit_cifar/stale.py"):
        (place / "source" / trap).parent.mkdir(parents=True)
        (place / "source" / trap).touch()

    def build(kind: str, folder: Path) -> Path:
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(place)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (made,) = place.glob("lit_cifar-*.tar.gz" if kind == "sdist" else "*.whl")
        return made

    sdist = build("sdist", place / "source")
    with tarfile.open(sdist) as tar:
        tar.extractall(place, filter="data")
    return sdist, build("wheel", place / f"lit_cifar-{lit_cifar.__version__}")


def test_the_wheel_holds_the_package_its_recipes_and_nets_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        script = wheel.read(f"lit_cifar-{lit_cifar.__version__}.dist-info/entry_points.txt").decode()
    package = {f"lit_cifar/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    configs = {f"lit_cifar/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.*")}
    nets = {f"lit_cifar/trained/{path.name}" for path in (PACKAGE / "trained").iterdir()}
    assert {"lit_cifar/trained/speedrun94.safetensors", "lit_cifar/trained/speedrun94.md"} <= nets
    assert names == package | configs | nets | {"lit_cifar/py.typed"}
    assert "lit_cifar = lit_cifar.__main__:main" in script


def test_an_editable_install_is_a_line_in_a_pth_file(built: tuple[Path, Path], tmp_path: Path) -> None:
    """A finder would come after a folder of this name: the clone itself, seen from the folder that it lies in."""
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    folder = built[0].parent / f"lit_cifar-{lit_cifar.__version__}"
    subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if ".dist-info/" not in name)
        assert wheel.read(name).decode().strip() == str(folder)


def test_the_sdist_holds_what_its_tests_need(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for name in ("tests/helpers.py", "tests/stress/kill.py", "configs/sweeps/resnet18.yaml", "docs/images/images.png"):
        assert name in names
    assert {"README.md", "CHANGELOG.md", "Makefile", "hubconf.py", "LICENSE", ".ci/run"} <= names
    assert not [name for name in names if name.split("/")[0] in LEFT_OUT]


@pytest.fixture
def installed(built: tuple[Path, Path], tmp_path: Path) -> Path:
    """The folder with Python and the scripts of an environment where pip has installed the wheel; what that needs is
    found in this environment."""
    pytest.importorskip("pip", "22.3", reason="pip is missing or old, which installs into another environment")
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    outer = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(packages, "outer.pth").write_text("\n".join(outer))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(built[1])], check=True)
    return scripts


@pytest.fixture
def outside(installed: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a program of that environment, in a folder of its own; gives what it prints."""
    (tmp_path / "work").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *args: str) -> str:
        done = subprocess.run(
            [str(installed / program), *args],
            cwd=tmp_path / "work",
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_installs_a_command_and_recipes(outside: Callable[..., str], tmp_path: Path) -> None:
    assert outside("lit_cifar", "--version") == f"lit_cifar {lit_cifar.__version__}\n"
    code = "import lit_cifar; from lit_cifar.cli.configs import recipes; print(lit_cifar.__file__, *recipes().values())"
    files = outside("python", "-c", code).split()
    assert len(files) == 1 + len(list((ROOT / "configs").glob("*.yaml")))
    assert all(Path(file).is_relative_to(tmp_path / "venv") for file in files)
    code = "from lit_cifar import load; print(load('speedrun94')[1])"
    assert "'truck'" in outside("python", "-c", code)


@pytest.mark.slow
def test_each_command_runs_from_the_wheel_outside_the_repository(outside: Callable[..., str], tmp_path: Path) -> None:
    short = [*SHORT, "--trainer.limit_train_batches", "20"]
    outside("lit_cifar", "fit", "--config", "tutorial", *short, "--devices", "2")
    run = tmp_path / "work" / "lightning_logs" / "version_0"
    results = json.loads((run / "results.json").read_text())
    assert (results["recipe"], results["devices"], results["commit"]) == ("tutorial", 2, None)

    state = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert f"{100 * results['accuracy']:.2f} %" in outside("lit_cifar", "test", *state)
    Image.new("RGB", (64, 64)).save(tmp_path / "work" / "photo.png")
    assert "photo.png" in outside("python", "-m", "lit_cifar", "predict", *state, "photo.png")
    assert "Exported net.pt2" in outside("lit_cifar", "export", *state, "--output", "net.pt2")
    measured = outside("lit_cifar", "bench", "tutorial", "--runs", "1", *short)
    assert json.loads(measured.splitlines()[-1])["config"] == "tutorial"
    (listed,) = json.loads(outside("lit_cifar", "runs", "--json"))
    assert listed["accuracy"] == results["accuracy"]
