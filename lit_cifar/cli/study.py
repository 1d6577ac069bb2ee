"""Where a sweep keeps its trials: Optuna's storage, used by one sweep at a time, and a file in each trial's run.
sweep.py runs the trials; space.py reads what they search."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lit_cifar.cli.space import flag_text
from lit_cifar.errors import UserError
from lit_cifar.files import check_place, write_durably, writing
from lit_cifar.run.folder import Run
from lit_cifar.text import printable

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

STUDY = "lit_cifar"  # the one study of a storage
WAY_OUT = "name another --storage"


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
        for change in _changes(before[section], settings[section]):
            raise UserError(
                f"{label}{change}; a sweep keeps the settings it began with: undo the change, or begin another one "
                "with --storage FILE"
            )


def _changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _changes(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key} was {_shown(before)} and is now {_shown(now)}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else printable(flag_text(value))


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
