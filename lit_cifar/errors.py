"""The one exception for what the user can mend. Turning it into a line and an exit code is cli's."""


class UserError(ValueError):
    """Bad input: the message is one line that names the cause and the way out; commands exit with 2."""
