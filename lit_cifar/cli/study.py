"""What a study file says to search, settings by their keys, each with a range or a list of choices; and where a sweep
keeps its trials: Optuna's storage, used by one sweep at a time, and a file in each trial's run. sweep.py runs them."""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from lit_cifar.cli.configs import changes, flag_text
from lit_cifar.cli.parser import Parser
from lit_cifar.errors import UserError
from lit_cifar.files import check_place, write_durably, writing
from lit_cifar.run.folder import Run
from lit_cifar.run.trust import MAX_YAML, load_yaml
from lit_cifar.text import escaped, nearest, printable

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STUDY = "lit_cifar"  # the one study of a storage
WAY_OUT = "name another --storage"
# What trials are judged by, and where they run, is the same for all: a search would find the easiest test.
NOT_SEARCHED = ("data.data_dir", "data.dataset", "data.num_val", "data.mirrors", "trainer.default_root_dir")
MAX_NUMBER = sys.float_info.max
ENTRY_KEYS = ("choices", "low", "high", "log", "step")
Space = dict[str, dict[str, Any]]  # by dotted key: {"choices": texts}, or {"low", "high", "log", "step"}
Values = dict[str, Any]  # by dotted key


def read_space(file: Path, parser: Parser) -> Space:
    """What a YAML file of keys says to search, by the dotted keys that configs have, sorted.

    Args:
        file: maps keys, in either of their spellings, to {low: ..., high: ...} or {choices: [...]}.
        parser: the command's, which has all keys.

    Raises:
        UserError: the file cannot be read, or a key, a range or a list of choices in it is wrong.
    """
    try:
        with open(file, encoding="utf-8") as text:
            entries = load_yaml(text.read(MAX_YAML + 1))
    except OSError as error:
        raise UserError(f"--study {file} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--study {file} is no valid YAML: {escaped(' '.join(str(error).split()))}") from None
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"--study {file} maps no keys to what is searched, such as model.lr: {{low: 0.001, high: 0.1}}")
    space: Space = {}
    for key, entry in entries.items():
        where = f"{file}: {printable(str(key))}"
        dotted = _dotted(str(key), file, parser)
        if dotted in space:
            raise UserError(f"{where} is given twice, in two spellings: leave one")
        space[dotted] = _entry(where, entry)
    return dict(sorted(space.items()))  # a sampler draws in this order


def distribution(entry: dict[str, Any]) -> "BaseDistribution":
    """Optuna's distribution for one entry of a Space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if "choices" in entry:
        return CategoricalDistribution(entry["choices"])
    kind = IntDistribution if isinstance(entry["low"], int) else FloatDistribution
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna lowers high to the last value that steps reach, as Python's range does
        return kind(**entry)


def corners(space: Space) -> Iterator[Values]:
    """Sets of values that together contain every choice and both ends of every range."""
    for i in range(max(2, *(len(entry.get("choices", ())) for entry in space.values()))):
        yield {
            key: entry["choices"][i % len(entry["choices"])] if "choices" in entry else entry[("low", "high")[i % 2]]
            for key, entry in space.items()
        }


def _dotted(key: str, file: Path, parser: Parser) -> str:
    option = parser.option(key)
    known = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
    # keys of a class, such as model.net.num_classes, are unknown to the parser until it has read which class
    inside = any("." in name and key.startswith(f"{name}.") for name in known)
    if option is None and not inside:
        raise UserError(f"{file}: unknown key {key!r}{nearest(key, known)}; --print_config lists the keys")
    dotted = option.dest if option else key
    if dotted in NOT_SEARCHED or not dotted.startswith(("model.", "data.", "trainer.")):
        raise UserError(f"{file}: {key} cannot be searched: all trials of a sweep share it; give it as a flag")
    return dotted


def _entry(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected {{low: ..., high: ...}} or {{choices: [...]}}, got {entry!r}")
    for name in entry:
        if name not in ENTRY_KEYS:
            near = nearest(str(name), ENTRY_KEYS)
            raise UserError(f"{where}: unknown key {name!r}{near}; known are {', '.join(ENTRY_KEYS)}")
    return _choices(where, entry) if "choices" in entry else _range(where, entry)


def _choices(where: str, entry: dict[str, Any]) -> dict[str, Any]:
    choices = entry["choices"]
    if len(entry) > 1 or not isinstance(choices, list) or not choices:
        raise UserError(f"{where}: choices is a list of one value or more, and stands alone; got {entry!r}")
    texts = [flag_text(choice) for choice in choices]
    if len(set(texts)) < len(texts):
        raise UserError(f"{where}: one of the choices {', '.join(texts)} is given twice")
    return {"choices": texts}


def _range(where: str, entry: dict[str, Any]) -> dict[str, Any]:
    if not {"low", "high"} <= entry.keys():
        raise UserError(f"{where}: a range needs both low and high; got {entry!r}")
    low, high = (_number(where, name, entry[name]) for name in ("low", "high"))
    log, step = entry.get("log", False), entry.get("step")
    step = None if step is None else _number(where, "step", step)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log: expected true or false, got {log!r}")
    whole = all(isinstance(value, int) for value in (low, high, step))
    if low >= high:
        raise UserError(f"{where}: the range is empty: low {low} is not below high {high}")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"{where}: the range has no second value: step {step} is not between 0 and high minus low")
    if log and (low <= 0 or (step is not None and not (whole and step == 1))):
        raise UserError(f"{where}: log: true needs low above 0, and no step but 1 of whole numbers; got {entry!r}")
    if not whole:
        low, high = float(low), float(high)
    return {"low": low, "high": high, "log": log, "step": step}


def _number(where: str, name: str, value: Any) -> int | float:
    if isinstance(value, str):  # YAML 1.1 takes 1e-3, without a point, for text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
        raise UserError(f"{where}: {name}: expected a number, got {value!r}")
    return value


@contextlib.contextmanager
def open_study(storage: Path) -> Iterator["optuna.Study"]:
    """Opens or makes the study in a storage, which no other sweep can use meanwhile.

    Args:
        storage: an SQLite file.

    Raises:
        UserError: another sweep uses it, it is no storage, or it cannot be written.
    """
    optuna = import_optuna()
    from sqlalchemy.engine import URL
    from sqlalchemy.exc import SQLAlchemyError

    with _locked(storage):
        database = None
        try:
            database = optuna.storages.RDBStorage(URL.create("sqlite", database=str(storage)).render_as_string())
            yield optuna.create_study(
                study_name=STUDY,
                storage=database,
                direction="maximize",
                pruner=optuna.pruners.MedianPruner(),
                load_if_exists=True,
            )
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"the storage {storage} cannot be used ({cause}): {WAY_OUT}") from error
        finally:
            if database is not None:
                database.engine.dispose()


def best_config(storage: Path) -> Path:
    """Where the best trial's config is written in the end."""
    return storage.with_suffix(".best.yaml")


@contextlib.contextmanager
def _locked(storage: Path) -> Iterator[None]:
    lock = FileLock(storage.with_suffix(".lock"))
    if storage.suffix == ".lock":  # taking the lock would empty it
        raise UserError(f"--storage {storage}: that is the name of a lock; name a file that ends in .db")
    for path in (storage, best_config(storage)):
        check_place(path, WAY_OUT)
    with writing(storage, WAY_OUT):
        storage.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another sweep uses {storage}: wait for it, or {WAY_OUT}") from None
        except NotImplementedError as error:  # filelock's, where flock answers ENOSYS
            raise UserError(f"{storage.parent} does not support file locks: {WAY_OUT}") from error
    try:
        yield
    finally:
        lock.release()


def check_unchanged(study: "optuna.Study", settings: dict[str, Any], labels: dict[str, str]) -> None:
    """Checks that a study keeps the settings it began with; a new one records them.

    Args:
        study: its trials depend on the settings.
        settings: nested, by section.
        labels: what stands before a changed key of each section in the message, such as "--".

    Raises:
        UserError: one is not what it was.
    """
    settings = json.loads(json.dumps(settings))
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("settings", settings)
        return
    for section, label in labels.items():
        for change in changes(before[section], settings[section]):
            raise UserError(
                f"{label}{change}; a sweep keeps the settings it began with: undo the change, or begin another one "
                "with --storage FILE"
            )


def trials_of(study: "optuna.Study") -> "list[FrozenTrial]":
    """The trials that count, in their order: complete, pruned and failed ones, not those that were killed."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def mark_killed(study: "optuna.Study") -> None:
    """Marks trials that were running when their sweep was killed: nobody else uses the storage, so none runs now."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        record = trial.user_attrs.get("trial")  # none if it was killed before it had a run's folder
        if record and Path(record["run"]).is_dir():
            write_trial({**record, "state": "killed"})


def write_trial(record: dict[str, Any]) -> None:
    """Writes what is known of a trial into the folder of its run, `record["run"]`.

    Raises:
        UserError: the file cannot be written.
    """
    file = Run(folder=Path(record["run"])).trial
    with writing(file, "free some space, and start the sweep again: it continues"):
        write_durably(file, (json.dumps(record, indent=2) + "\n").encode())


def import_optuna() -> Any:
    """Optuna, without its own line for each trial.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("a sweep needs Optuna: pip install 'lit_cifar[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
