"""Where runs are: `lightning_logs/version_N`. What is in them is the callers'; commands that need no torch use this."""

import re
from pathlib import Path

RUNS = Path("lightning_logs")
RESULTS = "results.json"  # of a run that was tested
TRIAL = "trial.json"  # of a run that is a sweep's trial


def run_version(run: Path) -> int:
    """N of a folder version_N, -1 of any other."""
    match = re.fullmatch(r"version_(\d+)", run.name)
    return int(match[1]) if match else -1
