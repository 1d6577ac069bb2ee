"""A run and its folder: which folder is this run's, and what the files in it are called. What is in them is up to those
who write them: save.py, logger.py, results/report.py. It needs no torch, so that `runs` starts at once."""

import contextlib
import itertools
import json
import os
import re
import uuid
from pathlib import Path

from lit_cifar.errors import UserError
from lit_cifar.files import move, read_json, write_durably
from lit_cifar.run.lock import FolderLock, is_locked

RUNS = Path("lightning_logs")
RESULTS = "results.json"
TRIAL = "trial.json"
CHECKPOINTS = "checkpoints"
IDENTITY = "run.json"
LOCK = "run.lock"
LOGGERS = "loggers.json"


class Run:
    """One training run: its identity, its folder, and the names of the files in it.

    Everything that writes asks the run where, and nothing asks a logger. A new run takes `lightning_logs/version_N` by
    `claim`. A resumed run goes on in the folder that its checkpoint lies in, see `of`.

    Args:
        root: the folder in which a new run finds or makes `lightning_logs`.
        folder: the folder of a run that exists.
        identity: what the folder and each state of this run carry, so that no file of another run passes for one of
            this run's; None for runs of version 0.1.0, which had none.
    """

    def __init__(self, root: Path = Path(), folder: Path | None = None, identity: str | None = None) -> None:
        self.root = root
        self.identity = identity
        self._folder = folder
        self._lock: FolderLock | None = None
        self.closing = contextlib.ExitStack()  # of what is open while this process has the folder
        self.started = 0.0  # when this process began its piece of the run, on time.perf_counter's clock
        self.earlier: list[dict[str, float]] = []  # seconds of the pieces that other processes trained, as far as known

    @classmethod
    def new(cls, root: Path) -> "Run":
        """A run that begins; it has no folder before `claim`."""
        return cls(root, identity=uuid.uuid4().hex)

    @classmethod
    def of(cls, checkpoint: Path, identity: str | None) -> "Run | None":
        """The run whose folder, wherever it is, holds a checkpoint as `checkpoints/NAME.ckpt`.

        Links are not followed: a run goes on under the name by which it was found.

        Args:
            checkpoint: the path of a state.
            identity: the run that the state belongs to.

        Returns:
            None where the file lies in no run's folder, or in that of another run.
        """
        folder = Path(os.path.abspath(checkpoint)).parent
        if folder.name != CHECKPOINTS:
            return None
        folder = folder.parent
        if read_identity(folder) != identity or (identity is None and not (folder / "config.yaml").is_file()):
            return None
        here = Path.cwd()
        return cls(folder=folder.relative_to(here) if folder.is_relative_to(here) else folder, identity=identity)

    @property
    def is_claimed(self) -> bool:
        return self._folder is not None

    @property
    def folder(self) -> Path:
        """The run's folder, known on rank 0 after `claim` and on the other ranks from the callbacks' `setup` on."""
        assert self._folder is not None, "claim() comes first"
        return self._folder

    def claim(self) -> None:
        """Takes the run's folder, which no other process can take before `unlock`: its own one if it has one, else the
        first free `lightning_logs/version_N`, by making it, so that two runs never share one.

        Raises:
            UserError: another process trains this run, or the folder cannot be made or written.
        """
        if self._folder is None:
            self._make_folder()
        if self._lock is None:
            self._lock = FolderLock(self.folder / LOCK)
        self._lock.acquire()

    def unlock(self) -> None:
        """Closes what is open, and lets other processes take the folder again."""
        self.closing.close()
        if self._lock is not None:
            self._lock.release()

    @property
    def is_in_use(self) -> bool:
        """Whether a process, this one or another, has claimed the folder."""
        return is_locked(self.folder / LOCK)

    def _make_folder(self) -> None:
        runs = self.root / RUNS
        try:
            runs.mkdir(parents=True, exist_ok=True)
            first = max((run_version(run) for run in runs.iterdir()), default=-1) + 1
            for version in itertools.count(first):
                with contextlib.suppress(FileExistsError):  # another run took it just now
                    (runs / f"version_{version}").mkdir()
                    self._folder = runs / f"version_{version}"
                    break
            write_durably(self.folder / IDENTITY, (json.dumps({"identity": self.identity}) + "\n").encode())
        except OSError as error:
            raise UserError(
                f"cannot make a folder for the run in {runs} ({error.strerror}): make it a folder that can be "
                "written, or choose another place with --trainer.default_root_dir"
            ) from None

    def release(self) -> None:
        """Undoes `claim`, for a run that did not begin: removes a folder that nothing was written into."""
        self.unlock()
        if self._folder is not None and [path.name for path in self._folder.iterdir()] == [IDENTITY]:
            with contextlib.suppress(OSError):  # other runs are in the last one; on Windows somebody may look into one
                (self._folder / IDENTITY).unlink()
                self._folder.rmdir()
                self._folder.parent.rmdir()
            self._folder = self._lock = None

    def adopt(self, folder: str, identity: str | None) -> None:
        """Takes over what rank 0 claimed."""
        self._folder, self.identity = Path(folder), identity

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def results(self) -> Path:
        return self.folder / RESULTS

    @property
    def tested_step(self) -> int | None:
        """Steps of the state that `results` are of; None where there are none."""
        num_steps = read_json(self.results).get("num_steps")
        return num_steps if type(num_steps) is int else None

    def set_results_aside(self) -> None:
        """Before a newer state is saved: the results of before become `results-N.json`, with N steps.

        Raises:
            OSError: the folder cannot be written.
        """
        if not self.results.is_file():
            return
        num_steps = self.tested_step or 0
        aside, number = self.folder / f"results-{num_steps}.json", 1
        while os.path.lexists(aside):
            number += 1
            aside = self.folder / f"results-{num_steps}-{number}.json"
        move(self.results, aside)

    @property
    def loggers(self) -> Path:
        """Under what the loggers have begun, for a resumed run's to go on."""
        return self.folder / LOGGERS

    @property
    def trial(self) -> Path:
        """What a sweep knows of the run."""
        return self.folder / TRIAL

    def checkpoint(self, name: str) -> Path:
        """A state: 'last' is the newest, 'best' the best in validation, 'final' the end's where it is not the last."""
        return self.folder / CHECKPOINTS / f"{name}.ckpt"


def read_identity(folder: Path) -> str | None:
    """The identity of the run whose folder this is; None where there is none."""
    identity = read_json(folder / IDENTITY).get("identity")
    return identity if isinstance(identity, str) else None


def run_version(run: Path) -> int:
    """N of a folder version_N, -1 of any other."""
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match else -1
