"""The data under fire, in small: tests/stress/mirrors.py has the servers, the kills and the full disks."""

import sys
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "tests" / "stress"))

import mirrors


@pytest.mark.slow
def test_processes_that_start_at_once_train_on_one_download_of_six_bad_mirrors(tmp_path: Path) -> None:
    mirrors.six_mirrors(tmp_path, num_processes=3)


@pytest.mark.slow
def test_a_download_that_is_killed_over_and_over_asks_for_no_byte_twice(tmp_path: Path) -> None:
    mirrors.kills(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not mirrors.can_mount(), reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_got_over(tmp_path: Path) -> None:
    mirrors.full_disk(tmp_path)
