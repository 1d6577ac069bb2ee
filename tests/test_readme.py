"""README, docs and recipes do what they say: every command in them parses, every recipe trains."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import lit_cifar.bench
import lit_cifar.fit
import lit_cifar.runs
import lit_cifar.sweep
import lit_cifar.test
from lit_cifar.cli import SHORT_FLAGS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SPACES = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
COMMANDS = sorted(
    {
        (match[1], re.sub(r"\s+#.*", "", match[2]).strip())
        for document in DOCUMENTS
        for match in re.finditer(
            r"python -m lit_cifar\.(fit|test|bench|runs|sweep)(?=[\s`])([^`\n]*)", document.read_text()
        )
    }
)


def test_readme_tells_the_two_commands_that_ci_runs() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(("module", "args"), COMMANDS)
def test_every_command_of_the_documents_parses(module: str, args: str) -> None:
    typed = shlex.split(args)
    if "my_package" in args or "FILE" in args:
        pytest.skip("names something of the reader's own")
    Path("configs").symlink_to(ROOT / "configs")
    if "--resume" in typed or "--ckpt_path" in typed:
        lit_cifar.fit.main(["--dataset", "shapes", "--batch_size", "500", "--max_epochs", "1"])
    if module == "test":
        lit_cifar.test.main(typed)
        return
    if module == "runs":
        Path("lightning_logs/version_0").mkdir(parents=True)
        lit_cifar.runs.main(typed)
        return
    if module == "sweep":
        assert lit_cifar.sweep.Sweep(["--config", *typed]).space
        return
    if module == "bench":
        config, _, rest = lit_cifar.bench.split_flags(typed)
        typed = ["--config", config, *rest]
    with pytest.raises(SystemExit) as done:
        lit_cifar.fit.main([*typed, "--print_config"])
    assert done.value.code == 0


def test_flags_that_documents_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lit_cifar.fit.main(["--help"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out)) | {f"--{short}" for short in SHORT_FLAGS}
    known |= {f"--{flag}" for flag in lit_cifar.bench.OWN_FLAGS}
    known |= {"--nodes", "--ntasks", "--signal"}  # Slurm's
    known |= {"--study", "--trials", "--storage", "--sort", "--json"}
    known |= {"--ckpt_path", "--logdir", "--print_config", "--model.net.num_classes"}
    for document in DOCUMENTS:
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w.]+", document.read_text()))
        assert flags <= known, (document.name, flags - known)


def test_error_lines_that_the_documents_explain_are_the_programs_own() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "lit_cifar").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that stand in several lines
    table = (ROOT / "docs/troubleshooting.md").read_text().split("## Slow")[0]
    lines = [line for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for line in re.findall(r"`(.*?)`", row)]
    assert len(lines) > 8
    for line in lines:
        longest = max(re.split(r"\.\.\.|\d+|\bNet\b", line), key=len).strip()
        assert longest in sources, line


def test_the_space_that_documents_show_can_be_searched() -> None:
    pytest.importorskip("optuna")
    shown = re.search(r"## Sweep.*?```yaml\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    assert shown
    Path("space.yaml").write_text(shown[1])
    flags = ["--study", "space.yaml", "--trials", "1", "--dataset", "shapes", "--data.num_val", "500"]
    lit_cifar.sweep.Sweep(["--config", str(ROOT / "configs/tutorial.yaml"), *flags]).check()


@pytest.mark.parametrize("space", SPACES, ids=lambda path: path.stem)
def test_every_space_can_be_searched(space: Path) -> None:
    pytest.importorskip("optuna")
    flags = ["--study", str(space), "--trials", "1", "--dataset", "shapes", "--data.num_val", "500"]
    lit_cifar.sweep.Sweep(["--config", str(ROOT / "configs" / space.name), *flags]).check()


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps(recipe: Path, precision: str) -> None:
    flags = ["--dataset", "shapes", "--batch_size", "16", "--data.eval_batch_size", "16", "--precision", precision]
    lit_cifar.fit.main(["--config", str(recipe), *flags, "--trainer.fast_dev_run", "2"])
    assert not Path("lightning_logs").exists()
