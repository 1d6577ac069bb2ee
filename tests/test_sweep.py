"""A sweep's trials are runs of fit, its test set is read once at the end, and killing it changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from helpers import ROOT, assert_same_run, results, scalars, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import lit_cifar.fit
from lit_cifar import runs, sweep
from lit_cifar.cli.command import CLI
from lit_cifar.cli.parser import Parser
from lit_cifar.cli.study import STUDY, distribution, read_space
from lit_cifar.data import shapes
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError
from lit_cifar.run.save import Checkpoints

optuna = pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'lit_cifar[sweep]'")

CONFIG = str(ROOT / "configs/tutorial.yaml")
FLAGS = ["--dataset", "shapes", "--accelerator", "cpu", "--data.num_val", "200", "--trainer.limit_train_batches", "3"]
SPACE = "model.lr: {low: 1e-3, high: 0.1, log: true}\nbatch_size: {choices: [16, 100]}\n"
FLAGS_OF_3_EPOCHS = [*FLAGS, "--max_epochs", "3", "--batch_size", "100"]


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which images were read, True for training."""
    drawn, calls = shapes.draw_shapes, []

    def draw(train: bool) -> Split:
        calls.append(train)
        return drawn(train)

    monkeypatch.setattr(shapes, "draw_shapes", draw)
    return calls


def search(space: str, num_trials: int, *flags: str) -> None:
    Path("space.yaml").write_text(space)
    sweep.main([CONFIG, "--study", "space.yaml", "--trials", str(num_trials), *flags])


def trial_of(run: str) -> dict[str, Any]:
    return json.loads(Path(f"lightning_logs/{run}/trial.json").read_text())


def trials() -> list[Any]:
    storage = optuna.storages.RDBStorage("sqlite:///lightning_logs/sweeps/tutorial-space.db")
    try:
        return optuna.load_study(study_name=STUDY, storage=storage).trials
    finally:
        storage.engine.dispose()  # Python 3.13 and later warn of connections that are left open


@pytest.mark.slow
def test_a_trial_is_the_run_that_fit_makes_of_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    search(SPACE, 3, *FLAGS)
    output = capsys.readouterr().out
    trials = [trial_of(f"version_{i}") for i in range(3)]
    assert {trial["values"]["data.batch_size"] for trial in trials} == {"16", "100"}  # of both kinds of kernels
    (best,) = [i for i in range(3) if Path(f"lightning_logs/version_{i}/results.json").is_file()]
    assert trials[best]["accuracy"] == max(trial["accuracy"] for trial in trials)
    for i, trial in enumerate(trials):
        flags = [flag for key, value in trial["values"].items() for flag in (f"--{key}", str(value))]
        lit_cifar.fit.main(["--config", CONFIG, *FLAGS, *flags])
        run, again = f"version_{i}", f"version_{3 + i}"
        if i == best:
            assert_same_run(run, again)
            assert results(run)["recipe"] == results(again)["recipe"] == "tutorial"
            assert 0 < results(run)["seconds"]["fit"] < results(run)["seconds"]["total"]
        assert all(torch.equal(weight, weights(again)[name]) for name, weight in weights(run).items())
        accuracies = scalars(again)["val/accuracy"]
        assert scalars(run)["val/accuracy"] == accuracies
        assert trial["accuracy"] == pytest.approx(max(value for _, value in accuracies))
        assert output.count(f"trial {i + 1} of 3  complete  {100 * trial['accuracy']:.2f} %  ") == 1
    lit_cifar.fit.main(["--config", "lightning_logs/sweeps/tutorial-space.best.yaml"])
    assert_same_run(f"version_{best}", "version_6")
    assert "loss" not in output.split("Accuracy on the")[0]  # one line a trial, and no other


def test_the_test_set_is_read_once_when_all_trials_are_done(
    reads: list[bool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, done = shapes.draw_shapes, []

    def draw_and_count(train: bool) -> Split:
        if not train:
            done.append(sum(trial.state.is_finished() for trial in trials()))
        return draw(train)

    monkeypatch.setattr(shapes, "draw_shapes", draw_and_count)
    search(SPACE, 2, *FLAGS)
    assert (reads, done) == ([True, False], [2])
    reads.clear()
    search(SPACE, 2, *FLAGS)  # nothing is left to do
    assert reads == [True]
    assert "2 of 2 trials are done" in capsys.readouterr().out
    assert len(list(Path("lightning_logs").glob("version_*"))) == 2


def wait_for_trial(number: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for file in Path("lightning_logs").glob("version_*/trial.json"):
            trial = json.loads(file.read_text())
            if (trial["trial"], trial["state"]) == (number, "running"):
                return
        time.sleep(0.02)
    pytest.fail(f"trial {number} never ran")


def test_a_sweep_killed_in_a_trial_goes_on_to_the_same_trials_and_the_same_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [*FLAGS, "--max_epochs", "3"]
    Path("space.yaml").write_text(SPACE)
    command = ["-m", "lit_cifar.sweep", CONFIG, "--study", "space.yaml", "--trials", "3", *long]
    with subprocess.Popen(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_for_trial(2, process)
        finally:
            os.kill(process.pid, signal.SIGKILL)
    search(SPACE, 3, *long)
    assert "1 of 3 trials are done" in capsys.readouterr().out
    assert [trial_of(f"version_{i}")["state"] for i in range(4)] == ["complete", "killed", "complete", "complete"]
    states = [trial.state.name for trial in trials()]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]

    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    search(SPACE, 3, *long)
    whole, resumed = ({}, {})
    for place, found in ((Path(), whole), (tmp_path, resumed)):
        for file in place.glob("lightning_logs/version_*/trial.json"):
            trial = json.loads(file.read_text())
            if trial["state"] != "killed":
                found[trial["trial"]] = (trial["state"], trial["values"], trial["accuracy"])
    assert whole == resumed
    configs = [folder / "lightning_logs/sweeps/tutorial-space.best.yaml" for folder in (Path(), tmp_path)]
    assert configs[0].read_text() == configs[1].read_text()


def test_a_pruned_trial_stops_early_and_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    class PruneSecond(optuna.pruners.BasePruner):  # type: ignore[misc, name-defined]
        def prune(self, study: Any, trial: Any) -> bool:
            return bool(trial.number == 1 and trial.last_step == 2)

    monkeypatch.setattr(optuna.pruners, "MedianPruner", PruneSecond)
    search("model.lr: {low: 0.001, high: 0.1}", 2, *FLAGS_OF_3_EPOCHS)
    assert [(trial_of(f"version_{i}")["state"], len(scalars(f"version_{i}")["val/accuracy"])) for i in (0, 1)] == [
        ("complete", 3),
        ("pruned", 2),
    ]
    stopped = torch.load("lightning_logs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert stopped["global_step"] == 6
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "PRUNED"]
    assert [len(trial.intermediate_values) for trial in trials()] == [3, 2]
    assert Path("lightning_logs/version_0/results.json").is_file()
    assert not Path("lightning_logs/version_1/results.json").is_file()


def test_trials_that_fail_count_and_the_sweep_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    # seed 0 draws the second, the first, the first choice; a momentum of 0 does not go with Nesterov's
    search("model.lr: {choices: [0.01, 1e30]}", 2, *FLAGS_OF_3_EPOCHS)
    failed, complete = trial_of("version_0"), trial_of("version_1")
    assert (failed["state"], complete["state"]) == ("failed", "complete")
    assert "not finite" in failed["reason"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trial 1 of 2  failed"))
    assert "the loss is not finite" in line
    runs.main(["--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in listed] == ["no results: trial 1, failed, no checkpoint", "done"]

    # at the ends of their ranges, and so in the check, these two go together
    space = "model.nesterov: {choices: [false, true]}\nmodel.momentum: {choices: [0.0, 0.9]}\n"
    with pytest.raises(UserError, match=r"all 1 trials failed, the last one with: --model.nesterov true needs"):
        search(space, 1, *FLAGS_OF_3_EPOCHS, "--seed", "3", "--storage", "other.db")


def test_each_trial_has_its_hyperparameters_on_tensorboard() -> None:
    search("data.augment.crop: {choices: [3]}\ntrainer.gradient_clip_val: {low: 1, high: 2}", 1, *FLAGS)
    events = EventAccumulator("lightning_logs/version_0")
    events.Reload()
    session = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(session["_hparams_/session_start_info"]).session_start_info
    trial = trial_of("version_0")
    assert start.hparams["data.augment.crop"].string_value == "3"  # as typed: choices are texts
    assert start.hparams["trainer.gradient_clip_val"].number_value == trial["values"]["trainer.gradient_clip_val"]
    experiment = plugin_data_pb2.HParamsPluginData.FromString(session["_hparams_/experiment"]).experiment
    assert "val/accuracy" in [info.name.tag for info in experiment.metric_infos]
    assert events.Scalars("val/accuracy")


@pytest.mark.parametrize(
    ("key", "flags"),
    [
        ("lr", ["--model.scheduler", "StepLR", "--model.scheduler.step_size", "1"]),
        ("model.optimizer.weight_decay", ["--model.scheduler", "CosineAnnealingLR", "--model.scheduler.T_max", "2"]),
        # which the class must have: it is given, and trials have others
        (
            "model.scheduler.max_lr",
            ["--model.scheduler", "OneCycleLR", "--model.scheduler.max_lr", "0.5", "--model.lr", "null"],
        ),
    ],
)
def test_settings_of_a_named_optimiser_and_scheduler_are_searched(key: str, flags: list[str]) -> None:
    own = ["--model.momentum", "null", "--model.weight_decay", "null"]  # the recipe's are SGD's
    search(f"{key}: {{low: 0.001, high: 0.01}}", 1, *FLAGS, "--model.optimizer", "torch.optim.AdamW", *own, *flags)
    trial = trial_of("version_0")
    ((dotted, value),) = trial["values"].items()
    assert trial["state"] == "complete"
    assert 0.001 <= value <= 0.01
    model = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())["model"]
    *sections, last = dotted.removeprefix("model.").split(".")
    found = model[sections[0]]["init_args"][last] if sections else model[last]
    assert found == value
    events = EventAccumulator("lightning_logs/version_0")
    events.Reload()
    session = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(session["_hparams_/session_start_info"]).session_start_info
    assert value in [shown.number_value for shown in start.hparams.values()]
    lit_cifar.fit.main(["--config", "lightning_logs/sweeps/tutorial-space.best.yaml"])
    assert_same_run("version_0", "version_1")


# Optuna leaves a connection open where a file is no database; Python 3.13 and later warn of it
@pytest.mark.filterwarnings("ignore:.*finalizing database connection", "ignore:unclosed database:ResourceWarning")
def test_a_storage_goes_on_with_what_it_began_with_and_for_one_sweep_at_a_time() -> None:
    search(SPACE, 1, *FLAGS)
    with pytest.raises(UserError, match=r"space.yaml: model.lr.high was 0.1 and is now 0.2; .* --storage FILE"):
        search(SPACE.replace("0.1", "0.2"), 2, *FLAGS)
    with pytest.raises(UserError, match=r"--model.momentum was 0.9 and is now 0.8; .* --storage FILE"):
        search(SPACE, 2, *FLAGS, "--model.momentum", "0.8")
    with FileLock("lightning_logs/sweeps/tutorial-space.lock"), pytest.raises(UserError, match="another sweep"):
        search(SPACE, 2, *FLAGS)
    Path("photo.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(UserError, match=r"photo.db cannot be used \(.*file is not a database\)"):
        search(SPACE, 2, *FLAGS, "--storage", "photo.db")
    assert Path("photo.db").read_bytes() == b"not a database" * 1000
    assert len(trials()) == 1
    Path("lightning_logs/version_0/checkpoints/best.ckpt").unlink()
    with pytest.raises(UserError, match="version_0 is gone"):
        search(SPACE, 1, *FLAGS)


class NoSpaceLeft(Checkpoints):
    """Writes no checkpoint, as on a full disk."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        raise UserError("checkpoint could not be written (No space left on device)")


def test_what_no_trial_could_survive_ends_the_sweep_and_burns_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Checkpoints, "on_validation_end", NoSpaceLeft.on_validation_end)
        with pytest.raises(UserError, match="No space left"):
            search(SPACE, 1, *FLAGS)
    search(SPACE, 1, *FLAGS)
    assert [trial.state.name for trial in trials()] == ["FAIL", "COMPLETE"]
    with pytest.raises(UserError, match="before its first validation"):
        search(SPACE, 1, *FLAGS, "--trainer.max_steps", "1", "--storage", "short.db")


@pytest.fixture(scope="module")
def parser() -> Parser:
    return CLI([], prog="", description="").parser  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model.lr]", ["maps no keys"]),
        ("", ["maps no keys"]),
        ("model.lr: {", ["no valid YAML"]),
        ("model.lr: 2001-99-99", ["no valid YAML"]),
        ("[" * 5000, ["no valid YAML"]),
        ("model.lrr: {low: 0, high: 1}", ["unknown key 'model.lrr'", "(did you mean model.lr?)"]),
        ("leerning: {low: 0, high: 1}", ["unknown key 'leerning'"]),
        ("3: {low: 0, high: 1}", ["unknown key '3'"]),
        ("lr: {low: 0, hgih: 1}", ["lr: unknown key 'hgih'", "(did you mean high?)"]),
        ("lr: {low: 0}", ["lr: a range needs both low and high"]),
        ("lr: 0.1", ["lr: expected {low: ..., high: ...}"]),
        ("lr: {low: 0.2, high: 0.1}", ["lr: the range is empty: low 0.2 is not below high 0.1"]),
        ("lr: {low: 0.1, high: 0.1}", ["the range is empty"]),
        ("lr: {low: 0, high: 1, log: true}", ["log: true needs low above 0"]),
        ("lr: {low: 1, high: 9, log: true, step: 2}", ["log: true needs"]),
        ("lr: {low: 1, high: 9, log: yess}", ["log: expected true or false"]),
        ("batch_size: {low: 1, high: 9, step: 9}", ["no second value"]),
        ("batch_size: {low: 1, high: 9, step: 0}", ["no second value"]),
        ("lr: {low: 0, high: .inf}", ["high: expected a number"]),
        (f"lr: {{low: 0, high: 1{'0' * 400}}}", ["high: expected a number"]),
        ("lr: {low: no, high: 1}", ["low: expected a number, got False"]),
        ("lr: {low: a, high: 1}", ["low: expected a number, got 'a'"]),
        ("batch_size: {choices: []}", ["choices is a list"]),
        ("batch_size: {choices: 4}", ["choices is a list"]),
        ("batch_size: {choices: [4], low: 1}", ["choices is a list", "alone"]),
        ("batch_size: {choices: [4, 8, 4]}", ["4, 8, 4 is given twice"]),
        ("lr: {low: 0, high: 1}\nmodel.lr: {low: 0, high: 1}", ["model.lr is given twice"]),
        ("seed: {low: 0, high: 9, step: 1}", ["seed cannot be searched"]),
        ("data.num_val: {choices: [1, 2]}", ["data.num_val cannot be searched"]),
        ("checkpoint.mode: {choices: [min]}", ["checkpoint.mode cannot be searched"]),
    ],
)
def test_what_is_wrong_in_a_space_ends_in_one_line(text: str, words: list[str], parser: Parser) -> None:
    Path("space.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_space(Path("space.yaml"), parser)
    for word in ("space.yaml", *words):
        assert word in str(error.value)


def test_a_range_is_one_of_whole_numbers_where_it_has_whole_steps(parser: Parser) -> None:
    Path("space.yaml").write_text(
        "lr: {low: 1e-3, high: 1}\nmax_epochs: {low: 2, high: 7, step: 2}\n"
        "data.batch_size: {low: 8, high: 64, log: true, step: 1}\nmodel.sides: {choices: [null, [24, 32], on]}"
    )
    space = read_space(Path("space.yaml"), parser)
    assert space == {
        "data.batch_size": {"low": 8, "high": 64, "log": True, "step": 1},
        "model.lr": {"low": 0.001, "high": 1.0, "log": False, "step": None},
        "model.sides": {"choices": ["null", "[24, 32]", "true"]},
        "trainer.max_epochs": {"low": 2, "high": 7, "log": False, "step": 2},
    }
    distributions = {key: distribution(entry) for key, entry in space.items()}
    trial = optuna.create_study().ask(distributions)
    assert trial.params["trainer.max_epochs"] in (2, 4, 6)
    assert isinstance(trial.params["data.batch_size"], int)


@pytest.mark.parametrize(
    ("space", "args", "words"),
    [
        (SPACE, ["--data.num_val", "0"], ["--data.num_val 5000"]),
        (SPACE, ["--devices", "2"], ["one device", "--devices 1"]),
        (SPACE, ["--trainer.fast_dev_run", "1"], ["--trainer.fast_dev_run"]),
        (SPACE, ["--checkpoint.monitor", "val/loss"], ["--checkpoint.monitor"]),
        (SPACE, ["--lr", "0.1"], ["--lr is given and searched by space.yaml"]),
        (SPACE, ["--trials", "0"], ["--trials: expected a number from 1, got 0"]),
        (SPACE, ["--resume", "auto"], ["unknown flag --resume"]),
        (
            SPACE,
            ["--study", "missing.yaml"],
            ["--study missing.yaml is no file and no study; the studies are resnet18"],
        ),
        (SPACE, ["--study", "resnet19"], ["--study resnet19 is no file and no study (did you mean resnet18?)"]),
        (SPACE, ["--storage", "space.yaml/trials.db"], ["space.yaml/trials.db cannot be written", "another --storage"]),
        ("batch_size: {choices: [4, 20000]}", [], ["batch_size 20000"]),
        ("batch_size: {low: 4, high: 8}", [], ["space.yaml: --data.batch_size: expected int, got 4.0", "step: 1"]),
        ("model.net.num_clases: {choices: [10]}", [], ["space.yaml", "num_clases"]),
        ("model.lr: {low: -1.5, high: 1}", [], ["space.yaml: --model.lr: expected a number at least 0, got -1.5"]),
    ],
)
def test_what_cannot_be_searched_ends_in_one_line_and_writes_nothing(
    space: str, args: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        search(space, 1, *FLAGS, *args)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert [path.name for path in Path().iterdir()] == ["space.yaml"]


def test_a_command_line_without_its_parts_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for args in ([], ["--study", "space.yaml"]):
        with pytest.raises(UserError, match="the recipe comes first"):
            sweep.main(args)
    with pytest.raises(UserError, match="--study and --trials are needed"):
        sweep.main([CONFIG])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'lit_cifar\[sweep\]'"):
        search(SPACE, 1, *FLAGS)


def test_recipe_and_study_go_by_name_as_by_file() -> None:
    flags = ["--trials", "1", "--dataset", "shapes", "--data.num_val", "500", "--accelerator", "cpu"]
    by_name = sweep.Sweep(["--config", "resnet18", "--study", "resnet18", *flags])
    files = [str(ROOT / "configs" / name) for name in ("resnet18.yaml", "sweeps/resnet18.yaml")]
    by_file = sweep.Sweep(["--config", files[0], "--study", files[1], *flags])
    assert by_name.space == by_file.space
    assert by_name.storage == by_file.storage == Path("lightning_logs/sweeps/resnet18.db")
    assert by_name.base.plain_config == by_file.base.plain_config
    Path("resnet18").write_text("model.lr: {low: 0.1, high: 0.2}\n")
    wins = sweep.Sweep(["--config", files[0], "--study", "resnet18", *flags])
    assert list(wins.space) == ["model.lr"]


def test_help_lists_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        sweep.main(["--help"])
    output = capsys.readouterr().out
    assert done.value.code == 0
    for flag in ("--study", "--trials", "--storage", "--max_epochs"):
        assert f"\n  {flag} " in output
