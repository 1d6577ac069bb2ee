"""The runs of one recipe under several seeds: trained one after another, or found where they were kept. bench.py
measures them, and fit.py trains one."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lit_cifar import fit
from lit_cifar.cli.configs import changes
from lit_cifar.errors import UserError
from lit_cifar.files import read_whole
from lit_cifar.process import LAUNCHER_VARIABLE
from lit_cifar.run.folder import RUNS, Run, run_version
from lit_cifar.run.read import states_of
from lit_cifar.run.stop import STOP_SIGNALS, Stopped
from lit_cifar.runs import read_run


def runs_of(
    seeds: Iterable[int], flags: list[str], folder: Path, wanted: dict[str, Any], train: Callable[[list[str]], None]
) -> Iterator[dict[str, Any]]:
    """results.json of the run of each seed, which stays in `folder`/seed_S.

    Those that are there are all looked at before one is trained: a finished one counts, another is resumed.

    Args:
        seeds: as many as there are runs.
        flags: of lit_cifar.fit, for all of them.
        folder: where the runs stay.
        wanted: the config that a run found there must have, whatever its seed; an empty one fits all.
        train: `fit_alone` or `fit_here`.

    Raises:
        UserError: a run there has other settings, or another process trains it; and what `train` raises.
    """
    places = {seed: folder / f"seed_{seed}" for seed in seeds}
    kept = {seed: _find_run(place, {**wanted, "seed_everything": seed}) for seed, place in places.items()}
    for seed, (found, is_finished) in kept.items():
        if not is_finished:
            args = [*flags, "--seed", str(seed), "--trainer.default_root_dir", str(places[seed])]
            train([*args, "--resume", str(found.folder)] if found else args)
            found, _ = _find_run(places[seed], {})
        assert found is not None
        results: dict[str, Any] = json.loads(read_whole(found.results))
        yield results


def _find_run(place: Path, wanted: dict[str, Any]) -> tuple[Run | None, bool]:
    """The newest run in a folder that is finished, or else the newest that can go on; and whether it is finished.

    Raises:
        UserError: a run there has other settings than those that are wanted, or another process trains it.
    """
    found, is_finished = None, False
    for folder in sorted((place / RUNS).glob("version_*"), key=run_version):
        run = Run(folder=folder)
        if run.is_in_use:
            run.claim()  # waits for a process that is on its way out
            run.unlock()
        before = yaml.safe_load(read_whole(run.config)) if run.config.is_file() else {}
        if differences := list(changes(_shared(before, wanted), _shared(wanted, before))):
            lines = "; ".join(f"--{line}" for line in differences[:3])
            raise UserError(f"{folder} has other settings: {lines}; name another folder")
        done = read_run(folder).state == "done"
        if done or (states_of(folder) and not is_finished):
            found, is_finished = run, done
    return found, is_finished


def _shared(config: Any, other: Any, key: str = "") -> Any:
    """A config without the settings that the other one does not know, which are another version's, and without its
    folder. What the user names freely, such as a net's own arguments in `dict_kwargs`, is left whole."""
    if not isinstance(config, dict) or not isinstance(other, dict) or key == "dict_kwargs":
        return config
    names = [name for name in config if name in other and name != "default_root_dir"]
    return {name: _shared(config[name], other[name], name) for name in names}


@contextlib.contextmanager
def ended_in_order(again: str | None = None) -> Iterator[None]:
    """Lets a signal that would end this process end the run of fit and remove the folder first; or let the run save its
    state, where the command `again` goes on with it."""

    def end(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if again is None:
            sys.exit(128 + number)
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    named = [*STOP_SIGNALS, getattr(signal, "SIGHUP", signal.SIGTERM)]
    numbers = [number for number in named if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    except Stopped as stopped:  # here, or in a run in this process
        if again is None:
            sys.exit(128 + signal.SIGTERM)
        raise Stopped(f"{str(stopped).split(';')[0]}; go on with {again}") from None
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def fit_alone(args: list[str]) -> None:
    """A run of lit_cifar.fit in a process of its own.

    Raises:
        UserError: what that process says in its last line, or that it was killed.
        RuntimeError: it ended with a traceback, which is given whole.
    """
    command = [sys.executable, "-m", "lit_cifar.fit", *args]
    environment = {**os.environ, LAUNCHER_VARIABLE: str(os.getpid()), "PYTHONIOENCODING": "utf-8"}
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "env": environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, **text) as process:
        try:
            stdout, stderr = process.communicate()
        except BaseException as error:
            if not isinstance(error, Stopped):
                process.kill()
            elif sys.platform != "win32":  # where Ctrl-Break reaches it too, and terminate() is kill()
                process.terminate()
            process.communicate()
            raise
    if process.returncode < 0:
        raise UserError(f"a run was ended by {signal.Signals(-process.returncode).name}, perhaps for want of memory")
    last = (stderr.splitlines() or [""])[-1]
    if process.returncode and last.startswith("lit_cifar: "):  # not with a traceback
        raise UserError(last.removeprefix("lit_cifar: ").removeprefix("error: "))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{stdout}{stderr}")


def fit_here(args: list[str]) -> None:
    """A run of lit_cifar.fit in this process, which prints nothing."""
    with contextlib.redirect_stdout(io.StringIO()):
        fit.main(args)
