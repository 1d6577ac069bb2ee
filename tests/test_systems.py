"""Windows without Windows, musl, no /proc, no fork: what reading shows to differ there, emulated piece by piece, and a
whole run in windows.py's pretence. Nothing in here has run on Windows."""

import ast
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import windows
from helpers import PYTHONPATH, SHORT, error_of, make_tree

import lit_cifar.fit
import lit_cifar.predict
from lit_cifar import bench, errors, files, process
from lit_cifar.cli import launch
from lit_cifar.data import archives, cache, download, tree
from lit_cifar.files import replaced, write_durably, write_output, writing
from lit_cifar.results import report
from lit_cifar.run import lock, stop
from lit_cifar.run.folder import Run
from lit_cifar.run.write import keep

ROOT = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="the pretence asks /proc which files are open")


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    windows.pretend(monkeypatch)
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.2)


# ---- whole commands ----

COMMANDS = """
import importlib, os, pkgutil, pytest, windows
windows.pretend(pytest.MonkeyPatch())
from lit_cifar import process
process.begin()
import lit_cifar
for module in pkgutil.walk_packages(lit_cifar.__path__, "lit_cifar."):
    importlib.import_module(module.name)
from PIL import Image
from lit_cifar import bench, fit, predict, runs, test
from lit_cifar.run.stop import STOP_SIGNALS
assert len(STOP_SIGNALS) == 2
FEW = ["--batch_size", "50",  # not a small step, which would not ask for glibc
       "--trainer.max_steps", "2", "--trainer.limit_test_batches", "1"]
fit.main(["--dataset", "shapes", "--accelerator", "cpu", *FEW, "--trainer.default_root_dir", "Käse 日本"])
run = "Käse 日本/lightning_logs/version_0"
fit.main(["--config", f"{run}/config.yaml", "--resume", "auto", "--trainer.max_steps", "4"])
checkpoint = ["--ckpt_path", f"{run}/checkpoints/last.ckpt"]
test.main(checkpoint)
Image.new("RGB", (32, 32)).save("Käse 日本/é.png")
predict.main([*checkpoint, "Käse 日本"])
runs.main(["Käse 日本"])
"""


def in_pretence(script: str, tmp_path: Path) -> "subprocess.CompletedProcess[bytes]":
    (tmp_path / "temporary").mkdir()
    env = {"PYTHONPATH": PYTHONPATH, "PYTHONIOENCODING": "cp1252", "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    assert b"Traceback" not in done.stderr
    return done


@linux
def test_modules_load_and_commands_work_without_what_windows_lacks(tmp_path: Path) -> None:
    done = in_pretence(COMMANDS, tmp_path)
    folder = tmp_path / "Käse 日本" / "lightning_logs"
    assert [path.name for path in folder.iterdir()] == ["version_0"], "the config was read as it was written"
    written = {path.name for path in (folder / "version_0").rglob("*") if "events" not in path.name}
    states = {"checkpoints", "last.ckpt", "last-1.ckpt"}
    assert written == {*states, "config.yaml", "run.json", "results.json", "results-2.json", "test-last.json"}
    results = json.loads((folder / "version_0" / "results.json").read_bytes())
    assert (results["num_steps"], results["peak_memory"]["resident"]) == (4, None)
    assert rb"\u65e5\u672c" in done.stdout, "what the output cannot show is escaped"
    assert "K\xe4se".encode("cp1252") in done.stdout


@linux
@pytest.mark.slow
def test_bench_leaves_no_folder_behind_although_no_open_file_can_be_removed(tmp_path: Path) -> None:
    flags = ["--dataset", "shapes", "--accelerator", "cpu", "--batch_size", "50", "--trainer.max_steps", "2"]
    script = f"{COMMANDS.split('FEW =')[0]}\nbench.main([{str(ROOT / 'configs/tutorial.yaml')!r}, *FLAGS])"
    for stage in (["--warm", "true"], ["--stage", "step"]):
        in_pretence(script.replace("*FLAGS", f"*{[*stage, '--runs', '1', *flags]!r}"), tmp_path)
        assert not list((tmp_path / "temporary").glob("lit_cifar-bench-*"))
        (tmp_path / "temporary").rename(tmp_path / stage[0])


@linux
@pytest.mark.parametrize("breaks", [False, True])
def test_no_file_of_a_run_stays_open(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*SHORT, "--trainer.max_steps", "2", "--trainer.limit_test_batches", "1"]
    if breaks:
        with pytest.raises(AssertionError, match="a bug of ours"):
            lit_cifar.fit.main([*flags, "--trainer.callbacks", "faults.Bug"])
    else:
        lit_cifar.fit.main(flags)
    assert list(Path("lightning_logs/version_0").glob("events*"))
    assert not windows.is_open("lightning_logs")


# ---- files that somebody has open ----


def refusing(monkeypatch: pytest.MonkeyPatch, num_times: float) -> list[str]:
    """Has os.replace and os.rename fail so often, as they do on Windows while somebody has the file open."""
    monkeypatch.setattr(files, "sys", windows.WINDOWS["sys"])
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.3)
    refused: list[str] = []

    def refuse(true: Callable[..., None]) -> Callable[..., None]:
        def change(source: Any, target: Any) -> None:
            if len(refused) < num_times:
                refused.append(str(target))
                raise PermissionError(errno.EACCES, "it is being used by another process")
            true(source, target)

        return change

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    return refused


def replaces_a_file() -> None:
    write_durably(Path("file"), b"new")


def keeps_states() -> None:
    for name in ("last", "last-1", "last-2"):
        Path(f"{name}.ckpt").write_bytes(name.encode())
    keep(Path("last.ckpt"), 3)
    assert Path("last-2.ckpt").read_bytes() == b"last-1"


def sets_results_aside() -> None:
    run = Run(folder=Path())
    run.results.write_text('{"num_steps": 7}', encoding="utf-8")
    run.set_results_aside()
    assert Path("results-7.json").is_file()


def writes_the_cache() -> None:
    decoded = cache.Decoded(("a",), {"train": [0], "test": [0]}, {"train": [], "test": []}, {})
    cache._write(Path("cache.zip"), "facts", decoded, io.BytesIO())
    assert cache.read_header(Path("cache.zip"), "facts")["classes"] == ["a"]


def finishes_a_download() -> None:
    spec = archives.Archive("title", "name", 1, archives.hashlib.sha256(b"x").hexdigest(), "folder", ())
    Path(".name.part").write_bytes(b"x")
    assert download._Download(Path(), (), spec, download.Limits())._finish()
    assert Path("name").is_file()


def unpacks() -> None:
    Path("inner/folder").mkdir(parents=True)
    with archives.tarfile.open("a.tar.gz", "w:gz") as tar:
        tar.add("inner/folder", "folder")
    spec = archives.Archive("title", "a.tar.gz", 1, "", "folder", ())
    assert archives.unpack_verified(Path("a.tar.gz"), Path(), spec).is_dir()


@pytest.mark.parametrize(
    "change", [replaces_a_file, keeps_states, sets_results_aside, writes_the_cache, finishes_a_download, unpacks]
)
def test_a_file_that_somebody_reads_is_replaced_when_they_are_done(
    change: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refusing(monkeypatch, 2)
    change()
    assert len(refused) == 2


def test_a_file_that_somebody_keeps_open_is_one_line_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_bytes(b"old")
    refused = refusing(monkeypatch, float("inf"))

    def write() -> None:
        with writing(Path("file"), "close it elsewhere"):
            write_durably(Path("file"), b"new")

    line = "file cannot be written (it is being used by another process): close it elsewhere"
    assert error_of(write) == line
    assert len(refused) > 2
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == {"file": b"old"}


def test_elsewhere_a_file_that_may_not_be_replaced_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refusing(monkeypatch, float("inf"))
    monkeypatch.setattr(files, "sys", sys)
    with pytest.raises(PermissionError):
        write_durably(Path("file"), b"new")
    assert len(refused) == 1 or sys.platform == "win32"


def test_what_cannot_be_removed_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "it is being used by another process")

    monkeypatch.setattr(os, "unlink", refuse)

    def write() -> None:
        with replaced(Path("file")):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write()
    run = Run.new(Path())
    run.claim()
    monkeypatch.setattr(os, "rmdir", refuse)
    run.release()


@linux
def test_the_lock_of_a_run_holds_and_goes_on_windows_too(on_windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.0)
    first = Run.new(Path())
    first.claim()
    assert first.is_in_use
    assert "is in use by process" in error_of(lock.FolderLock(first.folder / "run.lock").acquire)
    first.unlock()
    assert [path.name for path in first.folder.iterdir()] == ["run.json"]
    assert not first.is_in_use


@linux
def test_nothing_is_left_of_a_download_that_brought_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows removes no open file, such as that of the lock, which filelock removes there when it gives it back."""
    from filelock import FileLock

    monkeypatch.setattr(archives.shutil, "rmtree", lambda folder, ignore_errors: None)
    release = FileLock.release

    def release_and_remove(self: Any, force: bool = False) -> None:
        release(self, force)
        Path(self.lock_file).unlink(missing_ok=True)

    monkeypatch.setattr(FileLock, "release", release_and_remove)
    with pytest.raises(KeyError), archives.locked(Path("data"), archives.CIFAR10):
        raise KeyError
    assert not Path("data").exists()


# ---- paths, text and streams ----


def test_a_drive_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def exists(path: object) -> bool:
        asked.append(path)
        assert len(asked) < 100, "the parent of a drive is the drive"
        return False

    monkeypatch.setattr(os.path, "lexists", exists)
    monkeypatch.setattr(os.path, "isdir", exists)
    assert "is no folder" in error_of(files.check_place, Path("Z:/nowhere/net.onnx"), "name another one")


@pytest.mark.skipif(sys.platform == "win32", reason="the null device has another name there")
def test_the_null_device_is_not_taken_for_the_standard_output() -> None:
    """Windows numbers all that is no file 0."""

    def unnumbered(true: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        return lambda path: os.stat_result((true(path).st_mode, 0, 0, *true(path)[3:]))

    with open("out", "wb") as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(os, "fstat", unnumbered(os.fstat))
        patch.setattr(os, "stat", unnumbered(os.stat))
        write_output(Path(os.devnull), b"a net")
    assert Path("out").read_bytes() == b""


@linux
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # the latter from PowerShell 5 and older editors
def test_a_config_is_utf_8_whatever_the_system_writes(encoding: str, on_windows: None) -> None:
    Path("config.yaml").write_bytes("data: {data_dir: Größe 日本.tar}".encode(encoding))
    assert "there is no archive Größe 日本.tar;" in error_of(lit_cifar.fit.main, ["--config", "config.yaml"])


def test_paths_that_the_system_cannot_decode_have_their_lines(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a console of Windows, whose programs write cp850: os.fsdecode raises there."""
    stdin = types.SimpleNamespace(buffer=io.BytesIO(b"caf\x82.png\r\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(os, "fsdecode", lambda name: name if isinstance(name, str) else name.decode())
    with pytest.raises(errors.UserError, match="1 of 1 images"):
        lit_cifar.predict.main(["--ckpt_path", str(trained / "checkpoints/last.ckpt"), "-"])
    assert "No such file" in capsys.readouterr().out


class Broken(io.RawIOBase):
    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, data: Any) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_reader_that_has_gone_is_known_by_what_windows_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "sys", windows.WINDOWS["sys"])
    output = process._Output(io.TextIOWrapper(Broken(errno.EINVAL)), "the standard output")  # type: ignore[type-var]
    with pytest.raises(process.ReaderGone):
        output.write(b"line")
    assert not output.failed


def listed(entry: Callable[["os.DirEntry[str]"], Any]) -> Any:
    """scandir with other entries."""

    @contextmanager
    def listing(folder: Any) -> Iterator[Iterator[Any]]:
        with os.scandir(folder) as entries:
            yield map(entry, entries)

    return listing


def test_train_and_test_may_be_spelled_as_the_file_system_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, entry: "os.DirEntry[str]") -> None:
            self.name, self._entry = {"train": "Train", "test": "TEST"}.get(entry.name, entry.name), entry

        def __getattr__(self, name: str) -> Any:
            return getattr(self._entry, name)

    make_tree(Path("tree"), ("a", "b"))
    monkeypatch.setattr(tree, "scandir", listed(Entry))
    assert tree.list_contents(Path("tree")).num_images == 16
    assert not tree.list_contents(Path("tree")).left_out.found


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_images_that_a_linked_class_holds_are_known_where_listings_have_no_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Windows an entry's stat has no inode, though its `inode()` asks for it."""
    make_tree(Path("tree"), ("a", "b"))
    Path("tree/train/b").rename("tree/more")
    Path("tree/train/b").symlink_to(Path("../more"))

    class Status:
        st_ino = st_nlink = 0

        def __init__(self, status: os.stat_result) -> None:
            self.st_size, self.st_mtime_ns, self.st_ctime_ns = status.st_size, status.st_mtime_ns, status.st_ctime_ns

    class Entry:
        def __init__(self, entry: "os.DirEntry[str]") -> None:
            self.stat, self._entry = lambda: Status(entry.stat()), entry

        def __getattr__(self, name: str) -> Any:
            return getattr(self._entry, name)

    monkeypatch.setattr(tree, "scandir", listed(Entry))
    assert not tree.list_contents(Path("tree")).left_out.found


# ---- processes ----


def test_a_crash_of_another_rank_ends_this_one_whatever_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows it is 0xC0000005, which os._exit does not take."""
    launcher = object.__new__(launch.Launcher)
    other = types.SimpleNamespace(poll=lambda: 0xC0000005, kill=lambda: None, wait=lambda: None)
    launcher.procs = [other]
    launcher._ending = launch.threading.Lock()
    codes: list[int] = []

    def leave(code: int) -> None:
        assert -(2**31) <= code < 2**31, "C's int"
        codes.append(code)

    monkeypatch.setattr(os, "_exit", leave)
    launcher._end_if_lost(lambda code: True)
    assert codes == [1]


@pytest.mark.parametrize(("platform", "backend"), [("win32", "gloo"), (sys.platform, None)])
def test_processes_of_windows_exchange_values_by_gloo(
    platform: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch import Trainer

    monkeypatch.setattr(launch, "sys", types.SimpleNamespace(platform=platform))
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    launch.bound_waiting(trainer, "ddp")
    assert trainer.strategy._process_group_backend == backend


def test_a_short_paging_file_is_short_memory() -> None:
    for line in (
        "Couldn't open shared file mapping: <torch_4_1>, error code: <1455>",
        "[WinError 1455] The paging file is too small for this operation to complete",
    ):
        assert errors.is_memory(RuntimeError(line))


def test_ctrl_break_saves_and_stops_where_there_is_one() -> None:
    signals = {getattr(signal, name, None) for name in ("SIGTERM", "SIGUSR1", "SIGBREAK")} - {None}
    assert set(stop.STOP_SIGNALS) == signals


# ---- Linux without /proc and glibc ----


def test_without_proc_memory_and_device_are_told_by_other_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **more: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    resident = report.peak_memory()["resident"]
    assert resident is None if sys.platform == "win32" else resident > 10**7
    assert bench.device().startswith(("CPU", "1 x"))


# ---- what the source says ----

SOURCES = sorted(path for name in ("lit_cifar", "benchmarks", "examples") for path in (ROOT / name).rglob("*.py"))
ASKS = ("sys.platform", "hasattr(")


def faults(source: str) -> Iterator[str]:
    """Lines with text whose encoding is the system's, renames that Windows may refuse, and what POSIX, Linux or glibc
    alone has, unless the system is asked first, by an `if` around it or by one before it in its function that ends it,
    or its lack is expected."""
    parsed = ast.parse(source)
    above = {child: node for node in ast.walk(parsed) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Call) and _is_text(node) and "encoding" not in {key.arg for key in node.keywords}:
            yield f"line {node.lineno}: text without an encoding"
        if isinstance(node, ast.Call) and re.search(r"^os\.replace$|\.rename$|^shutil\.move$", ast.unparse(node.func)):
            yield f"line {node.lineno}: renames, for which there is files.move"
        if _is_posix(node) and not _is_guarded(node, above):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def _is_text(call: ast.Call) -> bool:
    """Whether a call opens text: a file, or what a program prints."""
    is_method = isinstance(call.func, ast.Attribute)
    of, _, name = ast.unparse(call.func).rpartition(".")
    keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    if name in ("read_text", "write_text", "TextIOWrapper"):
        return True
    if name in ("run", "Popen", "check_output", "check_call", "call"):
        return bool(keywords.get("text") or keywords.get("universal_newlines"))
    position = 0 if name.endswith("TemporaryFile") or (is_method and of not in ("os", "io")) else 1
    modes = [keywords["mode"]] if "mode" in keywords else [getattr(arg, "value", None) for arg in call.args[position:]]
    if name.endswith("TemporaryFile"):
        return "b" not in (modes or ["w+b"])[0]
    if name not in ("open", "fdopen") or (of, name) == ("os", "open"):
        return False
    if position == 0 and modes and not isinstance(modes[0], str):
        return False  # a mirror, an image, a member of an archive
    return not modes or "b" not in str(modes[0])


def _is_posix(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        is_system = node.value.id == "os" and node.attr == "name"  # sys.platform is what mypy and tests understand
        return is_system or node.attr in windows.MISSING.get(node.value.id, ())
    if isinstance(node, ast.Constant):
        return str(node.value).startswith(("/proc", "/dev/", "/tmp", "libc.so"))
    if isinstance(node, ast.Import):
        return any(alias.name in windows.MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return any(alias.name in windows.MISSING.get(node.module or "", ()) for alias in node.names) or (
            node.module in windows.MODULES
        )
    return False


def _is_guarded(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    while node in above:
        child, node = node, above[node]
        if isinstance(node, (ast.If, ast.IfExp)) and any(ask in ast.unparse(node.test) for ask in ASKS):
            return True
        if isinstance(node, ast.With) and "OSError" in ast.unparse(node.items[0]):
            return True
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(it.type or node) for it in node.handlers):
            return True
        body: list[ast.stmt] = getattr(node, "body", []) if isinstance(node, ast.FunctionDef) else []
        for earlier in body[: body.index(child)] if child in body else []:  # type: ignore[arg-type]
            ends = isinstance(earlier, ast.If) and isinstance(earlier.body[-1], (ast.Return, ast.Raise))
            if ends and any(ask in ast.unparse(earlier.test) for ask in ASKS):  # type: ignore[attr-defined]
                return True
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_names_its_encoding_and_posix_is_asked_for(path: Path) -> None:
    found = list(faults(path.read_text(encoding="utf-8")))
    if path.name == "files.py":  # which has the one that waits
        found.remove(next(line for line in found if "files.move" in line))
    if path.name == "gpu.py":  # which gpu.sh starts, in bash
        found = [line for line in found if "SIGKILL" not in line and "killpg" not in line]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        *("open('a')", "open('a', 'w')", "path.open()", "path.open('w')", "path.read_text()", "path.write_text('a')"),
        *("os.fdopen(3)", "os.fdopen(3, 'w')", "subprocess.run(a, text=True)", "io.TextIOWrapper(raw)"),
        *("os.fork()", "os.open(a, os.O_NONBLOCK)", "signal.SIGKILL", "import fcntl", "from select import poll"),
        *(
            "os.name == 'nt'",
            "os.replace(a, b)",
            "path.rename(b)",
            "open('/proc/cpuinfo', 'rb')",
            "def f():\n    import resource",
            "os.sysconf('a')",
            "TemporaryFile('w')",
        ),
    ],
)
def test_the_test_of_the_source_sees(line: str) -> None:
    assert list(faults(line))


@pytest.mark.parametrize(
    "line",
    [
        *("open('a', 'rb')", "open('a', encoding='utf-8')", "path.open('ab', buffering=0)", "os.fdopen(3, 'wb')"),
        *("mirror.open(3, True)", "Image.open(file)", "tarfile.open(path)", "subprocess.run(a)", "TemporaryFile()"),
        *("getattr(os, 'O_NONBLOCK', 0)", "if sys.platform == 'win32':\n    pass\nelse:\n    import fcntl"),
        "def f():\n    if sys.platform == 'win32':\n        return\n    signal.SIGKILL",
        "try:\n    import resource\nexcept ImportError:\n    resource = None",
        "if hasattr(os, 'fork'):\n    os.fork()",
        "with suppress(OSError):\n    ctypes.CDLL('libc.so.6')",
    ],
)
def test_the_test_of_the_source_lets_pass(line: str) -> None:
    assert not list(faults(line))
