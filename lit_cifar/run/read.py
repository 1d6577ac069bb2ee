"""Finds states, and nets that export wrote or that come with the package, and reads them without running code that may
be in the file. check.py says whether this training could have saved a state; trust.py judges the classes it names."""

import json
import os
import pickle
import pickletools
import re
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any, cast

import torch
from packaging.version import Version

from lit_cifar import log
from lit_cifar.errors import UserError
from lit_cifar.files import open_regular
from lit_cifar.run.check import first_mismatch
from lit_cifar.run.folder import CHECKPOINTS, RUNS, run_version
from lit_cifar.run.trust import is_plain
from lit_cifar.text import nearest

TRAINED = Path(__file__).parents[1] / "trained"  # the folder of the nets that come with the package
OF_ORDER = ("dataset", "batch_size", "num_val", "drop_last", "augment")  # of the data: what makes a batch
MAX_PICKLE_BYTES = 2**22  # of a checkpoint, without its tensors; a small run's is 10 to 100 kB
# what states are compared with: sums and counts,
RUNNING_LOSS = {window: [0.0, 0] for window in ("logged", "printed", "epoch")}
GPU_RANDOM_STATE = torch.zeros(16, dtype=torch.uint8)  # and with torch.cuda's


class State(dict[str, Any]):
    """The content of a checkpoint: what Lightning saves, and by name what lit_cifar adds to it."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    @property
    def step(self) -> int:
        """How many optimiser steps the run had taken."""
        return int(self["global_step"])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return cast(dict[str, torch.Tensor], self["state_dict"])

    @property
    def is_net(self) -> bool:
        """Whether it is a net alone, from which no training run can go on."""
        return "loops" not in self

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings; in a checkpoint that no command wrote those of the module and of CIFAR10DataModule."""
        config: dict[str, Any] = self["lit_cifar"].get("config") or {}
        theirs = self.get("datamodule_hyper_parameters")
        if "data" not in config and isinstance(theirs, dict) and theirs.keys() >= {*OF_ORDER, "seed", "mirrors"}:
            return {**config, "data": {key: theirs[key] for key in OF_ORDER}, "seed_everything": theirs["seed"]}
        return config

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self["lit_cifar"].get("classes", ()))

    @property
    def recipe(self) -> str | None:
        return cast(str | None, self["lit_cifar"].get("recipe"))

    @property
    def chosen(self) -> dict[str, Any]:
        """What save.py's Checkpoints knew: the run's identity, and which state was the best."""
        return cast(dict[str, Any], self.get("callbacks", {}).get("Checkpoints", {}))

    @property
    def identity(self) -> str | None:
        """The run that the state belongs to; None for one of version 0.1.0."""
        return self.chosen.get("run")


def find_checkpoint(resume: str, save_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means: a file, a run's folder, or for 'auto' and 'if-any' that of the newest run.

    In a folder, the newest state that is whole: one that is cut short is named and passed over for the one before.
    None for 'if-any' where no run has a checkpoint.

    Raises:
        UserError: there is none, or none that is whole.
    """
    if resume not in ("auto", "if-any"):
        path = Path(resume)
        if states_of(path):
            return _newest_whole(path, resume)
        if not _is_file(path) and resume not in trained_nets():
            raise UserError(
                f"--resume {resume}: no such checkpoint; name a .ckpt file, a run's folder, 'auto' or 'if-any'"
            )
        return path
    runs = sorted((save_dir / RUNS).glob("version_*"), key=run_version, reverse=True)
    for run in runs:
        if states_of(run):
            return _newest_whole(run, resume)
    if resume == "if-any":
        return None
    raise UserError(f"--resume auto: no run in {save_dir / RUNS} has a checkpoint; start one without --resume")


def states_of(run: Path) -> list[Path]:
    """The files of a run's newest states, the newest first."""
    found = [run / CHECKPOINTS / "last.ckpt", *(run / CHECKPOINTS).glob("last-*.ckpt")]
    ages = {path: int(age[1]) if (age := re.search(r"-(\d+)$", path.stem)) else 0 for path in found}
    return sorted(filter(_is_file, found), key=ages.__getitem__)


def _is_file(path: Path) -> bool:
    """As Path.is_file, which from Python 3.14 on is False too where a path is too long or may not be looked at."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _newest_whole(run: Path, resume: str) -> Path:
    for path in states_of(run):
        try:
            read_checkpoint(path)
        except UserError as error:
            if log.rank() == 0:
                log.warn(f"{error}: passed over")
        else:
            return path
    raise UserError(f"--resume {resume}: {run} has no checkpoint that is whole; start anew without --resume")


def trained_nets() -> dict[str, Path]:
    """The files of the nets that come with the package, by name."""
    return {path.stem: path for path in sorted(TRAINED.glob("*.safetensors"))}


def read_checkpoint(path: Path) -> State:
    """Reads a checkpoint of ours, without running code that may be in the file (weights_only).

    Its checksums are right, it takes no more memory than its size, and what `on_save_checkpoint` of the module put into
    it is of the right types.

    Args:
        path: a checkpoint, or a net that `export` wrote as .safetensors. Where it is no file, the net of this name that
            comes with the package.

    Raises:
        UserError: it is missing, cut short, or something else.
    """
    try:
        if not os.path.lexists(path) or os.path.isdir(path):
            path = trained_nets().get(str(path), path)
        checkpoint = _read_net(path)
        if checkpoint is None:
            _check_records(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        nets = trained_nets()
        raise UserError(
            f"no checkpoint {path}{nearest(str(path), nets)}; name a .ckpt or .safetensors file, or a net that comes "
            f"with lit_cifar: {', '.join(nets)}"
        ) from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    except Exception as error:  # torch.load raises almost anything on bytes it does not know
        raise UserError(
            f"{path} is no checkpoint, or was cut short or damaged ({type(error).__name__}); name another one"
        ) from None
    if not _is_ours(checkpoint):
        raise UserError(f"{path} is not a checkpoint of lit_cifar; name one from lightning_logs/*/checkpoints")
    return State(checkpoint, path)


def _read_net(path: Path) -> dict[str, Any] | None:
    """What a .safetensors file holds that `export` wrote, as a checkpoint of weights alone would; None of other files.

    Raises:
        Exception: anything, of a file that is damaged.
    """
    with open_regular(path) as file:
        begin = file.read(9)
        if begin[8:] != b"{":
            return None
        if int.from_bytes(begin[:8], "little") > MAX_PICKLE_BYTES:
            raise ValueError
        file.seek(0)
        data = file.read()
    import safetensors.torch

    weights = safetensors.torch.load(data)
    header, body = parts_of(data)
    metadata = header.get("__metadata__", {})
    if "crc32" in metadata and metadata["crc32"] != checksum(header, body):
        raise ValueError
    found = {key: json.loads(metadata[key]) for key in ("classes", "config", "recipe", "num_steps") if key in metadata}
    content = {"state_dict": weights, "global_step": found.pop("num_steps", 0), "pytorch-lightning_version": "2"}
    return content | ({"lit_cifar": found} if found else {})


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A .safetensors file's header, and the bytes of its tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def checksum(header: dict[str, Any], body: bytes) -> str:
    """Of a .safetensors file, which has none by itself; `export` puts it into the metadata as crc32."""
    metadata = {key: value for key, value in header["__metadata__"].items() if key != "crc32"}
    text = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return str(zlib.crc32(body, zlib.crc32(text.encode())))


def _check_records(path: Path) -> None:
    """Raises unless the file is as torch.save writes it: a zip, stored, with right sums, and a pickle of a sane size.

    torch.load looks at none of this: it unpacks what is packed, and lets a flipped bit of a weight pass.
    """
    with open_regular(path) as file:
        if file.read(4) != b"PK\3\4":
            raise zipfile.BadZipFile
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise zipfile.BadZipFile
            if sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile
            for record in records:
                if record.filename.endswith("/data.pkl"):
                    if record.file_size > MAX_PICKLE_BYTES:
                        raise zipfile.BadZipFile
                    _check_pickle(archive.read(record))
            if archive.testzip() is not None:
                raise zipfile.BadZipFile


def _check_pickle(data: bytes) -> None:
    """bytearray is the one function that torch's unpickler would call with a size that needs no bytes in the file."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and "bytearray" in str(argument):  # the only opcode that brings torch a function
            raise pickle.UnpicklingError


def _is_ours(checkpoint: Any) -> bool:
    """Whether all that is read of a checkpoint, here and elsewhere, is of the right types."""
    try:
        ours, states = checkpoint["lit_cifar"], checkpoint.get("callbacks", {})
        config, running = ours.get("config") or {}, checkpoint.get("running_loss", {})
        chosen = states.get("Checkpoints", {"random_states": []})
        weights, classes = checkpoint["state_dict"], ours.get("classes", [])
        return (
            first_mismatch(checkpoint["global_step"], 0) is None
            and all(isinstance(name, str) and isinstance(one, torch.Tensor) for name, one in weights.items())
            and isinstance(classes, list)
            and all(isinstance(name, str) for name in classes)
            and all(isinstance(config.get(section, {}), dict) for section in ("model", "data", "trainer", "checkpoint"))
            and is_plain(ours)
            and is_plain(checkpoint, (torch.Tensor, tuple))
            and Version(checkpoint["pytorch-lightning_version"]) >= Version("2")  # there are none of ours of version 1
            and first_mismatch({**RUNNING_LOSS, **running}, RUNNING_LOSS) is None  # version 0.1.0 counted less
            and all(isinstance(state, dict) for state in states.values())
            and isinstance(chosen.get("best_score"), (float, type(None)))
            and (chosen.get("best_step") is None or first_mismatch(chosen["best_step"], 0) is None)
            and isinstance(chosen.get("run"), (str, type(None)))
            and isinstance(chosen["random_states"], list)
            and all(map(_is_random_state, chosen["random_states"]))
        )
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False


def _is_random_state(state: Any) -> bool:
    """Whether `set_random_state` takes it, on any machine; raises what torch does where it is not the CPU's."""
    torch.Generator().set_state(state["cpu"])
    mps = state.get("mps", GPU_RANDOM_STATE)  # whose length is a matter of torch's version
    gpu = state.get("cuda", GPU_RANDOM_STATE)
    # CUDA's is a seed and an offset of 8 bytes each, and the offset a multiple of 4
    is_gpus = first_mismatch(gpu, GPU_RANDOM_STATE) is None and gpu.dtype == torch.uint8 and int(gpu[8]) % 4 == 0
    return is_gpus and isinstance(mps, torch.Tensor) and mps.ndim == 1 and mps.dtype == torch.uint8
