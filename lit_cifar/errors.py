"""What the user can mend: its exceptions, and how a command ends with it. What Lightning complains of is cli's."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Bad input: the message is one line that names the cause and the way out; commands exit with 2."""

    of_node = False  # whether it may be wrong on this node and on no other


class DivergedError(UserError):
    """A training whose loss or weights are no longer finite."""


def run(command: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command on sys.argv and exits: 0 when done, 2 with one line when the user can mend it."""
    try:
        command(sys.argv[1:])
    except UserError as error:
        sys.stdout.flush()
        print(f"lit_cifar: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)
