"""The stress of `make test-stress`, short: trainings killed with SIGKILL at random moments end as if left alone."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import SHORT
from stress.kill import differences, stress

import lit_cifar.fit
from lit_cifar.run.folder import Run
from lit_cifar.run.logger import RunLogger


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "devices", "victim"),
    [
        ("onecycle", 1, "all"),
        ("transform", 1, "all"),
        ("onecycle", 2, "all"),
        ("onecycle", 2, "0"),
        ("onecycle", 2, "1"),
    ],
)
def test_a_killed_training_resumes_and_ends_the_same(recipe: str, devices: int, victim: str, tmp_path: Path) -> None:
    outcome = stress(tmp_path / "stress", recipe, devices, num_kills=3, victim=victim)
    assert outcome.faults == []
    assert sum(outcome.kills.values()) == outcome.resumed == 3


def test_the_stress_sees_what_a_resume_could_spoil() -> None:
    lit_cifar.fit.main([*SHORT, "--trainer.limit_train_batches", "60", "--trainer.log_every_n_steps", "20"])
    whole, run = Path("lightning_logs/version_0"), Path("lightning_logs/version_1")

    def spoilt() -> list[str]:
        found = differences(run, whole)
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        return found

    shutil.copytree(whole, run)
    assert spoilt() == []

    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1e-7
    torch.save(checkpoint, run / "checkpoints/last.ckpt")
    assert len(spoilt()) == 1

    (run / "results.json").write_text((run / "results.json").read_text().replace('"num_steps": 60', '"num_steps": 59'))
    assert spoilt() == [f"{run}: num_steps in results.json differs"]

    logger = RunLogger(Run(folder=Path("lightning_logs/version_1")), resumed_step=39)  # forgets steps 40 and later
    logger.log_metrics({"train/loss": 1.0}, step=40)
    logger.save()
    logger.finalize("success")
    found = spoilt()
    assert f"{run}: train/gradient_norm lacks steps [40, 60] and has [] besides" in found
    assert f"{run}: train/loss lacks steps [60] and has [] besides" in found

    (run / "checkpoints/.last.ckpt.x.part").touch()
    assert len(spoilt()) == 1
