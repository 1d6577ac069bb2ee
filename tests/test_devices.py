"""The same training and the same report on 1, 2 and 3 processes, which is what the project is for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHAPES, Run, scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import nn

from lit_cifar.model.module import LitClassifier
from lit_cifar.nets import Net, SpeedNet
from lit_cifar.run import stop
from lit_cifar.run.stop import MOST_APART, Agreement

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


@pytest.mark.slow
@pytest.mark.parametrize("num_test", [101, 2000])
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


# ---- norms on several GPUs ----


class ActiveNorm(nn.BatchNorm2d):
    """A norm with an activation of its own, as in timm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def exchanged_buffers(module: LitClassifier) -> set[str]:
    """Those that DDP broadcasts before each forward pass."""
    ignored = module._ddp_params_and_buffers_to_ignore
    return {name for name, _ in module.named_buffers() if name not in ignored}


def test_buffers_that_are_equal_on_all_ranks_are_not_broadcast_in_each_step() -> None:
    assert exchanged_buffers(LitClassifier(Net())) == set()
    module = LitClassifier(SpeedNet(widths=(8, 8, 8)))
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rpartition(".")[2] for name in exchanged_buffers(module)} == statistics, "as on a CPU"
    before = {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    module.synchronise_norms()
    assert sum(isinstance(norm, nn.SyncBatchNorm) for norm in module.modules()) == 6
    assert exchanged_buffers(module) == set()
    assert {name: id(tensor) for name, tensor in module.state_dict(keep_vars=True).items()} == before
    module.to(torch.bfloat16)  # which Lightning does for bf16-true, after this
    for norm in module.modules():
        if isinstance(norm, nn.SyncBatchNorm):
            assert {tensor.dtype for tensor in (norm.weight, norm.bias, norm.running_var)} == {torch.float32}


def test_norms_that_compute_in_their_own_way_are_not_replaced() -> None:
    group: Any = object()
    own = nn.SyncBatchNorm(4, process_group=group)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), own, ActiveNorm(4), nn.Flatten(), nn.LazyLinear(10))
    net[4].register_buffer("table", torch.zeros(3))
    module = LitClassifier(net)
    module.synchronise_norms()
    assert [type(layer) for layer in net[1:4]] == [nn.SyncBatchNorm, nn.SyncBatchNorm, ActiveNorm]
    assert net[2] is own
    assert own.process_group is group, "of some ranks, whose statistics differ from the others'"
    assert {name.split(".")[1] for name in exchanged_buffers(module)} == {"2", "3", "4"}


class SameOnAllRanks(Callback):
    """Checks a net with norms after it was trained on several GPUs."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert not trainer.strategy.model.modules_buffers, "DDP broadcasts nothing in a step"
        norms = [module for module in pl_module.modules() if isinstance(module, nn.SyncBatchNorm)]
        assert len(norms) == 6
        for norm in norms:
            for tensor in (norm.bias, *norm.buffers()):
                assert tensor.dtype in (torch.float32, torch.int64)
                lowest, highest = (
                    trainer.strategy.reduce(tensor.detach().clone().double(), reduce_op=op) for op in ("min", "max")
                )
                assert torch.equal(lowest, highest)
        print(f"rank {trainer.global_rank} is checked")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_norms_are_float32_and_equal_on_two_gpus(run_command: Run) -> None:
    net = ["--model.net", "SpeedNet", "--model.net.widths", "[8,8,8]", "--precision", "bf16-true"]
    flags = [*net, "--batch_size", "100", "--max_epochs", "1", "--trainer.callbacks+=test_devices.SameOnAllRanks"]
    done = run_command("lit_cifar.fit", "--dataset", "shapes", "--accelerator", "gpu", "--devices", "2", *flags)
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank} is checked" in done.stdout for rank in (0, 1))


# ---- agreement on signals ----


@pytest.fixture
def seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The clock that an Agreement looks at, in one process that is a group of ranks by itself."""
    now = [0.0]
    monkeypatch.setattr(stop.time, "perf_counter", lambda: now[0])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield now
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("step_seconds", "num_apart"), [(0.0001, MOST_APART), (0.01, 10), (1.0, 1)])
def test_ranks_confer_ten_times_a_second_and_not_after_each_step(
    step_seconds: float, num_apart: int, seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls, all_reduce = 0, torch.distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return all_reduce(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_reduce", counted)
    agreement = Agreement()

    def ask(*questions: bool, wait: bool = False) -> tuple[bool, bool]:
        seconds[0] += step_seconds
        return agreement.ask(*questions, wait=wait)

    assert not any(any(ask(False, False)) for _ in range(1000))
    assert num_calls == pytest.approx(1000 / num_apart, abs=4)
    answers = [ask(True, False) for _ in range(2 * num_apart)]
    assert (True, False) in answers, "within twice the time"
    assert ask(False, True, wait=True) == (False, True), "an epoch's end waits for the answer"
