"""From what was typed to a trainer, a module, a data module and a run. What a command does is in its own module."""
