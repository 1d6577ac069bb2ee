"""Where runs are: `lightning_logs/version_N`. What is in them is the callers'; commands that need no torch use this."""

import re
from pathlib import Path

RUNS = Path("lightning_logs")
RESULTS = "results.json"  # of a run that was tested
TRIAL = "trial.json"  # of a run that is a sweep's trial


class Run:
    """One run and its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}.ckpt"


def run_version(run: Path) -> int:
    """N of a folder version_N, -1 of any other."""
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match else -1


def run_folder(checkpoint: Path) -> Path | None:
    """The run's folder that a checkpoint lies in, version_N/checkpoints/*.ckpt; None for any other place."""
    folder = checkpoint.resolve().parent
    if folder.name != "checkpoints" or run_version(folder.parent) < 0:
        return None
    here = Path.cwd()
    return folder.parent.relative_to(here) if folder.is_relative_to(here) else folder.parent
