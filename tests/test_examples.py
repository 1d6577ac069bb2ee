"""The examples run as a newcomer runs them, in an empty folder, and what they train has learned."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
CHANCE_LOSS = 2.303  # log(10): the loss of guessing among ten classes


def output_of(example: str) -> str:
    """What an example prints, run in the test's own, empty folder."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_step_lowers_the_loss() -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output_of("one_step.py"))]
    assert len(losses) == 10
    assert losses[0] == pytest.approx(CHANCE_LOSS, abs=0.1)  # the net begins by guessing
    assert max(losses[-3:]) < 1.6


def test_one_step_needs_neither_lightning_nor_the_command_line() -> None:
    tree = ast.parse((EXAMPLES / "one_step.py").read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not [name for name in imported if name.startswith(("lightning", "lit_cifar.cli", "lit_cifar.training"))]


@pytest.mark.slow
def test_train_classifies_far_better_than_chance() -> None:
    printed = re.findall(r" (\d\.\d{4})$", output_of("train.py"), re.MULTILINE)
    accuracy, *of_classes = map(float, printed)
    assert accuracy > 0.6  # chance is 0.1
    assert len(of_classes) == 10
    assert sum(of_classes) / 10 == pytest.approx(accuracy, abs=1e-3)  # the test set has as many images of each class


def test_readme_shows_the_loop_of_one_step() -> None:
    source = (EXAMPLES / "one_step.py").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown in source, "README shows another loop than examples/one_step.py"
    assert "optimizer.step()" in shown
