"""Files from strangers: none runs code, writes where it should not, takes 2 GiB, or ends in more than one line."""

import contextlib
import io
import os
import pkgutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.utils.collect_env
from helpers import ROOT, bomb
from PIL import Image

import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.test
from lit_cifar import load
from lit_cifar.data import images
from lit_cifar.data.tree import Tree
from lit_cifar.errors import UserError
from lit_cifar.run.read import read_checkpoint
from lit_cifar.run.trust import check_trusted

MAX_BYTES = 2**30  # of memory, in a process of its own, of which torch takes a third
CANARY = Path("canary")  # made by whatever runs

# Runs calls one after the other, in a process whose peak of memory is then known.
MEASURED = """
import sys
from pathlib import Path
from lit_cifar.errors import UserError
from lit_cifar.results.report import peak_memory
{setting}
for path in sys.argv[1:]:
    try:
        {call}
    except UserError as error:
        print(path, "told", str(error).isprintable())
print(peak_memory()["resident"])
"""


def told_within_memory(setting: str, call: str, *paths: Path) -> None:
    """Each path ends in a UserError, and all of them in less than MAX_BYTES."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(setting=setting, call=call), *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    *lines, peak = done.stdout.splitlines() or ["0"]
    assert lines == [f"{path} told True" for path in paths], done
    assert int(peak) < MAX_BYTES
    assert not CANARY.exists()


def error_of(function: Callable[..., object], *args: Any) -> str:
    error = helpers.error_of(function, *args)
    assert not CANARY.exists()
    return error


# ---- checkpoints ----


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function: Any, *args: object) -> None:
        self.reduced = function, args

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.fixture
def content(trained: Path) -> dict[str, Any]:
    """A good checkpoint, to be spoilt."""
    return torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)


def save(content: object) -> Path:
    path = Path("hostile.ckpt")
    torch.save(content, path)
    return path


def with_net(content: dict[str, Any], net: Any) -> Path:
    content["lit_cifar"]["config"]["model"]["net"] = net
    return save(content)


def linear(**arguments: Any) -> dict[str, Any]:
    """Settings of torch.nn.Linear, whose `device` has no type, so that jsonargparse makes whatever is named there."""
    return {"class_path": "torch.nn.Linear", "init_args": {"in_features": 8, "out_features": 8, **arguments}}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: with_net(content, {"class_path": "hostile.Net"}), "names the class hostile.Net"),
        (lambda content: with_net(content, linear(in_features=30_000, out_features=30_000)), "does not fit Linear"),
        (lambda content: save({**content, "state_dict": []}), "is not a checkpoint of lit_cifar"),
    ],
    ids=["whose net is a stranger's", "whose net does not fit", "of odd things"],
)
def test_every_command_refuses_a_checkpoint(
    content: dict[str, Any], spoil: Callable[[dict[str, Any]], Path], words: str
) -> None:
    """All of them read it as `load` does, which alone is asked in the tests below."""
    path, cpu = str(spoil(content)), ["--trainer.accelerator", "cpu"]
    for reader, args in (
        (load, path),
        (lit_cifar.predict.main, ["--ckpt_path", path, "image.png"]),
        (lit_cifar.test.main, ["--ckpt_path", path, *cpu]),
        (lit_cifar.fit.main, ["--resume", path, "--max_epochs", "2", *cpu]),
    ):
        assert words in error_of(reader, args)


@pytest.mark.parametrize(
    "gadget",
    [
        Call(os.system, f"touch {CANARY}"),
        Call(eval, f"open({str(CANARY)!r}, 'w')"),
        Call(exec, f"open({str(CANARY)!r}, 'w')"),
        Call(os.mkdir, str(CANARY)),
        Call(getattr, "canary", "upper"),
        Call(torch.load, str(CANARY)),
        Call(torch.hub.load, ".", "canary"),
        Call(torch.utils.collect_env.run, f"touch {CANARY}"),  # torch's own, as good as os.system
        Call(torch.jit.load, str(CANARY)),
    ],
    ids=lambda gadget: gadget.reduced[0].__name__,
)
def test_a_pickle_calls_nothing(content: dict[str, Any], gadget: Call) -> None:
    for hidden in (gadget, {**content, "callbacks": gadget}, {**content, "state_dict": {"net.bias": gadget}}):
        assert error_of(read_checkpoint, save(hidden)).startswith("hostile.ckpt is no checkpoint")


MINE = {"class_path": "hostile.Net"}
NETS = {
    "class": MINE,
    "bare": "hostile.Net",
    "as text": "{class_path: hostile.Net}",
    "as padded text": " hostile.Net",
    "as quoted text": "'hostile.Net'",
    "as JSON": '{"class_path": "hostile.Net"}',
    "in text in text": "\"{class_path: hostile.Net}\"",
    "in arguments as text": {"class_path": "torchvision.models.mobilenet_v2", "init_args": "norm_layer: hostile.Net"},
    "in a list": {"class_path": "torch.nn.Sequential", "init_args": {"args": [MINE]}},
    "instantiator": {"class_path": "lit_cifar.nets.Net", "_instantiator": "hostile.Net"},
    "instantiator of arguments": {"class_path": "lit_cifar.nets.Net", "init_args": {"_instantiator": "hostile.Net"}},
    "key": {"class_path": "torch.nn.ModuleDict", "init_args": {"modules": {"a": "hostile.Net"}}},
    "a callable argument": {
        "class_path": "torch.nn.TransformerEncoderLayer", "init_args": {"d_model": 8, "nhead": 1, "activation": MINE},
    },
    "an argument without a type": linear(device=MINE),
}  # fmt: skip
FOLLOWED = ("class", "bare", "as text", "as JSON", "key", "a callable argument", "an argument without a type")


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that leaves a canary where it is imported."""
    Path("hostile.py").write_text(f"open({str(CANARY)!r}, 'w').close()\nfrom lit_cifar.nets import Net\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    yield
    sys.modules.pop("hostile", None)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_net_of_a_stranger_is_not_imported(content: dict[str, Any], net: Any, hostile: None) -> None:
    assert "names the class hostile.Net" in error_of(load, with_net(content, net))
    assert "hostile" not in sys.modules


def test_a_net_in_a_file_is_not_read(content: dict[str, Any], hostile: None) -> None:
    Path("net-1.yaml").write_text("class_path: hostile.Net\n")
    assert "net-1.yaml" in error_of(load, with_net(content, "./net-1.yaml"))


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_net_of_a_stranger_would_be_imported_if_it_were_trusted(
    content: dict[str, Any], name: str, hostile: None
) -> None:
    """The refusals above are of what jsonargparse follows; it ignores the other notations, in this version."""
    with contextlib.suppress(UserError):  # it is made, but may not fit
        load(with_net(content, NETS[name]), trust=True)
    assert CANARY.exists()


REACHED = (
    "lit_cifar.data.download.os.mkdir",
    "lit_cifar.seeds.subprocess.Popen",
    "lit_cifar.run.logger.RunLogger",
    "lit_cifar.model.optim.MuonSGD",
    "lit_cifar.nets.speednet.torch.hub.load",
    "torch.nn.parallel.distributed.os.mkdir",
    "torch.nn.functional.torch.hub.load",
    "torch.nn.modules.module.functools.partial",
    "torch.hub.load",
    "torchvision.extension.os.mkdir",
    "torchvision.datasets.CIFAR10",
    "torchvision.models.resnet.partial",
    "torchvision.models._api.load_state_dict_from_url",
)


@pytest.mark.parametrize("name", REACHED)
def test_what_can_be_reached_through_a_trusted_package_is_not_made(content: dict[str, Any], name: str) -> None:
    pkgutil.resolve_name(name)  # or the case would test nothing
    for net in (name, {"class_path": name}, linear(device={"class_path": name, "init_args": {"path": str(CANARY)}})):
        assert error_of(load, with_net(content, net)).startswith(f"the checkpoint names the class {name}, ")


@pytest.mark.parametrize(
    "name",
    [
        "lit_cifar.nets.Net",
        "lit_cifar.nets.speednet.SpeedNet",
        "torch.nn.Linear",
        "torch.nn.functional.relu",
        "torchvision.models.alexnet",  # a module has that name too
        "torchvision.models.quantization.resnet18",
        "torchvision.ops.MLP",
        "torchvision.transforms.v2.RandAugment",
    ],
)
def test_what_a_trusted_package_defines_may_be_made(name: str) -> None:
    check_trusted({"net": name, "more": [linear(device={"class_path": name})]})


@pytest.mark.parametrize(
    "name", ["torch.nn.Nothing", "torch.nn.nothing.Nothing", "torch.nn.", "torch.nn.\0.a", "torch.nn.\x1b[2J"]
)
def test_a_name_of_nothing_in_a_trusted_package_is_refused(name: str) -> None:
    assert error_of(check_trusted, {"class_path": name}).startswith("the checkpoint names the class ")


@pytest.mark.parametrize("section", ["model", "data", "checkpoint"])  # test_strangers.py has the Trainer's
@pytest.mark.parametrize("value", [MINE, [MINE], "[{class_path: hostile.Net}]", "_instantiator: hostile.Net"])
def test_a_setting_of_a_stranger_is_not_imported(
    content: dict[str, Any], section: str, value: Any, hostile: None
) -> None:
    key = {"model": "net", "data": "transform", "checkpoint": "monitor"}[section]
    content["lit_cifar"]["config"][section][key] = value
    assert "hostile.Net" in error_of(lit_cifar.fit.main, ["--resume", str(save(content))])


def spoilt(content: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**content, **parts}


def circular() -> dict[str, Any]:
    config: dict[str, Any] = {}
    config["model"] = {"net": config}
    return config


def laughs() -> list[Any]:
    values: list[Any] = ["ha.ha"]
    for _ in range(9):
        values = [values] * 10
    return values


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: spoilt(content, lit_cifar=[]),
        lambda content: spoilt(content, lit_cifar={"config": [1], "classes": []}),
        lambda content: spoilt(content, lit_cifar={"config": {"model": 1}, "classes": []}),
        lambda content: spoilt(content, lit_cifar={"config": circular(), "classes": []}),
        lambda content: spoilt(content, lit_cifar={"config": {"model": {"net": laughs()}}, "classes": []}),
        lambda content: spoilt(content, lit_cifar={"config": {"model": {"net": "[" * 5000}}, "classes": []}),
        lambda content: spoilt(content, lit_cifar={**content["lit_cifar"], "classes": [1]}),
        lambda content: spoilt(content, state_dict=[]),
        lambda content: spoilt(content, state_dict={"net.bias": 1}),
        lambda content: spoilt(content, state_dict={1: torch.zeros(1)}),
        lambda content: spoilt(content, state_dict={"net.bias": torch.zeros(1).expand(10**6, 10**6)}),
        lambda content: spoilt(content, state_dict={"net.bias": torch.zeros(3).to_sparse()}),
        lambda content: spoilt(content, global_step="1"),
    ],
)
def test_a_checkpoint_of_odd_things_is_told(content: dict[str, Any], spoil: Callable[..., Any]) -> None:
    error_of(load, save(spoil(content)))


def momentum(content: dict[str, Any], value: Any) -> list[Any]:
    (optimizer,) = content["optimizer_states"]
    return [{**optimizer, "state": {**optimizer["state"], 0: {"momentum_buffer": value}}}]


def setting(content: dict[str, Any], name: str, value: Any) -> list[Any]:
    (optimizer,) = content["optimizer_states"]
    return [{**optimizer, "param_groups": [{**optimizer["param_groups"][0], name: value}]}]


def loops(content: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**content["loops"], "fit_loop": {**content["loops"]["fit_loop"], **parts}}


def callbacks(content: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {name: {**state, **parts} for name, state in content["callbacks"].items()}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: {key: value for key, value in content.items() if key != "loops"},
        lambda content: spoilt(content, loops=[]),
        lambda content: spoilt(content, loops={"fit_loop": 1}),
        lambda content: spoilt(content, loops=loops(content, epoch_progress={"total": "many"})),
        lambda content: spoilt(
            content, loops=loops(content, state_dict={"combined_loader": [{"epoch": 0, "batch": -5}]})
        ),
        lambda content: spoilt(content, loops=loops(content, state_dict={"combined_loader": [{"epoch": "0"}]})),
        lambda content: spoilt(content, optimizer_states=[]),
        lambda content: spoilt(content, optimizer_states=[1]),
        lambda content: spoilt(content, optimizer_states=[{"state": {}, "param_groups": []}]),
        lambda content: spoilt(content, optimizer_states=momentum(content, torch.zeros(7))),
        lambda content: spoilt(content, optimizer_states=momentum(content, None)),
        lambda content: spoilt(content, optimizer_states=setting(content, "differentiable", True)),
        lambda content: spoilt(content, optimizer_states=setting(content, "foreach", "yes")),
        lambda content: spoilt(content, optimizer_states=setting(content, "lr", [1])),
        lambda content: spoilt(content, optimizer_states=momentum(content, torch.zeros(1).expand(10**6, 10**6))),
        lambda content: spoilt(content, lr_schedulers=[{"last_epoch": "soon"}]),
        lambda content: spoilt(content, lr_schedulers=None),
        lambda content: spoilt(content, loops=loops(content, epoch_progress={})),
        lambda content: spoilt(content, loops=loops(content, **{"epoch_loop.batch_progress": {"increment_ready": 1}})),
        lambda content: spoilt(
            content, loops=loops(content, state_dict={"combined_loader": [{"epoch": 0, "batch": 101}]})
        ),
        lambda content: spoilt(content, callbacks=callbacks(content, random_states=[[]])),
        lambda content: spoilt(
            content, callbacks=callbacks(content, random_states=[{"cpu": 0 * torch.get_rng_state()}])
        ),
        lambda content: {key: value for key, value in content.items() if key != "global_step"},
        lambda content: {key: value for key, value in content.items() if key != "optimizer_states"},
        lambda content: spoilt(content, callbacks=7),
        lambda content: spoilt(content, callbacks=callbacks(content, random_states=[{"cpu": torch.zeros(3)}])),
        lambda content: spoilt(content, callbacks=callbacks(content, random_states=3)),
        lambda content: spoilt(content, callbacks=callbacks(content, best_score="high")),
        lambda content: spoilt(content, running_loss={"logged": ["much", 1], "printed": [0.0, 0]}),
        lambda content: spoilt(content, running_loss={"logged": [0.0, -5], "printed": [0.0, 0]}),
        lambda content: spoilt(content, running_loss=[]),
        lambda content: spoilt(content, **{"pytorch-lightning_version": "one"}),
    ],
)
def test_a_training_of_odd_states_is_told_when_it_is_to_go_on(
    content: dict[str, Any], spoil: Callable[..., Any]
) -> None:
    path = save(spoil(content))
    told = error_of(lit_cifar.fit.main, ["--resume", str(path), "--max_epochs", "2", "--trainer.accelerator", "cpu"])
    assert told.isprintable()
    assert not list(Path("lightning_logs").glob("*/checkpoints/*"))


def test_a_training_goes_on_where_some_weights_have_no_momentum_yet(content: dict[str, Any]) -> None:
    (optimizer,) = content["optimizer_states"]
    some = {number: state for number, state in optimizer["state"].items() if number % 2}
    path = save(spoilt(content, optimizer_states=[{**optimizer, "state": some}]))
    lit_cifar.fit.main(["--resume", str(path), "--max_epochs", "2", "--trainer.accelerator", "cpu"])


def test_settings_that_the_parser_fails_of_are_told() -> None:
    Path("config.yaml").write_text("config: true\n")
    assert "cannot name another config" in error_of(lit_cifar.fit.main, ["--config", "config.yaml", "--print_config"])
    assert error_of(lit_cifar.fit.main, ["--data", "\0"]).startswith("the settings cannot be read")


def test_a_net_of_any_size_takes_no_memory(content: dict[str, Any]) -> None:
    paths = []
    for number, features in enumerate((30_000, 10**6, 10**30)):
        net = linear(in_features=features, out_features=30_000)
        paths.append(with_net(content, net).rename(f"{number}.ckpt"))
    told_within_memory("from lit_cifar import load", "load(path)", *paths)


def repacked(path: Path, target: str, **changes: bytes) -> Path:
    """A checkpoint packed, with records replaced."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, changes.get(name.rsplit("/", 1)[-1].replace(".", "_"), archive.read(name)))
    return Path(target)


def test_a_checkpoint_that_is_a_bomb_takes_no_memory(content: dict[str, Any]) -> None:
    big = save({**content, "more": Call(bytearray, 3 * 2**30)}).rename("bytearray.ckpt")
    path = save(content)
    lists = Path("lists.ckpt")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(lists, "w") as stored:
        for name in archive.namelist():
            stored.writestr(name, b"\x80\x02" + b"]" * 2**26 if name.endswith("data.pkl") else archive.read(name))
    # each has the sizes of what it holds, as torch would believe it
    bombs = [repacked(path, "pickle.ckpt", data_pkl=bytes(2**28)), repacked(path, "weight.ckpt", **{"0": bytes(2**28)})]
    told_within_memory(
        "from lit_cifar.run.read import read_checkpoint", "read_checkpoint(Path(path))", big, lists, *bombs
    )


def test_a_flipped_bit_of_a_checkpoint_is_seen(trained: Path) -> None:
    good = (trained / "checkpoints" / "last.ckpt").read_bytes()
    weights = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    path = Path("flipped.ckpt")
    num_told = 0
    for place in range(0, len(good), len(good) // 60):
        flipped = bytearray(good)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        try:
            read = read_checkpoint(path)["state_dict"]
        except UserError:
            num_told += 1
        else:  # it hit what no reader looks at, such as padding
            assert all(torch.equal(weight, weights[name]) for name, weight in read.items())
    assert num_told > 30


# ---- archives of images ----


def png(side: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 7, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


GOOD = {f"{split}/{name}/0.png": png() for split in ("train", "test") for name in ("ant", "zebra")}


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    kind = {".tar": "w", ".gz": "w:gz"}[path.suffix]
    with tarfile.open(path, kind, format=tarfile.GNU_FORMAT) as tar:  # type: ignore[call-overload]
        for name, data in GOOD.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return path


def file_in_tar(
    name: str, data: bytes, kind: bytes = tarfile.REGTYPE, target: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, target
    return member, data


OUTSIDE = (
    "../../train/ant/evil.png",
    "/train/ant/evil.png",
    "..\\..\\train\\ant\\evil.png",
    "C:\\train\\ant\\evil.png",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_outside_are_only_names(name: str) -> None:
    """They are left out or told, as hidden files and second trees are; whatever is read, no file is made of it."""
    Path("deep/er").mkdir(parents=True)
    tar_of(Path("deep/er/a.tar"), file_in_tar(name, png()))
    with zipfile.ZipFile("deep/er/a.zip", "w") as archive:
        for member, data in {**GOOD, name: png()}.items():
            archive.writestr(member, data)
    for path in (Path("deep/er/a.tar"), Path("deep/er/a.zip")):
        try:
            assert len(Tree(path).read(True).labels) in (2, 3)
        except UserError as error:
            if "more than one tree" not in str(error):
                raise
    made = {str(found) for found in Path().rglob("*") if found.is_file() and found.parts[0] != "cache"}
    assert made == {"deep/er/a.tar", "deep/er/a.zip"}
    assert not any(found.name == "evil.png" for found in Path("/train").rglob("*"))


def test_links_that_lead_out_and_devices_are_left_out() -> None:
    Path("secret.png").write_bytes(png())
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    targets = ("/etc/passwd", str(Path("secret.png").absolute()), "../../../../secret.png", "train/ant/0.png")
    members = [
        file_in_tar(f"train/ant/{kind.decode()}{number}.png", b"", kind, target)
        for kind in kinds
        for number, target in enumerate(targets)
    ]
    tar_of(Path("a.tar"), *members)
    with zipfile.ZipFile("a.zip", "w") as archive:
        for name, data in GOOD.items():
            archive.writestr(name, data)
        for mode in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO):
            info = zipfile.ZipInfo(f"train/ant/{mode}.png")
            info.external_attr = (mode | 0o777) << 16
            archive.writestr(info, str(Path("secret.png").absolute()))
    for name, num_images in (("a.tar", 3), ("a.zip", 2)):  # one hard link is to a member
        assert len(Tree(Path(name)).read(True).labels) == num_images
        assert Tree(Path(name)).read(True).images.unique().tolist() == [7]


def deflated(num_bytes: int, wbits: int) -> bytes:
    """So many zeros, to a million, packed in no time: a piece that can be repeated."""
    packer = zlib.compressobj(1, wbits=wbits)
    first = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + piece * (num_bytes // 2**20 - 1)


def test_archives_that_are_bombs_take_no_memory() -> None:
    understated = Path("understated.zip")  # a member that says it has some MB, and unpacks to 2 GiB
    data = deflated(2**31, -15)
    with zipfile.ZipFile(understated, "w") as archive:
        for name, content in GOOD.items():
            archive.writestr(name, content)
        archive.writestr("train/ant/bomb.png", data)
        place = archive.getinfo("train/ant/bomb.png").header_offset
    written = bytearray(understated.read_bytes())
    written[place + 8] = zipfile.ZIP_DEFLATED
    written[written.rindex(b"PK\1\2") + 10] = zipfile.ZIP_DEFLATED
    understated.write_bytes(written)
    paths = [understated]
    for name, kind in (("long_name", tarfile.GNUTYPE_LONGNAME), ("pax", tarfile.XHDTYPE)):
        header = tarfile.TarInfo("bomb")
        header.type, header.size = kind, 2**31 - 512
        packer = zlib.compressobj(1, wbits=31)
        start = packer.compress(header.tobuf(tarfile.GNU_FORMAT)) + packer.flush(zlib.Z_FULL_FLUSH)
        paths.append(Path(f"{name}.tar.gz"))
        paths[-1].write_bytes(start + data)
    told_within_memory("from lit_cifar.data.tree import Tree", "Tree(Path(path)).read(True)", *paths)
    told_within_memory(
        "from lit_cifar.data.source import find_source",
        "find_source(path, 'cifar10').read(True)",
        *paths[2:],
    )


def test_images_that_are_bombs_take_no_memory() -> None:
    claimed = bytearray(png())
    claimed[16:24] = struct.pack(">II", 50_000, 50_000)
    claimed[29:33] = struct.pack(">I", zlib.crc32(claimed[12:29]))
    paths = []
    for number, data in enumerate((bytes(claimed), bomb(50_000), bomb(13_000))):  # the last is small enough for Pillow
        paths.append(Path(f"{number}.tar"))
        tar_of(paths[-1], *(file_in_tar(f"train/ant/{copy}.png", data) for copy in "abcd"))
    told_within_memory("from lit_cifar.data.tree import Tree", "Tree(Path(path)).read(True)", *paths)


def test_an_image_is_not_given_to_another_program(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("started a program"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(canary) (w) file\n%%EOF\n"
    with pytest.raises(UserError, match="cannot be decoded as an image"):
        images.decode_image(eps)


# ---- configs ----


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch canary']",
        "model: !!python/object/apply:os.mkdir [canary]",
        "data: !!python/object/new:os.mkdir [canary]",
        "seed_everything: !!python/name:os.system",
        "model: !!python/module:this",
    ],
)
def test_a_config_makes_no_python_objects(text: str) -> None:
    Path("config.yaml").write_text(text)
    assert "config.yaml" in error_of(lit_cifar.fit.main, ["--config", "config.yaml"])


@pytest.mark.parametrize(
    "data", [b"\x80", "lr: é".encode("latin-1"), b"[" * 5000, b"model: " + b"{a: " * 3000, b"\0", b"&a [*a]"]
)
def test_a_config_of_other_bytes_is_told(data: bytes) -> None:
    Path("config.yaml").write_bytes(data)
    error_of(lit_cifar.fit.main, ["--config", "config.yaml", "--print_config"])
