"""predict: every image gets its line, in order, with what the net says of the pixels that training would read."""

import csv
import errno
import io
import itertools
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Run, bomb, error_of, followed
from PIL import Image

import lit_cifar.predict
from lit_cifar import load
from lit_cifar.data import images as images_module
from lit_cifar.data.members import MAX_MEMBER_BYTES
from lit_cifar.data.shapes import draw_shapes
from lit_cifar.data.tree import Tree
from lit_cifar.errors import UserError

NUM_DRAWN = 12


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "last.ckpt"


@pytest.fixture
def drawn() -> Iterator[torch.Tensor]:
    """Test images (N, 3, 32, 32), which stand in drawn/ as PNGs in their order."""
    images = draw_shapes(train=False).images[:: 2000 // NUM_DRAWN][:NUM_DRAWN]
    Path("drawn/more").mkdir(parents=True)
    for number, image in enumerate(images):
        folder = "drawn" if number < 8 else "drawn/more"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{folder}/{number:02}.png")
    return images


def predict(checkpoint: Path, *args: object) -> None:
    lit_cifar.predict.main(["--ckpt_path", str(checkpoint), *map(str, args)])


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("flags", [[], ["--batch_size", "5"], ["--tta", "none"]])
def test_probabilities_are_the_nets_in_the_order_of_the_images(
    checkpoint: Path, drawn: torch.Tensor, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    predict(checkpoint, "drawn", "--json", "--top", "10", *flags)
    lines = objects(capsys.readouterr().out)
    net, classes = load(checkpoint, tta="none" if "none" in flags else None)
    with torch.inference_mode():
        expected = net(drawn).softmax(1)
    assert [Path(line["path"]).stem for line in lines] == [f"{number:02}" for number in range(NUM_DRAWN)]
    for line, probabilities in zip(lines, expected, strict=True):
        told = {prediction["class"]: prediction["probability"] for prediction in line["predictions"]}
        assert list(told.values()) == sorted(told.values(), reverse=True)
        assert [told[name] for name in classes] == pytest.approx(probabilities.tolist(), abs=2e-6)


def test_text_and_csv_tell_what_json_tells(
    checkpoint: Path, drawn: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("drawn/00.png").write_bytes(b"no image")
    told = []
    for flags in (["--json"], ["--csv"], []):
        with pytest.raises(UserError, match=r"^1 of 12 images could not be read$"):
            predict(checkpoint, *flags, "drawn", "--top", "2")
        told.append(capsys.readouterr().out)
    lines = objects(told[0])
    header, *rows = csv.reader(io.StringIO(told[1]))
    assert header == ["path", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert len(rows) == NUM_DRAWN
    for line, row, text in zip(lines[1:], rows[1:], told[2].splitlines()[1:], strict=True):
        predictions = [(prediction["class"], prediction["probability"]) for prediction in line["predictions"]]
        assert (row[0], row[-1]) == (line["path"], "")
        assert [(row[1], float(row[2])), (row[3], float(row[4]))] == predictions
        assert re.fullmatch(r"(\S+)  (\w+) (\d+\.\d) %  (\w+) (\d+\.\d) %", text)
        assert text == "  ".join([line["path"], *(f"{name} {100 * share:.1f} %" for name, share in predictions)])
    assert lines[0] == {"path": "drawn/00.png", "error": "cannot be decoded as an image"}
    assert rows[0] == ["drawn/00.png", "", "", "", "", "cannot be decoded as an image"]
    assert told[2].startswith("drawn/00.png  error: cannot be decoded as an image\n")


def test_images_of_any_size_become_the_pixels_that_training_reads(checkpoint: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    rgb = Image.fromarray(noise[..., :3])
    rgb.save("a.jpg", exif=exif)
    Image.fromarray(noise).save("b.png")
    rgb.quantize(50).save("c.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) << 8).save("d.png")
    Image.fromarray(noise[..., 0]).save("e.webp")
    names = sorted(path.name for path in Path().iterdir() if path.is_file())
    for split, class_name in itertools.product(("train", "test"), ("noise", "other")):
        Path(f"tree/{split}/{class_name}").mkdir(parents=True)
        for name in names:
            Path(f"tree/{split}/{class_name}/{name}").symlink_to(Path(name).absolute())
    expected = Tree(Path("tree")).read(train=False).images[: len(names)]
    batches = list(lit_cifar.predict._batches(((name, None) for name in names), 99))
    assert [image.data for image in batches[0]] == [image.numpy().tobytes() for image in expected]


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tiff", "ppm", "tga", "avif"])
def test_any_format_of_pillow_is_read(checkpoint: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 48), (0, 0, 255)).save("blue.png")
    if suffix == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow writes no AVIF")
    Image.open("blue.png").save(f"picture.{suffix}")
    predict(checkpoint, "blue.png", f"picture.{suffix}", "--json")
    first, second = (line["predictions"] for line in objects(capsys.readouterr().out))
    assert first == second or suffix == "avif"  # which loses a little


def names(output: str) -> list[str]:
    return [line.split("  ")[0] for line in output.splitlines()]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["drawn/more/08.png", "drawn/01.png"], ["drawn/more/08.png", "drawn/01.png"]),
        (["drawn/0[12].png"], ["drawn/01.png", "drawn/02.png"]),
        (["drawn/**/1*.png"], ["drawn/more/10.png", "drawn/more/11.png"]),
        (["drawn/mor*"], [f"drawn/more/{number:02}.png" for number in range(8, 12)]),
        (["drawn/more/**"], [f"drawn/more/{number:02}.png" for number in range(8, 12)]),
        (["drawn/more/"], [f"drawn/more/{number:02}.png" for number in range(8, 12)]),
        (["odd[1].png"], ["odd[1].png"]),
    ],
)
def test_paths_are_files_folders_and_patterns(
    checkpoint: Path, drawn: torch.Tensor, paths: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("odd[1].png").write_bytes(Path("drawn/00.png").read_bytes())
    Path("drawn/more/notes.txt").write_text("no image")
    Path("drawn/more/.hidden.png").write_text("no image")
    if paths == ["drawn/more/**"]:
        Path("drawn/more/notes.txt").unlink()
    predict(checkpoint, *paths)
    assert names(capsys.readouterr().out) == expected


def test_a_pattern_does_not_follow_links_in_circles(
    checkpoint: Path, drawn: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        Path("drawn/more", name).symlink_to(".")  # glob's own ** takes 2 to the power of 40 ways
    Path("drawn/more/.hidden").mkdir()
    Path("drawn/more/.hidden/x8.png").write_text("no image")
    for pattern in ("**/*8.png", "drawn/**/*8.png", "./drawn/**/**/*8.png", "draw?/**/more/*8.png"):
        predict(checkpoint, pattern)
        found = ["drawn/more/08.png"]
        assert [name.removeprefix("./") for name in names(capsys.readouterr().out)] == found, pattern
    for pattern in ("drawn/**", "draw?/**/*.png"):
        predict(checkpoint, pattern)
        assert len(names(capsys.readouterr().out)) == NUM_DRAWN, pattern


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda: Path("drawn/03.png").read_bytes(), ["-"]),
        (lambda: b"drawn/03.png\r\ndrawn/more\n\ndrawn/01.*\n", ["drawn/03.png", *(f"drawn/more/{n:02}.png" for n in
         range(8, 12)), "drawn/01.png"]),
    ],
)  # fmt: skip
def test_standard_input_is_an_image_or_paths(
    checkpoint: Path,
    drawn: torch.Tensor,
    given: Any,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given())))
    predict(checkpoint, "drawn/00.png", "-", "--csv")
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))[1:]
    assert [row[0] for row in rows] == ["drawn/00.png", *expected]
    if expected == ["-"]:
        predict(checkpoint, "drawn/03.png", "--csv")
        assert rows[1][1:] == list(csv.reader(io.StringIO(capsys.readouterr().out)))[1][1:]


MEASURED = """
import atexit, runpy
from pathlib import Path
from lit_cifar.results.report import peak_memory
atexit.register(lambda: Path("peak").write_text(str(peak_memory()["resident"])))
runpy.run_module("lit_cifar.predict", run_name="__main__", alter_sys=True)
"""


def test_broken_images_have_lines_of_their_own_and_take_no_memory(
    checkpoint: Path, drawn: torch.Tensor, run_command: Run
) -> None:
    Path("cut.png").write_bytes(Path("drawn/02.png").read_bytes()[:-100])
    Path("bomb.png").write_bytes(bomb(50_000))
    Path("not\xff a\nname.png").write_bytes(b"")
    Path("measured.py").write_text(MEASURED)
    paths = ["cut.png", "drawn/00.png", "gone.png", "bomb.png", "not\xff a\nname.png", "drawn/01.png"]
    done = run_command("measured", "--ckpt_path", checkpoint, *paths, "--top", "1")
    shape = r"  \w+ \d+\.\d %"
    expected = [
        r"cut\.png  error: cannot be decoded as an image",
        rf"drawn/00\.png{shape}",
        r"gone\.png  error: No such file or directory",
        r"bomb\.png  error: has far too many pixels",
        r"'notÿ a\\nname\.png'  error: cannot be decoded as an image",
        rf"drawn/01\.png{shape}",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert done.returncode == 2
    assert done.stderr == "lit_cifar: error: 4 of 6 images could not be read\n"
    assert int(Path("peak").read_text()) < 2 * 2**30  # bytes; the bomb alone would take 2.5 GB


def test_lines_come_as_batches_are_done_and_may_stop_being_read(checkpoint: Path, drawn: torch.Tensor) -> None:
    os.mkfifo("later.png")
    paths = ["drawn/00.png", "later.png", "drawn/01.png"]
    with followed("lit_cifar.predict", "--ckpt_path", checkpoint, "--batch_size", "1", *paths) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("drawn/00.png  ")
        process.stdout.close()  # as `head -1` does
        Path("later.png").write_bytes(Path("drawn/02.png").read_bytes())
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_what_is_no_file_or_never_ends_has_its_line_and_the_rest_goes_on(
    checkpoint: Path, drawn: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images_module, "SILENT_SECONDS", 0.2)
    os.mkfifo("nobody.png")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket.png")
    with open("sparse.png", "wb") as file:
        file.truncate(2**40)
    reading, writing = os.pipe()  # as the shell makes for <(cat drawn/01.png)
    os.write(writing, Path("drawn/01.png").read_bytes())
    os.close(writing)
    paths = ["nobody.png", "socket.png", "/dev/zero", "sparse.png", "drawn/00.png", f"/dev/fd/{reading}"]
    message = error_of(predict, checkpoint, *paths, "--json", "--top", "1")
    os.close(reading)
    listener.close()
    lines = objects(capsys.readouterr().out)
    assert message == "4 of 6 images could not be read"
    assert [line["path"] for line in lines] == paths
    assert [line.get("error", "").partition(";")[0] for line in lines] == [
        "is a pipe that gave nothing for 0.2 s",
        os.strerror(errno.ENXIO if sys.platform == "linux" else errno.EOPNOTSUPP),
        "is a pipe or a device, not a file",
        f"has more than the {MAX_MEMBER_BYTES} bytes that an image may have",
        "",
        "",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_pipes_in_folders_are_not_waited_for(
    checkpoint: Path, drawn: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("drawn/more/nobody.png")
    for paths in (["drawn"], ["drawn/**/*.png"]):
        assert error_of(predict, checkpoint, *paths, "--json") == f"1 of {NUM_DRAWN + 1} images could not be read"
        *_, last = objects(capsys.readouterr().out)
        assert last == {"path": "drawn/more/nobody.png", "error": "is a pipe or a device, not a file"}


def test_endless_standard_input_is_one_image_that_is_too_large(
    checkpoint: Path, drawn: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            return len(buffer)

    for name in ("predict", "data.images"):
        monkeypatch.setattr(f"lit_cifar.{name}.MAX_MEMBER_BYTES", 2**20)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    assert error_of(predict, checkpoint, "-", "drawn/00.png") == "1 of 2 images could not be read"
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("-  error: has more than the ")
    assert second.startswith("drawn/00.png  ")


@pytest.mark.parametrize("form", ["--json", "--csv", "--tta=none"])
def test_logits_that_are_not_finite_are_told_and_never_printed(
    checkpoint: Path,
    drawn: torch.Tensor,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    net, classes = load(checkpoint)

    class Odd(torch.nn.Module):
        mean = net.mean

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = net(images)
            logits[0, 3] = float("nan")
            logits[1] = float("inf")
            return logits

    monkeypatch.setattr(lit_cifar.predict, "load", lambda *_: (Odd(), classes))
    paths = [f"drawn/{number:02}.png" for number in range(3)]
    assert error_of(predict, checkpoint, *paths, form) == "2 of 3 images could not be classified"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("{", "drawn"))]
    assert ["not finite" in line for line in lines] == [True, True, False]
    assert not any("NaN" in line or "nan" in line or "inf " in line for line in lines)


def test_one_class_is_certain(checkpoint: Path, drawn: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(checkpoint, weights_only=True)
    last = max(name for name in content["state_dict"] if name.endswith("fc3.weight"))
    for name in (last, last.replace("weight", "bias")):
        content["state_dict"][name] = content["state_dict"][name][:1].clone()
    content["lit_cifar"]["classes"] = ["all"]
    content["lit_cifar"]["config"]["model"]["net"]["init_args"] = {"num_classes": 1}
    torch.save(content, "one.ckpt")
    predict(Path("one.ckpt"), "drawn/00.png", "--top", "5")
    assert capsys.readouterr().out == "drawn/00.png  all 100.0 %\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["empty"], "no images in empty; "),
        (["a.png", "--top", "0"], "--top 0 must be at least 1"),
        (["a.png", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["a.png", "--topp", "1"], r"unknown flag --topp \(did you mean --top\?\)"),
        (["a.png", "--trust", "maybe"], "--trust: expected true or false, got maybe"),
        (["a.png", "--json", "--csv"], "not allowed with"),
        (["a.png", "--tta", "all"], "invalid choice: 'all'"),
        ([], "required: PATH"),
        (["a.png", "--ckpt_path", "gone.ckpt"], "no checkpoint gone.ckpt"),
    ],
)
def test_what_is_typed_wrong_is_told(checkpoint: Path, args: list[str], message: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        predict(checkpoint, *args)


def test_paths_begin_at_home_in_both_spellings_of_a_flag(
    checkpoint: Path, drawn: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Path("home").absolute()
    Path("drawn").rename(home)
    (home / "net.ckpt").write_bytes(checkpoint.read_bytes())
    monkeypatch.setenv("HOME", str(home))
    for flags in (["--ckpt_path=~/net.ckpt"], ["--ckpt_path", "~/net.ckpt"]):
        lit_cifar.predict.main([*flags, "~/00.png", "~/more/*.png", "./home/01.png"])
        paths = [f"{home}/00.png", *(f"{home}/more/{number:02}.png" for number in range(8, 12)), "./home/01.png"]
        assert names(capsys.readouterr().out) == paths


@pytest.mark.parametrize("url", ["s3://bucket/net.ckpt", "https://example.org/net.ckpt", "hf://some/net.ckpt"])
def test_a_url_ends_in_one_line(checkpoint: Path, url: str) -> None:
    assert error_of(predict, Path("x"), "a.png", f"--ckpt_path={url}").startswith(f"--ckpt_path {url}: ")
    assert error_of(predict, checkpoint, "a.png", url).startswith(f"PATH {url}: ")
    assert list(Path().iterdir()) == []


def test_an_argument_of_a_net_that_cannot_be_printed_is_escaped(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    net = {"class_path": "lit_cifar.nets.Net", "init_args": {"\x1b[2J\x1b]0;pwned\x07": 3}}
    content["lit_cifar"]["config"]["model"]["net"] = net
    torch.save(content, "hostile.ckpt")
    message = error_of(predict, Path("hostile.ckpt"), "a.png")
    assert "the checkpoint's net cannot be made: " in message
    assert r"\x1b[2J" in message


def test_a_class_that_cannot_be_printed_is_escaped(
    checkpoint: Path, drawn: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["lit_cifar"]["classes"][0] = "\x1b[31mred\n"
    torch.save(content, "hostile.ckpt")
    predict(Path("hostile.ckpt"), "drawn/00.png", "--top", "10")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert r"  '\x1b[31mred\n' " in line


def test_more_classes_than_there_are_are_all_of_them(
    checkpoint: Path, drawn: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(checkpoint, "drawn/00.png", "--top", "99", "--json")
    assert len(objects(capsys.readouterr().out)[0]["predictions"]) == 10


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="torch finds no GPU"):
        predict(checkpoint, "a.png", "--accelerator", "gpu")
