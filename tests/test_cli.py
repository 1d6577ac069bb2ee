"""The command line: two spellings of a flag, configs that reproduce themselves, errors that people can act on."""

import contextlib
import gc
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, Run, error_of, make_tree, results
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

import lit_cifar.bench
import lit_cifar.export
import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.runs
import lit_cifar.sweep
import lit_cifar.test
from lit_cifar import errors
from lit_cifar.__main__ import COMMANDS
from lit_cifar.cli import machine
from lit_cifar.cli.command import CLI, set_up
from lit_cifar.cli.configs import find_config
from lit_cifar.cli.parser import SHORT_FLAGS, _flatten
from lit_cifar.data import tree as tree_module
from lit_cifar.errors import UserError

VALUES = {
    "data_dir": "elsewhere",
    "dataset": "shapes",
    "batch_size": "8",
    "lr": "0.5",
    "model": "lit_cifar.LitClassifier",
    "compile": "true",
    "max_epochs": "7",
    "devices": "2",
    "num_nodes": "3",
    "accelerator": "cpu",
    "strategy": "ddp",
    "precision": "bf16-mixed",
    "seed": "11",
}


def make_cli(flags: list[str]) -> CLI:
    return CLI(flags, prog="test", description="", logs=False)


def print_config(*args: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        lit_cifar.fit.main([*args, "--print_config"])
    assert done.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("short", SHORT_FLAGS)
def test_a_short_flag_means_exactly_its_dotted_twin(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    dotted, value = SHORT_FLAGS[short][0], VALUES[short]
    given = print_config(f"--{short}", value, capsys=capsys)
    assert given == print_config(f"--{dotted}", value, capsys=capsys)
    assert given == print_config(f"--{short}={value}", capsys=capsys)
    assert given != print_config(capsys=capsys)
    config = yaml.safe_load(given)
    for key in dotted.split("."):
        config = config[key]
    assert str(config).lower() == value.lower()


def test_a_printed_config_reproduces_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = print_config(*(f"--{short}={value}" for short, value in VALUES.items()), capsys=capsys)
    (tmp_path / "config.yaml").write_text(given)
    assert print_config("--config", "config.yaml", capsys=capsys) == given


def test_later_configs_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("model: {lr: 0.1, momentum: 0.5}\n")
    (tmp_path / "b.yaml").write_text("model: {lr: 0.2}\n")
    given = print_config("--config", "a.yaml", "--config", "b.yaml", "--model.weight_decay", "0.01", capsys=capsys)
    model = yaml.safe_load(given)["model"]
    assert (model["lr"], model["momentum"], model["weight_decay"]) == (0.2, 0.5, 0.01)


# ---- recipes by name ----


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_meant_by_its_name_from_any_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(recipe.stem).mkdir()  # no file
    by_name = print_config("--config", recipe.stem, capsys=capsys)
    assert (
        by_name
        == print_config("--config", str(recipe), capsys=capsys)
        == print_config("-c", recipe.stem, capsys=capsys)
    )


def test_a_file_of_a_recipes_name_wins_and_configs_mix(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("model: {lr: 0.25}\n")
    for configs in (["speedrun94", "mine.yaml"], ["mine.yaml", "speedrun94"]):
        flags = [flag for config in configs for flag in ("--config", config)]
        model = yaml.safe_load(print_config(*flags, capsys=capsys))["model"]
        assert (model["lr"], model["tta"]) == (0.25, "mirror_shift")
    Path("speedrun94").write_text("model: {lr: 0.125}\n")
    model = yaml.safe_load(print_config("--config", "speedrun94", capsys=capsys))["model"]
    assert (model["lr"], model["tta"]) == (0.125, "none")


def test_recipes_are_found_within_the_package_where_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "lit_cifar"
    shutil.copytree(ROOT / "configs", installed / "configs")
    (tmp_path / "site-packages" / "configs").mkdir()  # of another package
    monkeypatch.setattr(lit_cifar, "__file__", str(installed / "__init__.py"))
    assert find_config("speedrun94", "--config") == str(installed / "configs" / "speedrun94.yaml")
    assert find_config("resnet18", "--study", "sweeps") == str(installed / "configs" / "sweeps" / "resnet18.yaml")


def test_a_run_by_name_is_resumed_by_name_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--config", "tutorial", "--dataset", "shapes", "--accelerator", "cpu", "--trainer.limit_test_batches", "1"]
    lit_cifar.fit.main([*flags, "--trainer.max_steps", "2"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    lit_cifar.fit.main([*flags, "--trainer.max_steps", "3", "--resume", str(tmp_path / "lightning_logs" / "version_0")])
    found = results(tmp_path / "lightning_logs" / "version_0")
    assert (found["recipe"], found["num_steps"]) == ("tutorial", 3)


NAMES = "the recipes are resnet18, speedrun94, speedrun95, speedrun96, tutorial"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("tutorail", f"--config tutorail is no file and no recipe (did you mean tutorial?); {NAMES}"),
        ("fastest", f"--config fastest is no file and no recipe; {NAMES}"),
        ("missing.yaml", f"--config missing.yaml is no file and no recipe; {NAMES}"),
        ("folder", f"--config folder is a folder and no recipe; {NAMES}"),
        ("tutorial.yaml", f"--config tutorial.yaml is no file and no recipe (did you mean tutorial?); {NAMES}"),
        (
            "configs/tutorial.yaml",
            f"--config configs/tutorial.yaml is no file and no recipe (did you mean tutorial?); {NAMES}",
        ),
        ("TUTORIAL", f"--config TUTORIAL is no file and no recipe (did you mean tutorial?); {NAMES}"),
        ("../tutorial", f"--config ../tutorial is no file and no recipe (did you mean tutorial?); {NAMES}"),
        ("a\0b", f"--config 'a\\x00b' is no file and no recipe; {NAMES}"),
        ("", f"--config '' is a folder and no recipe; {NAMES}"),
        (
            "https://x.y/z.yaml",
            "--config https://x.y/z.yaml: https:// is not supported here; name a path on this machine",
        ),
        ("of.yaml", "--config of.yaml cannot name another config: give --config twice, with the one that wins second"),
    ],
)
def test_a_config_that_is_not_there_is_told_with_the_recipes(config: str, message: str) -> None:
    Path("folder").mkdir()
    Path("of.yaml").write_text("config: speedrun94\nmodel: {lr: 0.5}\n")
    assert error_of(lit_cifar.fit.main, ["--config", config]) == message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_config_that_is_a_pipe_is_refused_and_waits_for_nobody() -> None:
    os.mkfifo("pipe")
    reading, writing = os.pipe()  # as `--config <(...)` gives one
    os.write(writing, b"model: {lr: 0.5}\n")
    os.close(writing)
    try:
        for name in ("pipe", f"/dev/fd/{reading}"):
            message = f"--config {name} is a pipe or device, and is read more than once: name a file"
            assert error_of(lit_cifar.fit.main, ["--config", name]) == message
    finally:
        os.close(reading)


def test_a_config_written_out_on_the_command_line_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{model: {lr: 0.25}}", "model.lr: 0.25", "model:\n  lr: 0.25\n"):
        assert yaml.safe_load(print_config("--config", text, capsys=capsys))["model"]["lr"] == 0.25


# ---- help ----

MAINS = {
    "fit": lit_cifar.fit.main,
    "test": lit_cifar.test.main,
    "sweep": lit_cifar.sweep.main,
    "bench": lit_cifar.bench.main,
    "predict": lit_cifar.predict.main,
    "export": lit_cifar.export.main,
    "runs": lit_cifar.runs.main,
}


def print_help(*args: str, capsys: pytest.CaptureFixture[str], command: str = "fit") -> str:
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        MAINS[command]([*args])
    return capsys.readouterr().out


@pytest.mark.parametrize("num_columns", [80, 100])
@pytest.mark.parametrize("command", MAINS)
def test_help_fits_two_screens(
    command: str, num_columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(num_columns))
    text = print_help("--help", capsys=capsys, command=command)
    assert text == print_help("-h", capsys=capsys, command=command)
    assert text.startswith(f"usage: python -m lit_cifar.{command} ")
    assert max(map(len, text.splitlines())) <= num_columns
    assert len(text.splitlines()) < 70


def test_help_has_the_flags_people_use_and_the_names_of_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    text = print_help("--help", capsys=capsys)
    flags, groups = text.split("All others, by group:")
    for short, (dotted, meaning) in SHORT_FLAGS.items():
        found = re.search(rf"^  --{short} +(.*?)(?=^  --)", f"{flags}  --", re.MULTILINE | re.DOTALL)
        assert found
        line = " ".join(found[1].split())
        assert line.startswith(f"{meaning} (default: "), line
        assert line.endswith(f"[--{dotted}]")
    for flag in ("--config", "--resume", "--trust", "--log_level"):
        assert f"\n  {flag} " in flags
    named = re.findall(r"^  --([\w.]+)\.  (.*?)(?=^  --|\n\n)", groups, re.MULTILINE | re.DOTALL)
    keys = {f"{group}.{key}" for group, names in named for key in re.split(r",\s+", names.strip())}
    keys |= {dotted for dotted, _ in SHORT_FLAGS.values()} | {"log_level", "resume", "trust"}
    config = yaml.safe_load(print_config(capsys=capsys))
    config["model"]["net"] = None
    assert keys == set(_flatten(config, set()))


def test_help_of_a_group_and_of_all_explains_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    everything = print_help("--help", "all", capsys=capsys)
    assert everything == print_help("--help=all", "--lr", "fast", capsys=capsys)
    known = set(re.findall(r"(?<=--)[\w.]+", everything))
    config = yaml.safe_load(print_config(capsys=capsys))
    assert set(_flatten(config, {"model.net"})) <= known
    groups = {"trainer", "model", "data", "data.augment", "checkpoint", "running_loss"}
    for group in groups:
        text = print_help("--help", group, capsys=capsys)
        explained = set(re.findall(r"^  .*?--([\w.]+\.\w+)", text, re.MULTILINE))
        assert explained - groups == {key for key in known if re.fullmatch(rf"{group}\.\w+(\.help)?", key)} - groups
    for args in (["--help", "modle"], ["--help", "modle", "--lr", "1"]):
        message = error_of(lit_cifar.fit.main, args)
        assert message.startswith("--help: expected trainer, model, data")
        assert message.endswith("or all, got modle (did you mean model?)")


def test_help_of_a_class_is_about_that_class(capsys: pytest.CaptureFixture[str]) -> None:
    text = print_help("--model.net.help", "lit_cifar.nets.SpeedNet", capsys=capsys)
    assert text.startswith("Help for --model.net.help=lit_cifar.nets.SpeedNet\n")
    assert "--model.net.widths" in text
    assert "--devices" not in text


# ---- the console command ----


def test_the_console_command_lists_its_commands_without_torch(run_command: Run) -> None:
    done = run_command("lit_cifar", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^  (\w+) +\w", done.stdout, re.MULTILINE) == list(COMMANDS)
    assert set(COMMANDS) == set(MAINS)
    assert run_command("lit_cifar").stdout == done.stdout
    assert run_command("lit_cifar", "--version").stdout == f"lit_cifar {lit_cifar.__version__}\n"
    code = "import sys, lit_cifar.__main__; assert not {'torch', 'jsonargparse'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_a_command_that_there_is_not_ends_in_one_line(run_command: Run) -> None:
    known = "the commands are fit, test, predict, export, bench, runs, sweep"
    for args, words in (
        (["train"], "train is no command"),
        (["tests", "--devices", "2"], "tests is no command (did you mean test?)"),
        (["--devices", "2"], "--devices is no command"),
        (["\x1b[31m"], "\\x1b[31m is no command"),
    ):
        done = run_command("lit_cifar", *args)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"lit_cifar: error: {words}; {known}\n"


def test_the_console_command_is_the_module(run_command: Run) -> None:
    Path("lightning_logs/version_3").mkdir(parents=True)
    for args in (["--json"], ["--sort", "nothing"], ["--help"]):
        one, other = run_command("lit_cifar", "runs", *args), run_command("lit_cifar.runs", *args)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)


SCRIPT = "from lit_cifar.__main__ import main\nif __name__ == '__main__':\n    main()\n"
FIT = """import __main__, sys
print(__main__.__spec__.name, sys.argv, sys.modules["__main__"] is __main__, __name__)
import beside
"""


def test_a_script_of_pip_runs_what_python_runs_in_this_folder_as_do_the_processes_it_starts(tmp_path: Path) -> None:
    for file, text in (
        ("bin/lit_cifar", SCRIPT),
        ("work/lit_cifar/__init__.py", ""),
        ("work/lit_cifar/fit.py", FIT),
        ("work/beside.py", "print('found')"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    printed = []
    for command in (["../bin/lit_cifar", "fit", "--devices", "2"], ["-m", "lit_cifar.fit", "--devices", "2"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "work",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    # Lightning starts other ranks, and multiprocessing workers, by this name
    assert printed[0].startswith("lit_cifar.fit ['")


@pytest.mark.slow
def test_help_takes_hardly_longer_than_importing_lightning(tmp_path: Path) -> None:
    def seconds(*args: str) -> float:
        started_at = time.perf_counter()
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *args], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started_at

    # pair by pair, on a machine that others use too: the least disturbed pair counts
    ratios: list[float] = []
    while len(ratios) < 5 and min(ratios, default=2.0) >= 1.3:
        ratios.append(seconds("-m", "lit_cifar.fit", "--help") / seconds("-c", "import lightning.pytorch"))
    assert min(ratios) < 1.3, ratios


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--devcies", "2"], ["unknown flag --devcies", "(did you mean --devices?)"]),
        (["--trainer.max_epoch", "2"], ["unknown flag --trainer.max_epoch", "(did you mean --trainer.max_epochs?)"]),
        (["--lr", "fast"], ["--lr: expected float, got fast"]),
        (["--model.lr", "fast"], ["--model.lr: expected float, got fast"]),
        (["--batch_size=2.5"], ["--batch_size: expected int, got 2.5"]),
        (["--dataset", "shape"], ["--dataset: expected cifar10, cifar100, shapes, got shape (did you mean shapes?)"]),
        (["--trainer.max_epochs", "many"], ["--trainer.max_epochs: expected int, null, got many"]),
        (["--devices", "many", "--accelerator", "cpu", "--dataset", "shapes"], ["devices"]),
        (["--model.net", "lit_cifar.nets.Nett"], ["--model.net", "no attribute 'Nett'"]),
        (["--config", "missing.yaml"], ["--config", "missing.yaml"]),
        (["--config", "broken.yaml"], ["--config broken.yaml is no valid YAML"]),
        (["--config", "empty.yaml"], ["--config empty.yaml holds no settings"]),
        (["--config", "unknown.yaml"], ["unknown key 'model.lrr'", "(did you mean model.lr?)"]),
        (["--config", "unknown_group.yaml"], ["unknown key 'modle.lr'", "(did you mean model.lr?)"]),
        (["--config", "wrong_type.yaml"], ["--model.lr: expected float, got fast"]),
        (["--resume", "auto"], ["--resume auto", "has a checkpoint"]),
        (["--resume", "missing.ckpt"], ["--resume missing.ckpt", "no such checkpoint"]),
        (["--resume", "broken.yaml"], ["broken.yaml is no checkpoint"]),
        (["--data_dir", "missing.tar.xz"], ["missing.tar.xz"]),
        (["--data_dir", "full"], ["full holds neither CIFAR-10", "train/<class>/"]),
        (["--checkpoint.every_n_train_steps", "0"], ["--checkpoint.every_n_train_steps 0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_typed_wrong_ends_in_one_line_that_helps(args: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model:\n  lr: [\n")
    (tmp_path / "empty.yaml").write_text("# model:\n#   lr: 1\n")
    (tmp_path / "unknown.yaml").write_text("model:\n  lrr: 1\n")
    (tmp_path / "unknown_group.yaml").write_text("modle:\n  lr: 1\n")
    (tmp_path / "wrong_type.yaml").write_text("model:\n  lr: fast\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("something else")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        lit_cifar.fit.main(args)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] == []


def test_errors_of_the_user_exit_with_2_and_one_line_on_stderr(run_command: Run) -> None:
    done = run_command("lit_cifar.fit", "--devcies", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "lit_cifar: error: unknown flag --devcies (did you mean --devices?); --help lists the flags\n"


def test_errors_of_the_program_keep_their_traceback(run_command: Run) -> None:
    args = ["--dataset", "shapes", "--trainer.callbacks+=faults.Bug", "--trainer.limit_train_batches", "5"]
    done = run_command("lit_cifar.fit", *args)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "AssertionError: a bug of ours" in done.stderr


@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
@pytest.mark.parametrize("in_yaml", [False, True], ids=["flag", "YAML"])
@pytest.mark.parametrize("value", ["1", "1.0", "0.5", "3", "null"])
def test_a_limit_of_1_is_one_batch_and_1_0_is_all(stage: str, in_yaml: bool, value: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"trainer: {{limit_{stage}_batches: {value}}}\n")
    flags = ["--config", "config.yaml"] if in_yaml else [f"--trainer.limit_{stage}_batches", value]
    trainer = make_cli([*flags, "--data.num_val", "10"]).trainer
    expected = 1.0 if value == "null" else yaml.safe_load(value)
    limit = getattr(trainer, f"limit_{stage}_batches")
    assert (limit, type(limit)) == (expected, type(expected))


def test_output_that_the_terminal_cannot_encode_is_written_as_escapes(run_command: Run) -> None:
    make_tree(Path("tree"), ("café", "日本"))
    flags = ["--data_dir", "tree", "--trainer.max_steps", "1", "--accelerator", "cpu"]
    done = run_command("lit_cifar.fit", *flags, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9" in done.stdout


# ---- the number of classes ----


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of images in three classes."""
    return make_tree(tmp_path / "tree", ("ant", "bee", "cow"))


class Required(torch.nn.Linear):
    def __init__(self, num_classes: int) -> None:
        super().__init__(3, num_classes)


class Seven(Required):
    def __init__(self, num_classes: int = 7) -> None:
        super().__init__(num_classes)


@pytest.mark.parametrize("net", ["lit_cifar.nets.Net", "test_cli.Required", "test_cli.Seven"])
@pytest.mark.parametrize(
    ("flags", "num_classes"),
    [
        ([], 10),
        (["--dataset", "shapes"], 10),
        (["--dataset", "cifar100"], 100),
        (["--data_dir", "tree"], 3),
        (["--data_dir", "tree", "--dataset", "cifar100"], 3),
        (["--data_dir", "tree", "--model.net.num_classes", "5"], 5),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_net_has_as_many_outputs_as_the_data_has_classes(
    net: str, flags: list[str], num_classes: int, tree: Path
) -> None:
    command = make_cli(["--model.net", net, *flags])
    assert list(command.model.net.parameters())[-1].shape == (num_classes,)
    for config in (command.plain_config, command.config):
        assert config["model"]["net"]["init_args"]["num_classes"] == num_classes
    assert not Path("data").exists(), "nothing is downloaded for it"


def test_a_number_of_classes_found_is_as_good_as_one_typed(tree: Path) -> None:
    found = make_cli(["--data_dir", "tree"]).model.net.state_dict()
    typed = make_cli(["--data_dir", "tree", "--model.net.num_classes", "3"]).model.net.state_dict()
    assert all(torch.equal(weight, typed[name]) for name, weight in found.items())


def test_a_tree_is_listed_once_for_the_net_and_the_data(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    list_tree = tree_module._list_tree
    monkeypatch.setattr(tree_module, "_list_tree", lambda path: listed.append(path) or list_tree(path))
    data = make_cli(["--data_dir", "tree"]).datamodule
    data.prepare_data()
    data.setup("fit")
    assert len(listed) == 1


def test_printing_the_config_looks_at_no_data(capsys: pytest.CaptureFixture[str], tree: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(print_config("--data_dir", "tree", "--dataset", "cifar100", capsys=capsys))
    assert config["model"]["net"]["init_args"]["num_classes"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


# ---- what suits the machine ----


@pytest.mark.parametrize(
    ("flags", "small"),
    [
        (["--batch_size", "4"], True),
        (["--batch_size", "500"], False),
        (["--batch_size", "4", "--model.net", "lit_cifar.nets.ResNet18"], False),
    ],
)
def test_small_steps_run_on_one_thread_without_onednn(
    flags: list[str], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    set_up(flags, prog="test", description="", logs=False)
    assert torch.backends.mkldnn.enabled is not small
    assert torch.get_num_threads() == (1 if small else 2)


def test_a_number_of_threads_that_is_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    set_up(["--batch_size", "4"], prog="test", description="", logs=False)
    assert torch.get_num_threads() == 2


def test_building_a_cli_changes_nothing_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: pytest.fail("memory was set"))
    torch.set_num_threads(2)

    def process() -> tuple[object, ...]:
        levels = [logging.getLogger(name).level for name in ("lit_cifar", "lightning.pytorch", "lightning.fabric")]
        kernels = torch.backends.mkldnn.enabled, torch.get_num_threads()
        return *kernels, *levels, list(warnings.filters), gc.get_freeze_count(), os.environ.get("LIT_CIFAR_RESUME")

    before = process()
    for flags in (["--batch_size", "4", "--log_level", "error"], ["--batch_size", "500"]):
        make_cli(flags)
        assert process() == before


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_kept_memory_is_not_given_back_to_the_system() -> None:
    code = (
        "import torch; from lit_cifar.cli.machine import keep_freed_memory\n"
        "def grown():\n"
        "    before = resident(); torch.ones(2**27); return resident() - before\n"
        "def resident(): return 4096 * int(open('/proc/self/statm').read().split()[1])\n"
        "print(grown()); keep_freed_memory(); print(grown())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert returned < 0.1 * 2**29
    assert kept > 0.9 * 2**29


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--devices", "auto"], None),
        (["--devices", "2"], {"gradient_as_bucket_view": True, "static_graph": True}),
        (["--devices", "2", "--strategy", "ddp"], {"gradient_as_bucket_view": True, "static_graph": True}),
        (
            ["--devices", "2", "--model.net", "torchvision.models.resnet18", "--model.net.num_classes", "10"],
            {"gradient_as_bucket_view": True, "static_graph": False},
        ),
        (
            ["--devices", "2", "--model", "test_classes.Scaled"],  # which may leave parameters unused
            {"gradient_as_bucket_view": True, "static_graph": False},
        ),
        (["--devices", "2", "--strategy", "ddp_find_unused_parameters_true"], {"find_unused_parameters": True}),
    ],
)
def test_several_devices_exchange_gradients_without_copies(flags: list[str], expected: dict[str, bool] | None) -> None:
    strategy = make_cli(["--accelerator", "cpu", *flags]).trainer.strategy
    if expected is None:
        assert not isinstance(strategy, DDPStrategy)
    else:
        assert isinstance(strategy, DDPStrategy)
        assert strategy._ddp_kwargs == expected


SLURM = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "lit_cifar", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"},
    **{"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
}


def _cli(*args: str) -> CLI:
    return CLI(["--accelerator", "cpu", "--dataset", "shapes", *args], prog="fit", description="")


@pytest.mark.parametrize(
    ("without", "flags", "message"),
    [
        ("", ["--devices", "4", "--num_nodes", "2"], "Slurm started 4 tasks, .* makes 8: "),
        ("", [], "Slurm started 4 tasks, .* --devices 1 on --num_nodes 1 makes 1: "),
        ("", ["--devices", "4", "--num_nodes", "1"], "`devices=4` .*`--ntasks-per-node=2`"),
        ("SLURM_NTASKS_PER_NODE", ["--devices", "2", "--num_nodes", "2"], "`--ntasks=4`.*--ntasks-per-node"),
    ],
)
def test_an_allocation_of_slurm_that_differs_from_the_devices_is_refused(
    without: str, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(without, raising=False)
    with pytest.raises(UserError, match=message):
        _cli(*flags)


def test_under_slurm_nothing_but_checkpoints_answers_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    environment = _cli("--devices", "2", "--num_nodes", "2").trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue


def test_a_single_device_within_an_allocation_and_without_srun_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID")  # as in the job's script itself
    assert _cli().trainer.world_size == 1


def test_another_pipe_than_the_output_that_breaks_keeps_its_traceback() -> None:
    def write_to_a_broken_pipe(args: list[str]) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb", buffering=0) as pipe:
            pipe.write(b"unread")

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(BrokenPipeError):
            errors.run(write_to_a_broken_pipe)
    finally:
        signal.signal(signal.SIGINT, handler)


# ---- optimisers and schedulers of torch ----

FEW = ["--dataset", "shapes", "--accelerator", "cpu", "--batch_size", "100", "--max_epochs", "1"]
FEW += ["--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "1", "--log_level", "warning"]
ADAMW = ["--model.optimizer", "AdamW", "--model.scheduler", "StepLR", "--model.scheduler.step_size", "1"]


def after_a_step(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Such as lines send people to write."""
    parts: list[torch.optim.lr_scheduler.LRScheduler] = [
        torch.optim.lr_scheduler.ConstantLR(optimizer),
        torch.optim.lr_scheduler.LinearLR(optimizer),
    ]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [1])


@pytest.mark.parametrize("path", ["", "torch.optim.lr_scheduler."])
@pytest.mark.parametrize("name", ["SequentialLR", "ChainedScheduler"])
def test_schedulers_made_of_others_are_made_by_a_function_that_is_named(name: str, path: str) -> None:
    made_of = {"class_path": f"{path}{name}", "init_args": {"schedulers": ["LinearLR"], "milestones": [1]}}
    Path("config.yaml").write_text(yaml.safe_dump({"model": {"scheduler": made_of}}))
    for flags in (["--model.scheduler", f"{path}{name}"], ["--config", "config.yaml"]):
        line = error_of(lit_cifar.fit.main, [*FEW, *flags])
        assert "name a function of your own that makes it" in line
        assert "schedulers VALUE" not in line


def test_a_function_that_makes_a_scheduler_is_named() -> None:
    assert make_cli([*FEW, "--model.scheduler", "test_cli.after_a_step"]).model._scheduler is after_a_step


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--model.optimizer", "AdamW"],
        ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"],
        ["--model.scheduler", "OneCycleLR", "--model.scheduler.max_lr", "0.1"],
    ],
    ids=" ".join,
)
def test_a_printed_config_has_the_numbers_that_are_trained_with(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = yaml.safe_load(print_config(*FEW, *flags, capsys=capsys))["model"]
    command = CLI([*FEW, *flags], prog="test", description="")
    used = command.plain_config["model"]
    assert isinstance(used["lr"], float)
    for key in ("lr", "momentum", "weight_decay", "nesterov"):
        assert printed[key] == used[key]


def test_what_a_resumed_run_cannot_change_is_said_as_flags() -> None:
    lit_cifar.fit.main([*FEW, *ADAMW])
    for flags, words in (
        (["--model.scheduler.gamma", "0.3"], "--model.scheduler.gamma was 0.1 and is now 0.3; a run goes on"),
        (["--lr", "0.3"], "--model.lr was 0.001 and is now 0.3; a run goes on"),
        (["--model.optimizer", "Adam"], "--model.optimizer was torch.optim.AdamW and is now torch.optim.Adam; a run"),
        (["--model.optimizer.eps", "0.5", "--seed", "1"], "--seed was 0 and is now 1, --model.optimizer.eps was 1e-08"),
        (
            ["--model.scheduler", "null"],
            "--model.scheduler was torch.optim.lr_scheduler.StepLR and is now nothing; a run",
        ),
    ):
        line = error_of(lit_cifar.fit.main, ["--resume", "auto", *flags])
        assert line.startswith("--resume: --")
        assert words in line
        assert "{" not in line
