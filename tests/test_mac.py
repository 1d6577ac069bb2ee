"""A Mac without a Mac: the commands on a pretended mps, which refuses what Apple's mps refuses."""

import json
from pathlib import Path

import pytest
from pretend import mps_kernels, pretended

import lit_cifar.fit
from lit_cifar.training.dashboard import Dashboard

SHORT = ["--dataset", "shapes", "--batch_size", "50", "--data.eval_batch_size", "50"]
FEW = ["--trainer.max_steps", "4", "--trainer.limit_test_batches", "2"]


@pytest.mark.parametrize("before_2_9", [False, True], ids=["newest torch", "torch 2.8"])
def test_the_tutorials_recipe_trains_and_tests_on_mps(before_2_9: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dashboard, "on_fit_start", lambda *given: None)  # torch's tracer goes past the pretence
    with pretended("mps", before_2_9=before_2_9, mps_kernels=mps_kernels()) as device:
        lit_cifar.fit.main([*SHORT, *FEW])
    assert sum(device.launches.values()) > 100, "the device did the work"
    assert not device.without_mps
    (results,) = Path().glob("lightning_logs/version_*/results.json")
    assert json.loads(results.read_text())["num_test"] == 100
