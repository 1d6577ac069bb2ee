"""A file from a stranger decides weights, net and preprocessing; a run in its own folder goes on as it was begun."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import SHAPES, error_of, results, weights

import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.sweep
import lit_cifar.test
from lit_cifar.cli.command import CLI
from lit_cifar.run.folder import RUNS
from lit_cifar.run.trust import OF_TRAINER, OPTIMISERS, check_trusted, load_yaml
from lit_cifar.text import in_command

SHORT = [*SHAPES, "--batch_size", "50", "--lr", "0.05", "--trainer.limit_train_batches", "6"]
FOLDER = RUNS / "version_0"
LAST = FOLDER / "checkpoints" / "last.ckpt"


def made(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


# ---- which settings a file decides ----

PERSONAL = {
    "trainer.default_root_dir": "theirs",
    "trainer.devices": "3",
    "trainer.num_nodes": 2,
    "trainer.accelerator": "cpu",
    "trainer.strategy": "ddp_find_unused_parameters_true",
    "trainer.plugins": [made("lightning.pytorch.plugins.environments.LightningEnvironment")],
    "trainer.callbacks": [made("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="theirs")],
    "trainer.logger": [made("lightning.pytorch.loggers.CSVLogger", save_dir="theirs")],
    "trainer.profiler": "simple",
    "trainer.enable_checkpointing": False,
    "data.data_dir": "theirs",
    "data.mirrors": ["http://127.0.0.1:9/theirs"],
    "data.num_workers": 99,
    "model.compile": True,
}
OF_TRAINING = {
    "trainer.max_epochs": 7,
    "trainer.limit_train_batches": 5,
    "data.batch_size": 20,
    "data.dataset": "shapes",
    "data.augment.crop": 3,
    "model.lr": 0.125,
    "model.tta": "mirror",
    "seed_everything": 5,
}


@pytest.fixture
def spoilt(trained: Path) -> Path:
    """A run's folder in which the state has settings of somebody else."""
    shutil.copytree(trained, FOLDER)
    content = torch.load(LAST, weights_only=True)
    for key, value in {**PERSONAL, **OF_TRAINING}.items():
        place = content["lit_cifar"]["config"]
        *sections, name = key.split(".")
        for section in sections:
            place = place[section]
        place[name] = value
    torch.save(content, LAST)
    return LAST


@in_command()
def read(command: Any, *args: str) -> dict[str, Any]:
    """The settings of a command with these flags, dotted and as plain values."""
    start, add = {
        lit_cifar.fit: (lit_cifar.fit._resumed, lit_cifar.fit.add_arguments),
        lit_cifar.test: (lit_cifar.test._tested, lit_cifar.test._add_arguments),
    }[command]
    cli = CLI(list(args), prog="test", description="", start=start, add_arguments=add, build=False)
    plain = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))

    def value(key: str) -> Any:
        place = plain
        for name in key.split("."):
            place = place[name]
        return place

    return {key: value(key) for key in (*PERSONAL, *OF_TRAINING)}


def test_a_file_elsewhere_decides_what_is_trained_and_nothing_else(
    spoilt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(spoilt, "copy.ckpt")
    own = read(lit_cifar.fit)
    for trust in ([], ["--trust", "true"]):
        capsys.readouterr()
        settings = read(lit_cifar.fit, "--resume", "copy.ckpt", *trust)
        assert {key: settings[key] for key in PERSONAL} == {key: own[key] for key in PERSONAL}
        assert {key: settings[key] for key in OF_TRAINING} == OF_TRAINING
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("copy.ckpt lies outside its run's folder")
        assert all(f"--{key}" in line for key in PERSONAL if own[key] != PERSONAL[key])
    settings = read(lit_cifar.fit, "--resume", "copy.ckpt", "--data_dir", "mine", "--devices", "2")
    assert (settings["data.data_dir"], settings["trainer.devices"]) == ("mine", "2")


def test_a_file_elsewhere_is_tested_on_ones_own_data(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(spoilt, "copy.ckpt")
    own = read(lit_cifar.test)
    settings = read(lit_cifar.test, "--ckpt_path", "copy.ckpt")
    assert {key: settings[key] for key in PERSONAL} == {key: own[key] for key in PERSONAL}
    assert settings["data.dataset"] == "shapes"
    assert settings["model.tta"] == "mirror"
    assert "--data.data_dir" in capsys.readouterr().err


def test_a_run_in_its_own_folder_goes_on_as_it_was_begun(spoilt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = read(lit_cifar.fit, "--resume", str(FOLDER))
    kept = {key: settings[key] for key in PERSONAL if key not in ("trainer.callbacks", "trainer.logger")}
    assert kept == {key: PERSONAL[key] for key in kept}
    assert settings["trainer.callbacks"][0]["init_args"]["dirpath"] == "theirs"
    tested = read(lit_cifar.test, "--ckpt_path", str(spoilt))
    assert (tested["data.data_dir"], tested["data.mirrors"]) == ("theirs", PERSONAL["data.mirrors"])
    assert tested["trainer.callbacks"] is None
    assert tested["trainer.devices"] == 1
    assert capsys.readouterr().err == ""


def test_a_copy_goes_on_as_a_new_run_with_what_it_was_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    lit_cifar.fit.main([*SHORT, "--max_epochs", "2", "--trainer.default_root_dir", "here"])
    shutil.copy("here" / RUNS / "version_0" / "checkpoints" / "last.ckpt", "copy.ckpt")
    capsys.readouterr()
    lit_cifar.fit.main(["--resume", "copy.ckpt", "--max_epochs", "3"])
    assert "--trainer.default_root_dir" in capsys.readouterr().err
    assert results("version_0")["num_steps"] == 18
    lit_cifar.fit.main(["--resume", "here/lightning_logs/version_0", "--max_epochs", "3"])
    one, other = weights("version_0"), weights(Path("here/lightning_logs/version_0").resolve())
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_the_trainers_settings_of_a_stranger_are_not_imported(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hostile.py").write_text("open('canary', 'w').close()\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    content = torch.load(spoilt, weights_only=True)
    for value in (made("hostile.Net"), [made("hostile.Net")], "[{class_path: hostile.Net}]"):
        content["lit_cifar"]["config"]["trainer"] = {"callbacks": value}
        torch.save(content, "copy.ckpt")
        assert read(lit_cifar.fit, "--resume", "copy.ckpt")["trainer.callbacks"] is None
        torch.save(content, LAST)
        assert "names the class hostile.Net" in error_of(lit_cifar.fit.main, ["--resume", str(FOLDER)])
        assert not Path("canary").exists()


# ---- which classes it may name ----


@pytest.mark.parametrize(
    "name",
    [
        "lightning.pytorch.callbacks.EMAWeightAveraging",
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.callbacks.progress.TQDMProgressBar",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.profilers.SimpleProfiler",
        "lightning.pytorch.strategies.DDPStrategy",
        "lightning.pytorch.plugins.precision.MixedPrecision",
        "lightning.fabric.plugins.environments.LightningEnvironment",
        "torch.optim.SGD",
        "torch.optim.adamw.AdamW",
        "torch.optim.lr_scheduler.OneCycleLR",
    ],
)
def test_lightnings_and_torchs_own_may_be_made(name: str) -> None:
    check_trusted([made(name, dirpath="runs.of/may", filename="best.model")], OPTIMISERS + OF_TRAINER)


@pytest.mark.parametrize(
    "name",
    [
        "lightning.pytorch.callbacks.model_checkpoint.os.mkdir",
        "lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree",
        "lightning.pytorch.loggers.wandb.os.system",
        "lightning.pytorch.strategies.launchers.subprocess_script.subprocess.Popen",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.utilities.migration.utils.pl_legacy_patch",
        "torch.optim.optimizer.functools.partial",
        "torch.optim.swa_utils.update_bn",
        "torch.optim.adam.torch.hub.load",
    ],
)
def test_what_is_reached_through_them_may_not(name: str) -> None:
    for inner in (name, made(name), made("lightning.pytorch.callbacks.LambdaCallback", on_fit_start=name)):
        assert f"names the class {name}" in error_of(check_trusted, inner, OPTIMISERS + OF_TRAINER)


def test_a_net_has_no_use_for_what_writes_files() -> None:
    net = made("torch.nn.Linear", device=made("lightning.pytorch.loggers.CSVLogger", save_dir="theirs"))
    assert "names the class lightning.pytorch.loggers.CSVLogger" in error_of(check_trusted, {"model": {"net": net}})


# ---- runs with callbacks go on ----

CALLBACKS = {
    "EMA": ([made("EMAWeightAveraging", decay=0.9)], None),
    "SWA": ([made("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)], None),
    "early stopping, logs": (
        [made("EarlyStopping", monitor="val/loss"), made("LearningRateMonitor"), made("ModelSummary")],
        [made("CSVLogger", save_dir="logs.of/may"), made("TensorBoardLogger", save_dir="logs.of/may")],
    ),
    "accumulation": ([made("GradientAccumulationScheduler", scheduling={0: 1, 2: 2})], None),
    "pruning": ([made("ModelPruning", pruning_fn="l1_unstructured", amount=0.2, apply_pruning=False)], None),
}


@pytest.mark.filterwarnings("ignore:SWA is currently:UserWarning")  # of a schedule by steps
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_with_lightnings_callbacks_goes_on_to_the_same_weights(name: str) -> None:
    callbacks, logger = CALLBACKS[name]
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "logger": logger}}))
    more = ["--checkpoint.every_n_train_steps", "4", "--checkpoint.num_kept", "9", "--model.schedule", "cosine"]
    lit_cifar.fit.main([*SHORT, "--max_epochs", "3", "--config", "run.yaml", "--data.num_val", "100", *more])
    run = results("version_0")
    tested = FOLDER / "checkpoints" / f"{run['checkpoint']}.ckpt"
    lit_cifar.test.main(["--ckpt_path", str(tested), "--output", "t.json"])
    assert yaml.safe_load(Path("t.json").read_text())["confusion_matrix"] == run["confusion_matrix"]
    ends = {path.stem: weights("version_0", path.stem) for path in (FOLDER / "checkpoints").glob("[!l]*.ckpt")}
    ends["last"] = weights("version_0")
    for age in (1, 2, 3):  # within the last epoch, at the end of the one before, and within it
        shutil.copytree(FOLDER, f"of_{age}")
        os.replace(f"of_{age}/checkpoints/last-{age}.ckpt", f"of_{age}/checkpoints/last.ckpt")
        lit_cifar.fit.main(["--resume", f"of_{age}"])
        for state, end in ends.items():
            found = weights(Path(f"of_{age}").resolve(), state)
            assert all(torch.equal(weight, found[key]) for key, weight in end.items()), (age, state)
        again = results(Path(f"of_{age}").resolve())
        assert again["confusion_matrix"] == run["confusion_matrix"], age


def of_callback(content: dict[str, Any], **parts: Any) -> dict[str, Any]:
    (name,) = content["callbacks"].keys() - {"Checkpoints"}
    return {**content, "callbacks": {**content["callbacks"], name: {**content["callbacks"][name], **parts}}}


@pytest.mark.parametrize(
    ("callback", "spoil"),
    [
        ("EMA", lambda content: {**content, "current_model_state": {}}),
        ("EMA", lambda content: {**content, "averaging_state": {"n_averaged": "many"}}),
        ("EMA", lambda content: of_callback(content, latest_update_step="late")),
        ("SWA", lambda content: of_callback(content, average_model_state={})),
        ("SWA", lambda content: of_callback(content, scheduler_state={"base_lrs": 1})),
        ("SWA", lambda content: {**content, "lr_schedulers": [{"last_epoch": 3}]}),
        ("SWA", lambda content: of_callback(content, n_averaged=None)),
    ],
)
def test_a_spoilt_state_of_a_callback_is_told(
    callback: str, spoil: Any, averaged: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(averaged[callback], "spoilt")
    content = torch.load("spoilt/checkpoints/last.ckpt", weights_only=True)
    torch.save(spoil(content), "spoilt/checkpoints/last.ckpt")
    assert "is spoilt" in error_of(lit_cifar.fit.main, ["--resume", "spoilt", "--max_epochs", "3"])


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of short runs with weight averaging, at the end of their second epoch."""
    folders = {}
    for name in ("EMA", "SWA"):
        place = tmp_path_factory.mktemp(name)
        trainer = {"callbacks": CALLBACKS[name][0], "default_root_dir": str(place)}
        (place / "run.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
        lit_cifar.fit.main([*SHORT, "--max_epochs", "2", "--config", str(place / "run.yaml")])
        folders[name] = place / FOLDER
    return folders


# ---- text that grows ----


def laughs(count: int, merged: bool = False) -> str:
    many = ", ".join(["*a{0}"] * 9)
    line = "b{1}: &a{1} " + (f"{{{{<<: [{many}]}}}}" if merged else f"[{many}]") + "\n"
    return "a: &a0 {x: ha}\n" + "".join(line.format(number, number + 1) for number in range(count))


HUGE = {
    "aliases": laughs(9),
    "merged maps": laughs(12, merged=True),
    "a part of itself": "a: &a [*a]",
    "brackets": "a: " + "[" * 5000,
    "maps": "{a: " * 5000,
    "levels": "".join(" " * depth + "a:\n" for depth in range(1200)),
    "many keys": "\n".join(f"k{key}: 1" for key in range(10**6)),
    "a long text": "a: " + "b" * 10**7,
    "digits": "a: " + "9" * 9000,
    "hexadecimal digits": "a: 0x" + "f" * 9000,
    "a date": "a: 2020-99-01",
    "bytes": "a: !!binary aGE=",
    "an object": "a: !!python/object/apply:os.mkdir [canary]",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_yaml_text_that_grows_is_refused(name: str) -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml(HUGE[name])
    assert not Path("canary").exists()


def test_aliases_of_a_sane_size_are_followed() -> None:
    assert load_yaml("a: &a [1, 2.5, x]\nb: [*a, *a]\nc: {<<: &m {d: null}}") == {
        "a": [1, 2.5, "x"],
        "b": [[1, 2.5, "x"]] * 2,
        "c": {"d": None},
    }


@pytest.mark.parametrize("name", ["aliases", "merged maps", "a part of itself", "brackets", "maps", "levels"])
def test_a_config_or_study_that_grows_ends_in_one_line(name: str) -> None:
    pytest.importorskip("optuna")
    Path("huge.yaml").write_text(HUGE[name])
    assert error_of(lit_cifar.fit.main, ["--config", "huge.yaml"]).startswith("--config huge.yaml is no valid YAML: ")
    Path("run.yaml").write_text("data: {dataset: shapes, num_val: 100}\n")
    study = ["run.yaml", "--study", "huge.yaml", "--trials", "1"]
    assert error_of(lit_cifar.sweep.main, study).startswith("--study huge.yaml is no valid YAML: ")


@pytest.mark.parametrize("name", ["aliases", "merged maps", "brackets", "many keys"])
@pytest.mark.parametrize("flag", ["--model.groups", "--trainer.callbacks", "--data.mirrors", "--lr", "--config"])
def test_a_flags_value_that_grows_ends_in_one_line(flag: str, name: str) -> None:
    assert len(error_of(lit_cifar.fit.main, [flag, HUGE[name]])) < 3000


def test_a_config_of_many_gigabytes_is_not_read() -> None:
    with open("huge.yaml", "wb") as file:
        file.truncate(10**11)
    assert error_of(lit_cifar.fit.main, ["--config", "huge.yaml"]).startswith("--config huge.yaml is no config: ")


# ---- terminals ----


def test_nothing_from_a_config_reaches_a_terminal_as_it_is() -> None:
    for text in ('lr: "\\e[2J"', 'model: {"\\e[2J": 1}', 'model: {net: "\\e[2J.x"}', 'a: "\\x9b2J\\u202e"'):
        Path("odd.yaml").write_text(text)
        error_of(lit_cifar.fit.main, ["--config", "odd.yaml"])
