"""The same training and the same report on 1, 2 and 3 processes, which is what the project is for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHAPES, Run, scalars
from PIL import Image

STEPS = ["--trainer.max_steps", "200", "--trainer.log_every_n_steps", "1", "--batch_size", "6"]


def test_training_losses_agree_step_by_step_on_1_2_and_3_processes(run_command: Run) -> None:
    losses = []
    for version, devices in enumerate((1, 2, 3)):
        done = run_command("lit_cifar.fit", *SHAPES, *STEPS, "--devices", devices)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("global batch 6") == devices
        for rank in range(devices):
            share = 6 // devices
            line = f"rank {rank} of {devices} on cpu: input ({share}, 3, 32, 32), output ({share}, 10), global batch 6"
            assert done.stdout.count(line) == 1
        assert done.stdout.count("Accuracy on the 2,000 test images") == 1
        steps, values = zip(*scalars(f"version_{version}")["train/loss"], strict=True)
        assert list(steps) == list(range(1, 201))
        losses.append(torch.tensor(values, dtype=torch.float64))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-5, atol=0)


def test_a_short_last_batch_counts_as_on_one_process(run_command: Run, small_tree: Path) -> None:
    # 52 images in batches of 6 leave 4, which 3 ranks share as 2, 1, 1
    args = ["--data_dir", small_tree, "--accelerator", "cpu", "--batch_size", "6", "--max_epochs", "3", "--lr", "0.01"]
    weights = []
    for version, devices in enumerate((1, 3)):
        done = run_command("lit_cifar.fit", *args, "--model.net.num_classes", "4", "--devices", devices)
        assert done.returncode == 0, done.stderr
        path = f"lightning_logs/version_{version}/checkpoints/last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["global_step"] == 27
        weights.append(checkpoint["state_dict"])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """An image tree of 4 classes with 13 training images each, and 101 test images in all."""
    random = np.random.RandomState(0)
    for part, nums in (("train", (13, 13, 13, 13)), ("test", (26, 25, 25, 25))):
        for label, num in enumerate(nums):
            folder = tmp_path / "tree" / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(num):
                pixels = random.randint(0, 256, (32, 32, 3)).astype(np.uint8)
                pixels[:, :, label % 3] //= 1 + label
                Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return tmp_path / "tree"


@pytest.mark.parametrize("num_test", [101, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_checkpoint_gives_the_same_report_on_1_2_and_3_processes(
    num_test: int, run_command: Run, small_tree: Path
) -> None:
    data = ["--data_dir", small_tree, "--model.net.num_classes", "4"] if num_test == 101 else ["--dataset", "shapes"]
    args = ["--accelerator", "cpu", "--batch_size", "13", "--max_epochs", "1", "--lr", "0.01"]
    assert run_command("lit_cifar.fit", *data, *args).returncode == 0
    reports: list[dict[str, Any]] = []
    for devices in (1, 2, 3):
        output = f"on{devices}.json"
        ckpt = ["--ckpt_path", "lightning_logs/version_0/checkpoints/last.ckpt", "--output", output]
        # batches of 7 make ranks end on batches of different sizes
        done = run_command(
            "lit_cifar.test", *ckpt, "--devices", devices, "--accelerator", "cpu", "--data.eval_batch_size", "7"
        )
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(Path(output).read_text()))
    for report in reports:
        assert report["num_test"] == num_test == sum(map(sum, report["confusion_matrix"]))
        assert report["confusion_matrix"] == reports[0]["confusion_matrix"]
        assert report["loss"] == pytest.approx(reports[0]["loss"], rel=1e-6)
    assert [report["devices"] for report in reports] == [1, 2, 3]


def test_validation_in_fit_scores_every_image_once_on_2_processes(run_command: Run) -> None:
    args = [*SHAPES, "--batch_size", "50", "--max_epochs", "1", "--data.num_val", "333", "--lr", "0"]
    for devices in (1, 2):
        assert run_command("lit_cifar.fit", *args, "--devices", devices).returncode == 0
    one, two = (dict(scalars(f"version_{version}")) for version in (0, 1))
    assert one["val/accuracy"] == two["val/accuracy"]
    num_correct = one["val/accuracy"][0][1] * 333
    assert num_correct == pytest.approx(round(num_correct), abs=1e-3)


def test_it_runs_under_torchrun(run_command: Run) -> None:
    args = [*SHAPES, "--batch_size", "50", "--max_epochs", "1", "--devices", "2"]
    done = run_command("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lit_cifar.fit", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Accuracy on the 2,000 test images") == 1
    assert "rank 1 of 2 on cpu: input (25, 3, 32, 32)" in done.stdout


def test_a_batch_that_ranks_cannot_share_ends_in_one_line(run_command: Run) -> None:
    done = run_command("lit_cifar.fit", *SHAPES, "--batch_size", "7", "--devices", "2")
    assert done.returncode == 2
    assert done.stderr == (
        "lit_cifar: error: --batch_size 7 cannot be shared by 2 devices evenly: the nearest that works is 6\n"
    )
