"""A file that is written durably is whole or absent, whatever happens in between."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import ROOT, error_of

import lit_cifar.test
from lit_cifar import files
from lit_cifar.files import check_output, check_place, replaced, write_durably, write_output

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither permission bits nor folder handles")


def test_a_file_gets_its_bytes_and_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "results.json"
    write_durably(path, b"first")
    write_durably(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replaced(path) as file:
            file.write(b"half of the new")
            file.flush()
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_file_stays_absent_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with replaced(path) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "last.ckpt", []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle: int) -> None:
        calls.append(("fsync", os.fstat(handle).st_ino, os.fstat(handle).st_size))
        fsync(handle)

    def spy_replace(source: str, target: str) -> None:
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_durably(path, b"new")
    inode = path.stat().st_ino
    assert calls[:2] == [("fsync", inode, 3), ("replace", inode, 3)]
    if sys.platform != "win32":
        assert [call[:2] for call in calls[2:]] == [("fsync", tmp_path.stat().st_ino)]


@POSIX
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_durably(tmp_path / "file", b"")
        assert os.umask(umask) == umask, "it is put back"
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([letter]) * 100_000 for letter in b"abcdefgh"]
    writers = [threading.Thread(target=write_durably, args=(path, content)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.sync_folder(tmp_path / "absent")

    def refuse(handle: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.sync_folder(tmp_path)


# ---- where a person said ----


def write_json(path: Path) -> None:
    with files.writing(path, "choose another place"):
        write_output(path, b"{}\n")


def test_names_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        write_durably(tmp_path / name, b"whole")
        write_output(tmp_path / name, b"again")
        assert (tmp_path / name).read_bytes() == b"again"
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).unlink()
    for write in (write_json, lambda path: check_output(path, "choose another place")):
        assert "File name too long): choose another place" in error_of(write, tmp_path / ("n" * 256))


@POSIX
def test_a_link_that_a_person_named_is_followed_and_one_in_a_runs_folder_is_replaced(tmp_path: Path) -> None:
    for name in ("there", "nowhere/yet"):
        (tmp_path / "link").symlink_to(name)
        write_output(tmp_path / "link", b"new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / name).read_bytes() == b"new"
        write_durably(tmp_path / "link", b"newer")
        assert not (tmp_path / "link").is_symlink()
        assert (tmp_path / name).read_bytes() == b"new"
        (tmp_path / "link").unlink()
    (tmp_path / "loop").symlink_to("loop")
    assert "symbolic links" in error_of(write_json, tmp_path / "loop")


def device(folder: Path, name: str) -> Path:
    """/dev/null or /dev/full; for root, whom nothing would keep from replacing those, one like it in `folder`."""
    path = Path("/dev", name)
    if not path.exists():
        pytest.skip(f"this system has no {path}")
    if os.geteuid() == 0:
        try:
            os.mknod(folder / name, stat.S_IFCHR | 0o666, os.stat(path).st_rdev)
            path = folder / name
            path.open("rb").close()
        except OSError as error:
            pytest.skip(f"no device can be made or used here: {error}")
    return path


@POSIX
def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    null = device(tmp_path, "null")
    (tmp_path / "link").symlink_to(null)
    for path in (null, tmp_path / "link"):
        check_output(path, "")
        write_output(path, b"gone")
        with pytest.raises(OSError, match="it is no regular file"):
            write_durably(null, b"")
    assert stat.S_ISCHR(null.stat().st_mode)
    assert (tmp_path / "link").is_symlink()


@POSIX
def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    full = device(tmp_path, "full")
    assert f"{full} cannot be written (No space left on device): choose" in error_of(write_json, full)
    assert stat.S_ISCHR(full.stat().st_mode)


@POSIX
def test_a_pipe_gets_the_bytes_once_something_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is no regular file"):
        write_durably(pipe, b"")
    check_output(pipe, "")
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_output(pipe, b"all of it" * 100_000)
    reader.join()
    assert read == [b"all of it" * 100_000]
    monkeypatch.setattr(files, "READER_SECONDS", 0.1)
    assert "nothing has read this pipe for" in error_of(write_json, pipe)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


@POSIX
@pytest.mark.parametrize("output", ["stdout", "out.txt"])
def test_standard_output_gets_the_bytes_where_it_is_even_if_it_is_a_file(tmp_path: Path, output: str) -> None:
    (tmp_path / "stdout").symlink_to("/dev/stdout")  # not itself, which root could replace
    code = f"from lit_cifar.files import *; print('a'); write_output(Path('{tmp_path / output}'), b'b\\n'); print('c')"
    with open(tmp_path / "out.txt", "wb") as out:
        subprocess.run(
            [sys.executable, "-c", code], stdout=out, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
        )
    assert (tmp_path / "out.txt").read_text() == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("folder", "it is a folder"),
        ("file/result", ""),
        ("file/far/result", ""),
        ("no/new/result", None),
    ],
)
def test_what_stands_in_the_way_is_found_before_the_work(tmp_path: Path, place: str, reason: str | None) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for check in (check_place, check_output):
        if reason is None:
            check(tmp_path / place, "")
        else:
            message = error_of(check, tmp_path / place, "name another")
            assert message.startswith(f"{tmp_path / place} cannot be written (")
            assert reason in message
            assert error_of(write_json, tmp_path / place).startswith(f"{tmp_path / place} cannot be written (")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert f"the folder {tmp_path} cannot be written" in error_of(check_output, tmp_path / "new" / "result", "")


# ---- what `test` makes of it ----


@POSIX
def test_a_test_writes_where_it_is_told_and_loses_no_report(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--ckpt_path", str(trained / "checkpoints/last.ckpt"), "--trainer.limit_test_batches", "1", "--output"]
    Path("link").symlink_to("results.json")
    lit_cifar.test.main([*args, "link"])
    assert json.loads(Path("results.json").read_text())["num_test"] == 500
    assert Path("link").is_symlink()
    capsys.readouterr()
    Path("folder").mkdir()
    assert "it is a folder" in error_of(lit_cifar.test.main, [*args, "folder"])
    assert capsys.readouterr().out == "", "before it tests"
    full = device(tmp_path, "full")
    assert "No space left" in error_of(lit_cifar.test.main, [*args, str(full)])
    assert "Accuracy on the 500 test images" in capsys.readouterr().out
