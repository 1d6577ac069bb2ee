"""Random bytes and words for everything that reads a file or a flag: success, or one line, and nothing else.

    python tests/stress/fuzz.py [--cases N] [--seed S] [--only NAME]

Each case runs in this process, under an alarm; what does neither succeed nor end in UserError is written down with its
seed and its input, as small as hypothesis finds one.
"""

import argparse
import contextlib
import faulthandler
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from odd_files import archives, encoded, icon, images, linked, members, netpbm, png, saved, tiff
from odd_runs import TINY, environments, trainers
from PIL import Image

import lit_cifar.fit
import lit_cifar.predict
from lit_cifar import log, process
from lit_cifar.cli import machine
from lit_cifar.data.images import IMAGE_BYTES, IMAGE_FORMATS, decode_image
from lit_cifar.data.source import find_source
from lit_cifar.data.tree import Tree
from lit_cifar.errors import UserError
from lit_cifar.model.classifier import load
from lit_cifar.model.module import LitClassifier
from lit_cifar.nets import Net
from lit_cifar.results.report import peak_memory
from lit_cifar.run.read import read_checkpoint

SECONDS = 60  # that a case may take
KEPT = ("cache", "tiny", "secret.png", "train")  # what cases have in common
MAX_PEAK_BYTES = 2**30 + 2**29  # that a case may add to the most this process ever held
NAMES = ("data", "model", "trainer", "checkpoint", "running_loss", "seed_everything", "config")
KEYS = (
    "data_dir", "dataset", "batch_size", "eval_batch_size", "num_val", "augment", "transform", "num_workers", "mirrors",
    "seed", "net", "lr", "momentum", "weight_decay", "schedule", "warmup", "mean", "std", "tta", "compile", "optimizer",
    "max_epochs", "max_steps", "devices", "num_nodes", "accelerator", "strategy", "precision", "callbacks", "plugins",
    "logger", "default_root_dir", "every_n_train_steps", "num_kept", "monitor", "mode", "class_path", "init_args",
)  # fmt: skip
WORDS = (
    "null", "true", "-1", "0", "1e400", ".nan", ".inf", "1_0", "0x10", "2**31", "99999999999999999999", "auto",
    "shapes", "[]", "{}", "[[", "{", "!!python/object:os.system x", "&a [*a]", "*a", "? :", "---", "%",
    "lit_cifar.nets.Net",
    "lit_cifar.nets.SpeedNet", "torch.nn.Linear", "os.system", "é\u202e", "\x00", "\x1b[2J", "a" * 3000, "=", "--",
    "~", "",
)  # fmt: skip

word = st.sampled_from(WORDS) | st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)
key = st.sampled_from((*NAMES, *KEYS)) | st.tuples(st.sampled_from(NAMES), st.sampled_from(KEYS)).map(".".join)
value = st.recursive(
    word, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(key | word, inner, max_size=3), max_leaves=6
)


def as_yaml(value: Any, depth: int = 0) -> str:
    """YAML as people break it: what looks like a number or a bracket is not quoted."""
    indent = "  " * depth
    if isinstance(value, dict):
        return "".join(f"\n{indent}{key}: {as_yaml(inner, depth + 1)}" for key, inner in value.items())
    if isinstance(value, list):
        return "".join(f"\n{indent}- {as_yaml(inner, depth + 1)}" for inner in value)
    return str(value)


config = st.dictionaries(
    st.sampled_from(NAMES) | word, value | st.dictionaries(st.sampled_from(KEYS), value), max_size=4
)
flag = st.tuples(key | word, word | value.map(str)).flatmap(
    lambda pair: st.sampled_from([[f"--{pair[0]}", pair[1]], [f"--{pair[0]}={pair[1]}"], [f"--{pair[0]}"], [pair[1]]])
)
flags = st.lists(flag, max_size=4).map(lambda lists: [word for words in lists for word in words])
# places and bytes of changes, as shares of the length
change = st.tuples(
    st.floats(0, 1), st.sampled_from(("set", "cut", "drop", "double", "zero", "ones")), st.binary(max_size=8)
)
changes = st.lists(change, min_size=1, max_size=5)


def changed(data: bytes, changes: list[tuple[float, str, bytes]]) -> bytes:
    result = bytearray(data)
    for share, kind, content in changes:
        place = int(share * len(result))
        if kind == "set":
            result[place : place + len(content)] = content
        elif kind == "cut":
            del result[place:]
        elif kind == "drop":
            del result[place : place + len(content)]
        elif kind == "double":
            result[place:place] = result[place : place + 512]
        else:
            filling = b"\0" if kind == "zero" else b"\xff"
            result[place : place + len(content)] = filling * len(result[place : place + len(content)])
    return bytes(result)


def checkpoint() -> bytes:
    config = {"model": {"net": {"class_path": "lit_cifar.nets.Net"}, "tta": "none"}, "data": {"dataset": "shapes"}}
    ours = {"classes": [f"class_{i}" for i in range(10)], "config": config, "recipe": "tutorial"}
    stream = io.BytesIO()
    torch.save({"state_dict": LitClassifier(Net()).state_dict(), "lit_cifar": ours, "global_step": 1}, stream)
    return stream.getvalue()


def with_right_sums(data: bytes) -> bytes:
    """A changed checkpoint's pickle with the sums of a good one, so that it is read at all."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as good, zipfile.ZipFile(stream, "w") as archive:
        for name in good.namelist():
            archive.writestr(name, data if name.endswith("data.pkl") else good.read(name))
    return stream.getvalue()


class Hang(BaseException):
    """A case took too long."""


def hang(*_: object) -> None:
    faulthandler.dump_traceback()
    raise Hang


@contextlib.contextmanager
def judged(done: list[float]) -> Any:
    """Lets UserError and a clean exit pass, and sees to it that a UserError would be one line."""
    signal.alarm(SECONDS)
    started_at = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except UserError as error:
        if not str(error).strip():
            raise AssertionError("an empty line") from error
    except SystemExit as error:
        if error.code not in (0, 2, None):
            raise AssertionError(f"exit code {error.code}") from error
    finally:
        signal.alarm(0)
        done.append(time.perf_counter() - started_at)


@contextlib.contextmanager
def alone(environment: dict[str, str]) -> Any:
    """A run with variables in the environment, which leaves nothing of itself in this process and this folder."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        log._known = None
        for path in Path().glob("*"):
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_tree() -> None:
    for split, num_images in (("train", 4), ("test", 2)):
        for name in "ab":
            folder = Path("tiny", split, name)
            folder.mkdir(parents=True)
            for index in range(num_images):
                Image.new("RGB", (32, 32), (index * 9, 0, 9 * ord(name) % 256)).save(folder / f"{index}.png")


def targets(done: list[float]) -> dict[str, tuple[int, Callable[..., None]]]:
    """By name: the share of all cases in hundredths, and a test that hypothesis can run."""
    pictures, packed, good = images(), archives(images()["PNG"]), checkpoint()
    black = encoded(Image.new("RGB", (32, 32)))
    for outside in ("secret.png", "train/a/0.png"):  # where a link could lead
        Path(outside).parent.mkdir(parents=True, exist_ok=True)
        Path(outside).write_bytes(encoded(Image.new("RGB", (32, 32), "white")))
    make_tree()
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        pickle_name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(pickle_name)

    @given(config)
    def configs(content: dict[str, Any]) -> None:
        Path("config.yaml").write_text(as_yaml(content), errors="surrogatepass")
        with judged(done):
            lit_cifar.fit.main(["--config", "config.yaml", "--print_config"])

    @given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")))
    def config_bytes(content: bytes) -> None:
        Path("config.yaml").write_bytes(content)
        with judged(done):
            lit_cifar.fit.main(["--config", "config.yaml", "--print_config"])

    @given(flags)
    def fit_flags(args: list[str]) -> None:
        with judged(done):
            lit_cifar.fit.main([*args, "--print_config"])

    @given(flags)
    def predict_flags(args: list[str]) -> None:
        Path("good.ckpt").write_bytes(good)
        with judged(done):
            lit_cifar.predict.main(["--ckpt_path", "good.ckpt", *args])

    @given(st.sampled_from(sorted(pictures)), changes, st.booleans())
    def image_bytes(kind: str, changes: list[Any], any_format: bool) -> None:
        with judged(done):
            pixels, _ = decode_image(changed(pictures[kind], changes), None if any_format else IMAGE_FORMATS)
            assert len(pixels) == IMAGE_BYTES

    @given(png() | tiff() | netpbm() | icon() | saved(), st.none() | changes, st.booleans())
    def odd_images(data: bytes, changes: list[Any] | None, any_format: bool) -> None:
        before = peak_memory()["resident"]
        with judged(done):
            pixels, _ = decode_image(changed(data, changes or []), None if any_format else IMAGE_FORMATS)
            assert len(pixels) == IMAGE_BYTES
        assert peak_memory()["resident"] - before < MAX_PEAK_BYTES

    @given(members, st.booleans(), st.none() | changes)
    def linked_archives(extra: list[Any], is_zip: bool, changes: list[Any] | None) -> None:
        path = Path("linked.zip" if is_zip else "linked.tar")
        path.write_bytes(changed(linked(black, extra, is_zip), changes or []))
        with judged(done), warnings.catch_warnings():
            assert not Tree(path).read(True).images.any(), "an image from outside of the archive"

    @given(st.sampled_from(sorted(packed)), changes)
    def archive_bytes(kind: str, changes: list[Any]) -> None:
        path = Path(f"fuzz{kind}")
        path.write_bytes(changed(packed[kind], changes))
        with judged(done):
            find_source(path, "cifar10")
            Tree(path).read(True)

    @given(trainers)
    def parts(trainer: dict[str, Any]) -> None:
        Path("config.yaml").write_text(as_yaml({"trainer": trainer}))
        with judged(done), alone({}):
            machine.explained(lit_cifar.fit.main, [*TINY, "--config", "config.yaml"])

    @given(environments)
    def environments_of_runs(environment: dict[str, str]) -> None:
        with judged(done), alone(environment):
            process.check_environment()
            machine.explained(lit_cifar.fit.main, TINY)

    @given(changes)
    def checkpoint_bytes(changes: list[Any]) -> None:
        Path("fuzz.ckpt").write_bytes(changed(good, changes))
        with judged(done):
            read_checkpoint(Path("fuzz.ckpt"))

    @given(changes)
    def checkpoint_pickles(changes: list[Any]) -> None:
        Path("fuzz.ckpt").write_bytes(with_right_sums(changed(pickled, changes)))
        with judged(done):
            load("fuzz.ckpt")

    shares = {
        "configs": 9, "config_bytes": 3, "fit_flags": 9, "predict_flags": 7, "image_bytes": 13, "odd_images": 18,
        "archive_bytes": 7, "linked_archives": 9, "parts": 10, "environments_of_runs": 6, "checkpoint_bytes": 4,
        "checkpoint_pickles": 5,
    }  # fmt: skip
    made = locals()
    return {name: (share, made[name]) for name, share in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one of the targets")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, hang)
    warnings.simplefilter("ignore")
    found = 0
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ["LIT_CIFAR_CACHE"], os.environ["HOME"] = place + "/cache", place
        done: list[float] = []
        for name, (share, test) in targets(done).items():
            if options.only not in (None, name):
                continue
            num_cases = max(1, options.cases * share // 100)
            started_at, before = time.perf_counter(), len(done)
            limits = settings(
                max_examples=num_cases,
                deadline=None,
                database=None,
                print_blob=False,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )
            try:
                seed(options.seed)(limits(test))()
            except (Exception, Hang):
                found += 1
                print(f"{name}: --seed {options.seed} found", traceback.format_exc(), sep="\n")
            seconds = time.perf_counter() - started_at
            slowest = max(done[before:], default=0)
            print(f"{name}: {len(done) - before} cases, {seconds:.0f} s, slowest {slowest:.1f} s", flush=True)
        print(f"{len(done)} cases, {found} findings")
        os.chdir("/")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
