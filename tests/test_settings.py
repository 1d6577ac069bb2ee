"""Settings are read once: each means the same as a flag, in YAML, before or after others, and in a second run."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import SHAPES, error_of, results

import lit_cifar.fit
import lit_cifar.test
from lit_cifar.cli.command import CLI
from lit_cifar.run.folder import RUNS

SHORT = [*SHAPES, "--batch_size", "50", "--trainer.limit_train_batches", "4", "--trainer.limit_test_batches", "1"]
LAST = RUNS / "version_0" / "checkpoints" / "last.ckpt"


def fit(*args: str) -> None:
    lit_cifar.fit.main([*SHORT, *args])


def write(name: str, **settings: Any) -> str:
    Path(name).write_text(yaml.safe_dump(settings))
    return name


@pytest.mark.parametrize("resume", ["auto", "if-any", str(RUNS / "version_0"), str(LAST)])
def test_resume_may_stand_in_yaml(resume: str) -> None:
    fit("--max_epochs", "1")
    config = write("more.yaml", resume=resume, trainer={"max_epochs": 2})
    lit_cifar.fit.main(["--config", config])
    assert os.listdir(RUNS) == ["version_0"]
    assert results("version_0")["num_steps"] == 8


@pytest.mark.parametrize("resume", ["auto", "if-any"])
def test_runs_are_looked_for_where_yaml_puts_them(resume: str) -> None:
    config = write("place.yaml", trainer={"default_root_dir": "elsewhere"})
    fit("--max_epochs", "1", "--config", config)
    lit_cifar.fit.main(["--config", config, "--resume", resume, "--max_epochs", "2"])
    assert os.listdir("elsewhere/lightning_logs") == ["version_0"]
    assert results(Path("elsewhere/lightning_logs/version_0").resolve())["num_steps"] == 8
    assert not RUNS.exists()


def test_a_requeued_job_with_all_its_settings_in_yaml_goes_on() -> None:
    """As a cluster's script starts it: the same line each time, which begins the run or goes on with it."""
    config = write("job.yaml", resume="if-any", trainer={"default_root_dir": "scratch", "max_epochs": 1})
    fit("--config", config)
    state = torch.load("scratch/lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    fit("--config", config, "--max_epochs", "3")
    again = torch.load("scratch/lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert (state["global_step"], again["global_step"]) == (4, 12)
    assert os.listdir("scratch/lightning_logs") == ["version_0"]


def test_the_checkpoint_to_test_may_stand_in_yaml() -> None:
    fit("--max_epochs", "1")
    config = write("test.yaml", ckpt_path=str(LAST), output="test.json")
    lit_cifar.test.main(["--config", config])
    assert Path("test.json").is_file()


def test_a_resumed_run_takes_flags_of_the_net_that_its_checkpoint_names(capsys: pytest.CaptureFixture[str]) -> None:
    net = ["--model.net", "lit_cifar.nets.SpeedNet", "--model.net.widths", "[8, 8, 8]"]
    fit("--max_epochs", "1", *net)
    message = error_of(lit_cifar.fit.main, ["--resume", "auto", "--model.net.widths", "[16, 8, 8]"])
    assert "does not fit SpeedNet" in message, "it was read as one of SpeedNet's"
    assert "unknown" in error_of(lit_cifar.fit.main, ["--resume", "auto", "--model.net.heights", "[16, 8, 8]"])
    assert "unknown" in error_of(lit_cifar.fit.main, ["--model.net.widths", "[16, 8, 8]"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        lit_cifar.fit.main(["--resume", "auto", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["net"]["init_args"]["widths"] == [8, 8, 8], "the config is printed once, and is the run's"


@pytest.mark.parametrize("trust", ["true", "True", "TRUE"])
@pytest.mark.parametrize("in_yaml", [False, True], ids=["flag", "YAML"])
def test_trust_counts_however_it_is_written(trust: str, in_yaml: bool) -> None:
    fit("--max_epochs", "1", "--model.net", "test_settings.Own")
    assert "--trust true" in error_of(lit_cifar.fit.main, ["--resume", "auto", "--max_epochs", "2"])
    Path("trust.yaml").write_text(f"trust: {trust}\n")
    given = ["--config", "trust.yaml"] if in_yaml else ["--trust", trust]
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2", *given])
    assert results("version_0")["num_steps"] == 8


class Own(torch.nn.Sequential):
    """A net of somebody's own package."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, num_classes))


def test_a_second_run_in_one_process_resumes_nothing() -> None:
    fit("--max_epochs", "1")
    environment = dict(os.environ)
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2"])
    assert {**os.environ, "PL_GLOBAL_SEED": ""} == {**environment, "PL_GLOBAL_SEED": ""}
    fit("--max_epochs", "1")
    assert sorted(os.listdir(RUNS)) == ["version_0", "version_1"]
    assert results("version_1")["num_steps"] == 4


# ---- paths ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("in_yaml", [False, True], ids=["flag", "YAML"])
def test_home_is_expanded_wherever_it_stands(home: Path, in_yaml: bool) -> None:
    for _ in range(2):
        if in_yaml:
            fit("--max_epochs", "1", "--config", write("home.yaml", trainer={"default_root_dir": "~/runs"}))
        else:
            fit("--max_epochs", "1", "--trainer.default_root_dir=~/runs")
    runs = home / "runs" / "lightning_logs"
    assert sorted(os.listdir(runs)) == ["version_0", "version_1"]
    assert not Path("~").exists()
    if in_yaml:
        lit_cifar.fit.main(["--config", write("home.yaml", resume="~/runs/lightning_logs/version_1")])
        lit_cifar.test.main(
            ["--config", write("test.yaml", ckpt_path=f"~/runs/lightning_logs/version_0/checkpoints/{LAST.name}")]
        )
    else:
        lit_cifar.fit.main(["--resume=~/runs/lightning_logs/version_1"])
        lit_cifar.test.main([f"--ckpt_path=~/runs/lightning_logs/version_0/checkpoints/{LAST.name}"])
    assert (runs / "version_0" / "test-last.json").is_file()


def test_home_is_expanded_in_settings_of_callbacks_and_loggers(home: Path) -> None:
    config = write(
        "more.yaml",
        trainer={
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "~/kept"}}],
            "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "~/logs"}}],
        },
    )
    fit("--max_epochs", "1", "--config", config)
    assert list((home / "kept").glob("*.ckpt"))
    assert list((home / "logs").rglob("metrics.csv"))
    assert not Path("~").exists()


@pytest.mark.parametrize("url", ["s3://bucket/x", "hf://user/data", "https://example.org/x.tar", "gs://b", "file:///x"])
@pytest.mark.parametrize("flag", ["data_dir", "trainer.default_root_dir", "resume"])
@pytest.mark.parametrize("in_yaml", [False, True], ids=["flag", "YAML"])
def test_a_url_given_as_a_path_is_refused_and_makes_no_folder(url: str, flag: str, in_yaml: bool) -> None:
    dotted = {"data_dir": "data.data_dir"}.get(flag, flag)
    if in_yaml:
        section, _, key = dotted.rpartition(".")
        args = ["--config", write("url.yaml", **({section: {key: url}} if section else {key: url}))]
    else:
        args = [f"--{flag}", url]
    before = os.listdir()
    message = error_of(lit_cifar.fit.main, args)
    assert url in message
    assert f"--{flag}" in message
    assert os.listdir() == before


def test_a_url_is_no_checkpoint_to_test_and_no_place_for_results() -> None:
    fit("--max_epochs", "1")
    assert "--ckpt_path s3://b/x.ckpt" in error_of(lit_cifar.test.main, ["--ckpt_path", "s3://b/x.ckpt"])
    message = error_of(lit_cifar.test.main, ["--ckpt_path", str(LAST), "--output", "s3://b/x.json"])
    assert "--output s3://b/x.json" in message
    assert not Path("s3:").exists()


# ---- which settings belong to whom ----


def test_flags_of_a_command_are_no_part_of_its_config() -> None:
    fit("--max_epochs", "1", "--trust", "true")
    config = yaml.safe_load((RUNS / "version_0" / "config.yaml").read_text())
    assert not {"resume", "trust", "log_level", "config"} & config.keys()
    lit_cifar.fit.main(["--config", str(RUNS / "version_0" / "config.yaml")])
    assert results("version_1")["confusion_matrix"] == results("version_0")["confusion_matrix"]


def test_another_commands_flag_is_unknown() -> None:
    assert "--ckpt_path is a flag of lit_cifar.test" in error_of(lit_cifar.fit.main, ["--ckpt_path", "x.ckpt"])
    assert "unknown flag --resume" in error_of(lit_cifar.test.main, ["--resume", "auto"])
    assert "--resume FILE" in error_of(lit_cifar.fit.main, ["--config", write("x.yaml", ckpt_path="x.ckpt")])


def test_settings_alone_are_read_without_making_anything(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    command = CLI(["--dataset", "shapes", "--seed", "5"], prog="test", description="", build=False)
    assert command.config.seed_everything == 5
    assert not hasattr(command, "trainer")
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--batch_size", "0"], "--batch_size: expected a number above 0, got 0"),
        (["--data.batch_size=2.5"], "--data.batch_size: expected int, got 2.5"),
        (["--lr", "-1"], "--lr: expected a number at least 0, got -1"),
        (["--lr", "fast"], "--lr: expected float, got fast"),
        (["--model.momentum", "1"], "--model.momentum: expected a number at least 0 and below 1, got 1"),
        (["--data.num_workers", "-1"], "--data.num_workers: expected a number at least 0, got -1"),
        (["--config", "range.yaml"], "--data.augment.crop: expected a number at least 0, got -2"),
        (["--config", "no.yaml"], "--config no.yaml is no valid YAML"),
        (["--config", "latin.yaml"], "--config latin.yaml is no text in UTF-8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_number_out_of_range_and_a_broken_file_are_named(args: list[str], line: str) -> None:
    write("range.yaml", data={"augment": {"crop": -2}})
    Path("no.yaml").write_text("a: [\n")
    Path("latin.yaml").write_bytes("# é\n".encode("latin-1"))
    assert error_of(lit_cifar.fit.main, args).startswith(line)
