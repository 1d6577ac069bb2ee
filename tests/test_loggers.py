"""Loggers that people choose: each gets what it can take, in the run's own folder; a resumed run goes on with them; and
what fails in one costs nothing. TensorBoard's pages are tested in test_dashboard.py."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, SHAPES, SHORT, Run, error_of, results
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_cifar.fit
import lit_cifar.sweep
import lit_cifar.test
from lit_cifar import log
from lit_cifar.cli.command import set_up
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.model.module import LitClassifier, named_for
from lit_cifar.nets import Net
from lit_cifar.run.chosen import WORDS
from lit_cifar.run.folder import RUNS
from lit_cifar.run.stop import Stopped

VALIDATED = [
    *SHAPES,
    "--batch_size",
    "32",
    "--lr",
    "0.05",
    "--data.num_val",
    "100",
    "--trainer.limit_train_batches",
    "4",
]
VALIDATED += ["--trainer.log_every_n_steps", "2", "--trainer.limit_test_batches", "1", "--max_epochs", "1"]
PLACES: dict[str, Any] = {"save_dir": "."}
CSV = {"class_path": "CSVLogger", "init_args": PLACES}
TENSORBOARD = {"class_path": "TensorBoardLogger", "init_args": PLACES}
MLFLOW = {"class_path": "MLFlowLogger"}
WANDB = {"class_path": "WandbLogger", "init_args": {"offline": True}}
RUN = RUNS / "version_0"
OF_FILES = ("count", "width", "height", "size", "ncols", "nrows")  # of pictures and tables in W&B's rows
PICTURES = {"val/confusion", "val/mistakes", "test/confusion", "test/reliability", "train/images", "net/filters"}


@pytest.fixture(autouse=True)
def _nothing_is_sent_or_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_DATA_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "cache"),
        "WANDB_DISABLE_GIT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def wandb() -> Iterator[Any]:
    """W&B's package, whose service process ends with the tests of this file."""
    wandb = pytest.importorskip("wandb", reason="needs wandb: pip install 'lit_cifar[loggers]'")
    yield wandb
    wandb.teardown()


@pytest.fixture
def mlflow() -> Any:
    return pytest.importorskip("mlflow", reason="needs mlflow: pip install 'lit_cifar[loggers]'")


def fit(loggers: Any, *args: str) -> None:
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    lit_cifar.fit.main(["--config", "loggers.yaml", *VALIDATED, *args])


# ---- what loggers have, read as little through them as can be ----


def rows(file: Path = RUN / "metrics.csv") -> list[tuple[str, int, float]]:
    with file.open(newline="") as opened:
        return [
            (name, int(row["step"]), float(value))
            for row in csv.DictReader(opened)
            for name, value in row.items()
            if value and name != "step"
        ]


def points(folder: Path = RUN) -> list[tuple[str, int, float]]:
    """Of TensorBoard's events."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


def mlflow_run() -> Path:
    (run,) = (path for path in RUN.glob("mlruns/*/*") if (path / "metrics").is_dir())
    return run


def mlflow_points() -> list[tuple[str, int, float]]:
    metrics = mlflow_run() / "metrics"
    return [
        (str(file.relative_to(metrics)), int(line.split()[2]), float(line.split()[1]))
        for file in metrics.rglob("*")
        if file.is_file()
        for line in file.read_text().splitlines()
    ]


def in_mlflow(tag: str) -> str:
    """val/accuracy/star as val/accuracy.star."""
    return re.sub("(?<=/)(.*?)/", r"\1.", tag)


def wandb_records(file: Path) -> list[Any]:
    """What W&B's service has written of an offline run: blocks of 32 KiB, as LevelDB's logs have them."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def wandb_points(file: Path) -> list[tuple[str, int, float]]:
    found = []
    for record in wandb_records(file):
        row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        step = int(row.get("trainer/global_step", -1))
        numbers = {
            name: value for name, value in row.items() if re.fullmatch(r"(train|val|test|lr)/[^_/]+(/[^_/]+)?", name)
        }
        numbers = {name: value for name, value in numbers.items() if name.split("/")[-1] not in OF_FILES}
        found += [(name, step, float(value)) for name, value in numbers.items() if re.fullmatch(r"[-\d.e]+", value)]
    return found


def exit_codes(file: Path) -> list[int]:
    return [record.exit.exit_code for record in wandb_records(file) if record.HasField("exit")]


def once(found: list[tuple[str, int, float]]) -> dict[tuple[str, int], float]:
    """Values by tag and step, each of which was logged once; without the run's speed, which no two runs share."""
    twice = [key for key, count in Counter(point[:2] for point in found).items() if count > 1]
    assert not twice
    return {(tag, step): value for tag, step, value in found if not tag.startswith("speed/")}


# ---- all at once ----


def check_first_run(mlflow_too: bool = True) -> None:
    assert set(os.listdir()) <= {"cache", "lightning_logs", "loggers.yaml"}
    assert os.listdir(RUNS) == ["version_0"]
    figures = once(rows())
    assert {("train/loss", 4), ("val/accuracy", 4), ("test/accuracy", 4), ("test/accuracy/star", 4)} <= figures.keys()
    hparams = yaml.safe_load((RUN / "hparams.yaml").read_text())
    assert {"net": "Net", "lr": 0.05, "num_val": 100}.items() <= hparams.items()
    of_tensorboard = once(points())
    assert of_tensorboard.keys() == figures.keys()
    assert all(figures[key] == pytest.approx(value) for key, value in of_tensorboard.items())
    events = EventAccumulator(str(RUN))
    events.Reload()
    assert set(events.Tags()["images"]) >= PICTURES
    assert events.Tags()["graph"]
    if mlflow_too:
        assert once(mlflow_points()) == {
            (re.sub("(?<=/)(.*?)/", r"\1.", t), step): v for (t, step), v in figures.items()
        }
        params = {file.name: file.read_text() for file in (mlflow_run() / "params").iterdir()}
        assert params == {name: str(value) for name, value in hparams.items()}
        pictures = [path.name for path in (mlflow_run() / "artifacts/images").iterdir()]
        shown = {re.sub("[~#]", "/", re.split("[+%]", name)[0]) for name in pictures}  # "#" and "%" before MLflow 3.6
        assert shown >= PICTURES
        assert "star" in (mlflow_run() / "artifacts" / "test" / "classes.md").read_text()
        assert "batch_size: 32" in (mlflow_run() / "artifacts" / "config.md").read_text()


def check_wandb(file: Path) -> None:
    figures = {key: value for key, value in once(rows()).items() if "_" not in key[0]}
    assert once(wandb_points(file)) == figures
    assert exit_codes(file) == [0], "finished, so that `wandb sync` takes it"
    records = wandb_records(file)
    config = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert config.items() >= yaml.safe_load((RUN / "hparams.yaml").read_text()).items()
    for tag in PICTURES:
        assert list((file.parent / "files" / "media" / "images").rglob(f"{tag}_*.png")), tag
    (table,) = (file.parent / "files" / "media" / "table" / "test").glob("classes*.json")
    assert "star" in table.read_text()


def test_all_loggers_at_once_get_all_in_the_runs_folder_and_go_on_with_it(
    wandb: Any, mlflow: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    fit([WANDB, MLFLOW, CSV, TENSORBOARD])
    check_first_run()
    (first,) = RUN.glob("wandb/offline-run-*/*.wandb")
    check_wandb(first)
    before = once(rows())

    files = {path: path.stat().st_mtime_ns for path in RUN.rglob("*")}
    lit_cifar.test.main(["--ckpt_path", str(RUN / "checkpoints/last.ckpt"), "--accelerator", "cpu"])
    changed = {path for path in RUN.rglob("*") if files.get(path) != path.stat().st_mtime_ns}
    assert {path.name for path in changed} == {"test-last.json"}, "a test on its own belongs to no logger's run"

    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2"])
    after = once(rows())
    assert after.items() >= before.items()
    assert {("train/loss", 8), ("val/accuracy", 8), ("test/accuracy", 8)} <= after.keys()
    assert once(points()).keys() == after.keys()
    assert len(once(mlflow_points())) == len(after)
    pieces = sorted(RUN.glob("wandb/offline-run-*/*.wandb"))
    assert len(pieces) == 2
    assert pieces[0].name == pieces[1].name, "one run of W&B"
    assert once([point for piece in pieces for point in wandb_points(piece)]).keys() == {
        key for key in after if "_" not in key[0]
    }

    lit_cifar.fit.main(["--resume", "auto"])  # nothing is left but the test, which is repeated
    assert once(rows()) == after
    assert once(points()).keys() == after.keys()
    assert len(once(mlflow_points())) == len(after)
    assert once([point for piece in RUN.glob("wandb/*/*.wandb") for point in wandb_points(piece)])
    assert "warning: the logger" not in capfd.readouterr().err


def test_the_order_of_loggers_decides_nothing() -> None:
    fit([CSV, TENSORBOARD])
    check_first_run(mlflow_too=False)


def test_two_of_a_class_do_not_share_their_files() -> None:
    fit([CSV, TENSORBOARD, TENSORBOARD, {**CSV, "init_args": {**PLACES, "prefix": "p", "name": "own"}}, CSV])
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2"])
    figures = once(rows())
    for folder in (RUN, RUN / "tensorboard-2"):
        assert once(points(folder)).keys() == figures.keys()
        events = EventAccumulator(str(folder))
        events.Reload()
        assert events.Tags()["graph"]
        assert "custom_scalars__config__" in events.Tags()["tensors"]
        assert set(events.Tags()["images"]) >= PICTURES
    assert once(rows(RUN / "csv-3" / "metrics.csv")).keys() == figures.keys()
    prefixed = {(tag.removeprefix("p-"), step) for tag, step in once(rows(RUN / "own" / "csv-2" / "metrics.csv"))}
    assert prefixed >= figures.keys()


class OwnTable(CSVLogger):
    """Hands its settings on, as many a subclass does."""

    def __init__(self, extra: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class OwnEvents(TensorBoardLogger):
    """Another one."""

    def __init__(self, extra: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def test_subclasses_of_lightnings_loggers_are_gone_on_with_too() -> None:
    own = [{"class_path": f"test_loggers.{name}", "init_args": PLACES} for name in ("OwnTable", "OwnEvents")]
    fit(own)
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2", "--trust", "true"])
    assert {("test/accuracy", 4), ("test/accuracy", 8)} <= once(rows()).keys()
    assert {("test/accuracy", 4), ("test/accuracy", 8)} <= once(points()).keys()
    assert os.listdir(RUNS) == ["version_0"]


# ---- a run that ends otherwise ----


class Snapshot(Callback):
    """Copies the runs when a step is about to be taken: what a kill -9 would leave."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            shutil.copytree(RUNS, Path("killed") / RUNS)


def test_a_killed_run_has_all_rows_once_when_it_is_resumed(mlflow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--trainer.callbacks", "test_loggers.Snapshot", "--trainer.callbacks.step", "11"]
    flags += ["--checkpoint.every_n_train_steps", "6", "--max_epochs", "3"]
    fit([CSV, TENSORBOARD, MLFLOW], *flags)
    whole = once(rows())
    monkeypatch.chdir("killed")
    killed = once(rows())
    assert max(step for _, step in killed) <= 10
    with (RUN / "metrics.csv").open("a") as file:
        file.write("0.05,1.")  # cut
    (run,) = RUN.glob("mlruns/*/*/meta.yaml")
    lit_cifar.fit.main(["--resume", "auto", "--trust", "true"])
    assert once(rows()) == whole
    assert once(points()).keys() == whole.keys()
    assert once([point for point in mlflow_points() if not point[0].startswith("speed/")]).keys() == {
        (in_mlflow(tag), step) for tag, step in whole
    }
    assert list(RUN.glob("mlruns/*/*/meta.yaml")) == [run]


class KillAt(Callback):
    """Ends this process with SIGKILL at a step, once W&B's service has had its second to write."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            time.sleep(3)
            os.kill(os.getpid(), signal.SIGKILL)


class Fails(Callback):
    """Ends the training run at a step: by an error, or as a signal does."""

    def __init__(self, step: int, stops: bool) -> None:
        self.step, self.stops = step, stops

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Stopped("stopped by SIGTERM") if self.stops else AssertionError("a bug")


def test_what_wandb_has_is_finished_however_a_run_ends(wandb: Any) -> None:
    for number, stops in enumerate([False, True]):
        flags = ["--trainer.callbacks", "test_loggers.Fails", "--trainer.callbacks.step", "3"]
        with pytest.raises(Stopped if stops else AssertionError):
            fit(WANDB, *flags, "--trainer.callbacks.stops", str(stops).lower())
        (file,) = (RUNS / f"version_{number}").glob("wandb/offline-run-*/*.wandb")
        assert exit_codes(file) == [1]
        assert ("train/loss", 2) in once(wandb_points(file)), "a run of its own, not the one before"
    assert wandb.run is None


# ---- loggers that fail ----


class Recorder(Logger):
    """Keeps what it is given, and fails in one method from its second call on."""

    name, version = "recorder", "0"
    calls: list[str]

    def __init__(self, fails_in: str = "") -> None:
        super().__init__()
        self.fails_in = fails_in
        type(self).calls = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in and (self.calls.count(name) > 1 or name == "log_hyperparams"):
            raise OSError(28, "No space left on device")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._call("log_metrics")

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._call("log_hyperparams")
        type(self).params = params  # type: ignore[attr-defined]

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self._call("log_image")

    def save(self) -> None:
        self._call("save")

    def finalize(self, status: str) -> None:
        self._call("finalize")


@pytest.mark.parametrize("method", ["log_metrics", "log_hyperparams", "log_image", "save", "finalize"])
def test_a_logger_that_fails_costs_one_warning_and_nothing_else(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    failing = {"class_path": "test_loggers.Recorder", "init_args": {"fails_in": method}}
    fit([failing, CSV])
    errors = [line for line in capfd.readouterr().err.splitlines() if "logger" in line]
    (line,) = errors
    assert line.startswith(f"lit_cifar: warning: the logger Recorder failed in {method} (OSError: [Errno 28] No space")
    assert results("version_0")["num_steps"] == 4
    assert {("train/loss", 4), ("val/accuracy", 4), ("test/accuracy", 4)} <= once(rows()).keys()
    calls = Recorder.calls
    assert calls.count(method) == (1 if method == "log_hyperparams" else 2), "it is not called again"
    if method == "log_metrics":
        assert calls[-1] == "log_metrics", "nor is anything else of it"
    else:
        assert calls.count("log_metrics") == 4  # two of training, one of each evaluation


def test_what_fails_in_a_logger_is_shown_with_log_level_debug(capfd: pytest.CaptureFixture[str]) -> None:
    fit({"class_path": "test_loggers.Recorder", "init_args": {"fails_in": "log_metrics"}}, "--log_level", "debug")
    errors = capfd.readouterr().err
    assert "Traceback" in errors
    assert "in log_metrics" in errors


# ---- settings ----


def test_hyperparameters_are_one_short_set_also_where_the_module_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(self: LitClassifier, stage: str) -> None:
        self.save_hyperparameters({"lr": 9.0, "of_module": 1})
        own(self, stage)

    own = LitClassifier.setup
    monkeypatch.setattr(LitClassifier, "setup", setup)
    fit([{"class_path": "test_loggers.Recorder"}, TENSORBOARD])
    assert Recorder.calls.count("log_hyperparams") == 1
    params: dict[str, Any] = Recorder.params  # type: ignore[attr-defined]
    assert "of_module" not in params
    assert (params["lr"], params["net"]) == (0.05, "Net")
    assert "hp_metric" not in {tag for tag, *_ in points()}
    fit({"class_path": "test_loggers.Recorder"}, "--trainer.enable_autolog_hparams", "false")
    assert "log_hyperparams" not in Recorder.calls


class Elsewhere(Logger):
    """Writes a file where it is told to, as W&B's does."""

    name, version = "elsewhere", None

    def __init__(self, save_dir: str = ".", version: str | None = None) -> None:
        super().__init__()
        self._save_dir, self.version = save_dir, version or "first"  # type: ignore[assignment]
        Path(save_dir, f"{self.version}.txt").write_text("")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Does nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""


def test_a_loggers_default_place_is_the_runs_folder_wherever_that_is() -> None:
    fit([{"class_path": "test_loggers.Elsewhere"}, CSV], "--trainer.default_root_dir", "out")
    run = Path("out") / RUN
    assert (run / "first.txt").is_file()
    fit({"class_path": "CSVLogger", "init_args": {"save_dir": "out"}}, "--trainer.default_root_dir", "out")
    lit_cifar.fit.main(["--resume", str(Path("out") / RUNS / "version_1"), "--max_epochs", "2"])
    assert {("test/accuracy", 4), ("test/accuracy", 8)} <= once(
        rows(Path("out") / RUNS / "version_1/metrics.csv")
    ).keys()
    assert sorted(os.listdir(Path("out") / RUNS)) == ["version_0", "version_1"]
    assert (
        sorted(os.listdir()) == ["cache", "loggers.yaml", "out"] if Path("cache").exists() else ["loggers.yaml", "out"]
    )


def test_a_place_that_was_chosen_is_gone_on_with() -> None:
    chosen = {"class_path": "CSVLogger", "init_args": {"save_dir": "mine", "name": "exp"}}
    Path("mine/exp/version_0").mkdir(parents=True)
    events = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "events"}}
    fit([chosen, events])
    first = once(rows(Path("mine/exp/version_1/metrics.csv")))
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2"])
    assert once(rows(Path("mine/exp/version_1/metrics.csv"))).items() > first.items()
    assert sorted(os.listdir("mine/exp")) == ["version_0", "version_1"]
    assert os.listdir("events/lightning_logs") == ["version_0"]
    assert {("test/accuracy", 4), ("test/accuracy", 8)} <= once(points(Path("events/lightning_logs/version_0"))).keys()


@pytest.mark.parametrize("damage", ["{", '{"test_loggers.Elsewhere": 3}', '{"test_loggers.Elsewhere": ["../escaped"]}'])
def test_a_damaged_note_of_what_loggers_began_costs_nothing(damage: str) -> None:
    fit({"class_path": "test_loggers.Elsewhere"})
    note = RUN / "loggers.json"
    assert json.loads(note.read_text()) == {"test_loggers.Elsewhere": ["first"]}
    note.write_text(damage)
    lit_cifar.fit.main(["--resume", "auto", "--max_epochs", "2", "--trust", "true"])
    assert not list(RUNS.glob("*.txt"))
    assert json.loads(note.read_text())["test_loggers.Elsewhere"] == ["first"]


@pytest.mark.parametrize("word", ["csv", "CSV", "wandb", "mlflow", "tensorboard", "none", "comet", "csvlogger"])
def test_a_word_for_a_logger_ends_in_the_line_that_works(word: str) -> None:
    message = error_of(lit_cifar.fit.main, [*SHORT, "--trainer.logger", word])
    flags = re.fullmatch(rf"--trainer.logger: there is no class {word}: use (--trainer.logger .*)", message)
    assert flags, message
    set_up([*SHORT, *flags[1].split()], prog="fit", description="")
    assert flags[1] == f"--trainer.logger {WORDS[word.lower().removesuffix('logger')]}"


def test_other_words_are_answered_with_the_choices() -> None:
    assert "false, CSVLogger, Wandb" in error_of(lit_cifar.fit.main, [*SHORT, "--trainer.logger", "NeptuneLogger"])
    message = error_of(lit_cifar.fit.main, [*SHORT, "--trainer.logger", "CSVLogger"])
    assert "required: save_dir: add --trainer.logger.save_dir . for the run's folder; in a list, Tensor" in message


@pytest.mark.parametrize("listed", ["[true, CSVLogger]", "[{class_path: WandbLogger}, false]", "[true]"])
def test_true_and_false_in_a_list_of_loggers_end_in_the_line_that_works(listed: str) -> None:
    message = error_of(lit_cifar.fit.main, [*SHORT, "--trainer.logger", listed])
    found = re.fullmatch(
        r"--trainer.logger: (true|false) cannot stand beside others: in a list, TensorBoard is (.*)", message
    )
    assert found, message
    set_up([*SHORT, "--trainer.logger", f"[{found[2]}]"], prog="fit", description="")


@pytest.mark.parametrize(("listed", "word"), [("[null]", "None"), ("[3, Timer]", "3"), ("[true]", "True")])
def test_what_is_no_class_in_a_list_is_named(listed: str, word: str) -> None:
    message = error_of(lit_cifar.fit.main, [*SHORT, "--trainer.callbacks", listed])
    assert message == f"--trainer.callbacks: there is no class {word}: name it as package.Class"


def test_the_documents_list_of_loggers_parses() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/parts.md").read_text().split("## Loggers")[1], re.DOTALL)
    Path("shown.yaml").write_text(shown)
    command = set_up(["--config", "shown.yaml", *SHORT], prog="fit", description="")
    assert [logger.class_path.rsplit(".", 1)[-1] for logger in command._loggers] == ["TensorBoardLogger", "WandbLogger"]


# ---- elsewhere than in fit on one device ----


def test_other_ranks_make_no_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("loggers.yaml").write_text(
        yaml.safe_dump({"trainer": {"logger": [{"class_path": "test_loggers.Elsewhere"}, CSV]}})
    )
    command = set_up(["--config", "loggers.yaml", *SHORT], prog="fit", description="")
    assert command.run is not None
    command.run.claim()
    monkeypatch.setattr(log, "rank", lambda: 1)
    loggers = lit_cifar.run.chosen.make_loggers(command._loggers, command.run, None)
    assert [type(logger) for logger in loggers] == [DummyLogger, DummyLogger]
    assert not list(command.run.folder.glob("*.txt"))
    command.run.unlock()


def test_a_plain_trainer_logs_to_all_of_them(mlflow: Any) -> None:
    from lightning.pytorch.loggers import MLFlowLogger

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    mlflow_logger = MLFlowLogger(save_dir="ml", prefix="p")
    loggers = [CSVLogger("csv"), TensorBoardLogger("tb", default_hp_metric=False), mlflow_logger]
    trainer = Trainer(
        max_steps=2,
        limit_test_batches=1,
        logger=loggers,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    module, data = LitClassifier(Net()), CIFAR10DataModule(dataset="shapes")
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    (found,) = Path("ml").glob("*/*/metrics/p-test")
    assert {"accuracy", "accuracy.star"} <= set(os.listdir(found))
    assert "test/accuracy" in (Path("csv") / RUNS / "version_0" / "metrics.csv").read_text()
    assert ("test/accuracy", 2) in once(points(Path("tb") / RUNS / "version_0"))


def test_a_name_of_several_parts_is_a_file_in_one_folder_for_mlflow(mlflow: Any) -> None:
    from lightning.pytorch.loggers import MLFlowLogger

    names = ["test/accuracy", "test/accuracy/cat/dog", "lr/a/b", "epoch"]
    renamed = named_for(MLFlowLogger(save_dir="ml"), dict.fromkeys(names, 1.0))
    assert list(renamed) == ["test/accuracy", "test/accuracy.cat.dog", "lr/a.b", "epoch"]
    assert named_for(CSVLogger("csv"), {"val/accuracy/cat": 1.0}) == {"val/accuracy/cat": 1.0}, "as everywhere else"


def test_a_sweeps_trials_have_loggers_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs optuna: pip install 'lit_cifar[sweep]'")
    Path("space.yaml").write_text("data.augment.cutout: {choices: [0, 4]}\n")
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": [CSV]}}))
    flags = ["--study", "space.yaml", "--trials", "2", "--config", "loggers.yaml", *VALIDATED]
    lit_cifar.sweep.main(["tutorial", *flags])
    for run in ("version_0", "version_1"):
        assert ("val/accuracy", 4) in once(rows(RUNS / run / "metrics.csv"))
        assert "data.augment.cutout" in yaml.safe_load((RUNS / run / "hparams.yaml").read_text())


@pytest.mark.slow
def test_two_processes_make_one_run_of_wandb_and_one_table(run_command: Run, wandb: Any) -> None:
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": [WANDB, CSV]}}))
    done = run_command("lit_cifar.fit", "--config", "loggers.yaml", *VALIDATED, "--devices", "2")
    assert done.returncode == 0, done.stderr
    (file,) = RUN.glob("wandb/offline-run-*/*.wandb")
    check_wandb(file)
    assert os.listdir(RUNS) == ["version_0"]


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_and_goes_on(run_command: Run, wandb: Any, tmp_path: Path) -> None:
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": [WANDB, CSV]}}))
    flags = ["--config", "loggers.yaml", *VALIDATED, "--max_epochs", "3", "--checkpoint.every_n_train_steps", "6"]
    flags += ["--trainer.callbacks", "test_loggers.KillAt", "--trainer.callbacks.step", "11"]
    assert run_command("lit_cifar.fit", *flags).returncode == -9
    killed = once(rows())
    flags = ["--resume", "auto", "--trust", "true", "--trainer.callbacks", "null"]
    assert run_command("lit_cifar.fit", *flags).returncode == 0
    figures = once(rows())
    assert killed.keys() - figures.keys() == set()
    pieces = sorted(RUN.glob("wandb/offline-run-*/*.wandb"))
    assert len({piece.name for piece in pieces}) == 1
    found = {key[:2] for piece in pieces for key in wandb_points(piece)}
    assert found == {key for key in figures if "_" not in key[0]}, "no row is lost"
    for path in Path("/proc").glob("[0-9]*/environ"):  # where there is one; not all are readable
        with contextlib.suppress(OSError):
            assert os.fsencode(tmp_path) not in path.read_bytes(), "W&B's service ends with the run"
