"""Puts the recipes of configs/ into the wheel, as lit_cifar/configs; pyproject.toml has all else.

Not by package-dir: then an editable install, which needs no copy, would be a finder in place of a line in a .pth file.
Beside a clone of the name lit_cifar, Python would take that folder for the package, and editors would find nothing.
"""

import os

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", os.path.join(self.build_lib, "lit_cifar", "configs"))


setup(cmdclass={"build_py": BuildWithRecipes})
