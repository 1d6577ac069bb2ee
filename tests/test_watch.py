"""Warnings and other lines of a training run: each is printed once, by one rank, at the level asked for."""

import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import SHAPES, Run, followed
from lightning.pytorch import Trainer

import lit_cifar.fit
from lit_cifar import clock, log
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.errors import DivergedError
from lit_cifar.model.module import LitClassifier
from lit_cifar.nets import Net
from lit_cifar.text import in_command
from lit_cifar.training.progress import Progress
from lit_cifar.training.speed import Pace, Speed
from lit_cifar.training.watch import IN_A_ROW, Watch

STEPS = [*SHAPES, "--batch_size", "8", "--trainer.log_every_n_steps", "5"]
WARNING = "lit_cifar: warning: "


def _callback(name: str, **arguments: object) -> list[str]:
    flags = [f"--trainer.callbacks=faults.{name}"]
    return flags + [f"--trainer.callbacks.{key}={value}" for key, value in arguments.items()]


def _warnings(text: str) -> list[str]:
    return [line.removeprefix(WARNING) for line in text.splitlines() if line.startswith(WARNING)]


def test_an_exploding_loss_is_told_once_with_the_step_and_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.fit.main([*STEPS, "--trainer.max_steps", "30", *_callback("ScaleWeights", step=12, factor=5.0)])
    (warning,) = _warnings(capsys.readouterr().err)
    assert re.match(r"the loss is [\d.]+ at step 15, where guessing costs 2\.303: .*--lr", warning)


def test_gradients_that_are_not_finite_end_the_training_before_the_loss_shows_them() -> None:
    with pytest.raises(DivergedError, match=r"gradients are not finite at step 10 \(epoch 1\).*smaller --lr"):
        lit_cifar.fit.main([*STEPS, "--trainer.max_steps", "30", *_callback("SpoilGradients", step=10)])


def test_gradients_spoilt_between_logged_steps_are_seen_in_the_next_loss() -> None:
    with pytest.raises(DivergedError, match=r"the loss is not finite at step 9 \(epoch 1, batch 9\)"):
        lit_cifar.fit.main([*STEPS, "--trainer.max_steps", "30", *_callback("SpoilGradients", step=8)])


def test_a_loader_that_starves_the_net_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    slow = '[{"class_path": "faults.SlowTransform", "init_args": {"seconds": 0.01}}]'
    # made by the process itself, one after the other: 8 images take 80 ms or more on whatever machine
    flags = ["--data.transform", slow, "--data.num_workers", "0"]
    lit_cifar.fit.main([*STEPS, "--trainer.max_steps", "25", *flags])
    (warning,) = _warnings(capsys.readouterr().err)
    found = re.match(r"a step waits ([\d.]+) of its ([\d.]+) ms for images \(step (\d+)\): (.*)", warning)
    assert found
    wait_ms, step_ms, step = map(float, found.groups()[:3])
    assert 80 <= wait_ms <= step_ms
    assert step == 5 * IN_A_ROW
    assert found[4].startswith("raise --data.num_workers, which is 0 on")


@pytest.mark.parametrize(
    ("num_workers", "num_cores", "way_out"),
    [(None, 8, "less --data.augment"), (2, 8, "raise --data.num_workers"), (8, 8, "cheaper --data.transform")],
)
def test_what_to_do_about_a_loader_depends_on_what_it_has(
    num_workers: int | None, num_cores: int, way_out: str
) -> None:
    watch = Watch()
    told = [watch.data(step, 30.0, 50.0, num_workers, num_cores) for step in range(IN_A_ROW)]
    assert told[:-1] == [None] * (IN_A_ROW - 1)
    assert way_out in str(told[-1])


def test_a_full_disk_is_told_once_before_it_is_full(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=51_000_000))
    lit_cifar.fit.main([*STEPS, "--trainer.max_steps", "40", "--checkpoint.every_n_train_steps", "12"])
    (warning,) = _warnings(capsys.readouterr().err)
    size = Path("lightning_logs/version_0/checkpoints/last.ckpt").stat().st_size / 1e6
    # 51 MB are enough until there is a checkpoint, of which three must have room beside the rest
    assert re.match(rf"51 MB are left on the disk of .*, and a checkpoint takes {size:.1f} MB \(step 15\)", warning)


@in_command()
def test_without_a_runs_folder_no_disk_is_watched_and_no_state_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    trainer = Trainer(
        max_steps=50,
        log_every_n_steps=5,
        limit_val_batches=0,
        callbacks=[Progress()],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(DivergedError, match=r"not finite.*: choose a smaller --lr$"):
        trainer.fit(LitClassifier(Net(), lr=1e6), datamodule=CIFAR10DataModule(dataset="shapes", batch_size=8))
    output = capsys.readouterr()
    assert "training 62,006 parameters\n" in output.out
    assert "disk" not in output.err


def test_a_speed_leaves_out_pauses_and_counts_each_wait_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now))
    clock.reset()
    stopwatch = Speed()
    for now in (0.0, 10.0):  # two batches of 2 seconds, 8 seconds apart
        clock.start("steps")
        clock.start("steps")
        now += 2
        stopwatch.count()
        clock.stop("steps")
    pace = stopwatch.read(waited_seconds=1.0)
    assert pace == Pace(num_batches=2, seconds=4.0, wait_seconds=1.0)
    assert pace.figures(batch_size=8, batches_per_step=3) == {
        "speed/images_per_second": 4.0,
        "speed/step_ms": 6000.0,
        "speed/data_wait_ms": 500.0,
    }
    assert stopwatch.read(waited_seconds=1.5) == Pace(num_batches=0, seconds=0.0, wait_seconds=0.5)


def test_a_healthy_training_is_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.fit.main([*STEPS, "--trainer.max_steps", "60"])
    assert capsys.readouterr().err == ""


def test_the_rank_that_the_others_wait_for_is_named_once_by_the_first(run_command: Run) -> None:
    slow = '[{"class_path": "faults.SlowTransform", "init_args": {"seconds": 0.02, "rank": 1}}]'
    flags = [*STEPS, "--trainer.max_steps", "30", "--data.transform", slow, "--data.num_workers", "0", "--devices", "2"]
    done = run_command("lit_cifar.fit", *flags)
    assert done.returncode == 0, done.stderr
    (warning,) = _warnings(done.stderr)
    host = re.escape(socket.gethostname())
    found = re.match(
        rf"rank 1 on {host} takes ([\d.]+) ms for what the other ranks do in ([\d.]+) ms, and all", warning
    )
    assert found
    assert float(found[1]) >= 80, "4 images of 20 ms, and the forward pass"
    assert float(found[1]) > float(found[2])
    assert f"wait for it (step {5 * IN_A_ROW})" in warning


@pytest.mark.parametrize("devices", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_lines_are_plain_where_the_output_is_no_terminal_and_none_is_said_twice(devices: str, run_command: Run) -> None:
    done = run_command("lit_cifar.fit", *STEPS, "--trainer.max_steps", "40", "--devices", devices)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stdout)
    said = [line for line in done.stdout.splitlines() if line and not line.startswith("[Gloo]")]  # of torch 2.8
    assert len(said) == len(set(said))
    ranks = sorted(line.split()[1] for line in said if line.startswith("rank "))
    assert ranks == [str(rank) for rank in range(int(devices))]


def test_a_training_whose_lines_nobody_reads_on_ends_without_a_traceback() -> None:
    with followed("lit_cifar.fit", *STEPS, "--running_loss.every_n_steps", "10") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "training 62,006 parameters" in process.stdout.readline()
        process.stdout.close()  # as `head -1` does
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


@pytest.mark.slow
@pytest.mark.parametrize("level", log.LEVELS)
def test_the_level_decides_what_is_said_and_results_are_always(level: str, run_command: Run) -> None:
    flags = [*STEPS, "--trainer.max_steps", "30", *_callback("ScaleWeights", step=12, factor=5.0)]
    done = run_command("lit_cifar.fit", *flags, "--log_level", level)
    assert done.returncode == 0, done.stderr
    assert "Accuracy on the 2,000 test images" in done.stdout
    assert ("training 62,006 parameters" in done.stdout) == (level in ("debug", "info"))
    assert ("rank 0 of 1" in done.stdout) == (level in ("debug", "info"))
    assert len(_warnings(done.stderr)) == (0 if level == "error" else 1)
    assert ("GPU available" in done.stdout + done.stderr) == (level == "debug"), "Lightning's notes"


def test_an_unknown_level_is_refused(run_command: Run) -> None:
    done = run_command("lit_cifar.fit", *STEPS, "--log_level", "loud")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "log_level" in done.stderr


@pytest.mark.parametrize(
    ("args", "local_rank", "told"),
    [
        (["--data_dir", "no-such.zip"], "0", True),
        (["--data_dir", "no-such.zip"], "1", False),
        (["--no-such-flag", "1"], "0", False),
    ],
    ids=["data of another node", "data of a node whose first process tells it", "flags, which all nodes have alike"],
)
def test_what_is_wrong_on_another_node_is_told_by_its_first_process(
    args: list[str], local_rank: str, told: bool, run_command: Run
) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "GROUP_RANK": "1", "RANK": "2"}
    done = run_command("lit_cifar.fit", *args, LOCAL_RANK=local_rank, **torchrun)
    assert done.returncode == 2
    start = f"lit_cifar: error: rank 2 on {socket.gethostname()}: there is no archive no-such.zip"
    assert done.stderr.startswith(start) if told else done.stderr == ""
    assert len(done.stderr.splitlines()) == told


@pytest.mark.parametrize(
    ("variables", "who"),
    [
        ({}, ""),
        ({"RANK": "3", "LOCAL_RANK": "1", "SLURM_PROCID": "2"}, ""),  # left by a pod, say: nobody launched this one
        ({"RANK": "3", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, "rank 3: "),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, "rank 2: "),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, ""),
        ({"LOCAL_RANK": "1", log.CHILD_VARIABLE: ""}, "rank 1: "),  # started by fit
    ],
)
def test_other_ranks_say_who_they_are(
    variables: dict[str, str], who: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_known", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    log.tell("decoded")
    log.warn("passed over")
    assert capsys.readouterr().err == f"{who}decoded\nlit_cifar: warning: {who}passed over\n"
    log.set_rank(5, 1)  # the Trainer knows better
    log.tell("decoded")
    assert capsys.readouterr().err == "rank 5: decoded\n"


def test_a_rank_lags_when_it_is_the_same_one_again_and_again() -> None:
    hosts = ["a", "b", "c"]
    slow = [[10.0, 40.0, 12.0], [10.0, 12.0, 40.0]]
    watch = Watch()
    assert not any(watch.ranks(step, slow[step % 2], 80.0, hosts) for step in range(20)), "now one, now another"
    watch = Watch()
    told = [watch.ranks(step, slow[0], 80.0, hosts) for step in range(1, 20)]
    assert [step for step, warning in enumerate(told, 1) if warning] == [IN_A_ROW]
    assert "rank 1 on b takes 40.0 ms for what the other ranks do in 11.0 ms" in str(told[IN_A_ROW - 1])
    assert not any(watch.ranks(step, [1.0, 1.6, 1.1], 80.0, hosts) for step in range(20)), "too little to matter"
