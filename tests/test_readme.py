"""README, docs and recipes do what they say: every command in them parses, every recipe trains."""

import ast
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import lit_cifar.bench
import lit_cifar.export
import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.test
from lit_cifar import shapes
from lit_cifar.cli import SHORT_FLAGS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
USING = (ROOT / "docs/using-the-net.md").read_text()
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
COMMANDS = sorted(
    {
        (match[1], re.sub(r"\s+#.*", "", match[2]).strip())
        for document in DOCUMENTS
        for match in re.finditer(
            r"python -m lit_cifar\.(fit|test|bench|predict|export)(?=[\s`])([^`\n]*)", document.read_text()
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
def test_every_command_of_the_documents_parses(
    module: str, args: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = shlex.split(args)
    if "my_package" in args or "FILE" in args:
        pytest.skip("names something of the reader's own")
    Path("configs").symlink_to(ROOT / "configs")
    if module in ("predict", "export"):
        _place_checkpoint_and_photos(trained)
    elif "--resume" in typed or "--ckpt_path" in typed:
        lit_cifar.fit.main(["--dataset", "shapes", "--batch_size", "500", "--max_epochs", "1"])
    if module == "test":
        lit_cifar.test.main(typed)
        return
    if module in ("predict", "export"):
        _use(module, typed, monkeypatch)
        return
    if module == "bench":
        config, _, rest = lit_cifar.bench.split_flags(typed)
        typed = ["--config", config, *rest]
    with pytest.raises(SystemExit) as done:
        lit_cifar.fit.main([*typed, "--print_config"])
    assert done.value.code == 0


def _place_checkpoint_and_photos(trained: Path) -> None:
    Path("lightning_logs").mkdir()
    Path("lightning_logs/version_0").symlink_to(trained)
    for name in ("photo.jpg", "photos/a.png", "more/of/b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 60), (200, 30, 30)).save(name)


def _use(module: str, typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "export":
        pytest.importorskip("onnxruntime", reason="onnxruntime is missing; it comes with the extra `export`")
        lit_cifar.export.main(typed)
        assert Path(typed[typed.index("--output") + 1]).is_file()
        return
    typed = typed[: typed.index(">")] if ">" in typed else typed
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("photo.jpg").read_bytes())))
    lit_cifar.predict.main(typed)


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", USING, re.DOTALL))
def test_the_examples_in_python_run(snippet: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _place_checkpoint_and_photos(trained)
    exec(snippet, {"REPOSITORY": str(ROOT), "torch": torch})
    if "print" in snippet:
        assert ast.literal_eval(capsys.readouterr().out)[0] in shapes.CLASSES


def test_flags_that_documents_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (lit_cifar.fit.main, lit_cifar.predict.main, lit_cifar.export.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out)) | {f"--{short}" for short in SHORT_FLAGS}
    known |= {f"--{flag}" for flag in lit_cifar.bench.OWN_FLAGS}
    known |= {"--ckpt_path", "--logdir", "--print_config", "--model.net.num_classes"}
    for document in DOCUMENTS:
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w.]+", document.read_text()))
        assert flags <= known, (document.name, flags - known)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps(recipe: Path, precision: str) -> None:
    flags = ["--dataset", "shapes", "--batch_size", "16", "--data.eval_batch_size", "16", "--precision", precision]
    lit_cifar.fit.main(["--config", str(recipe), *flags, "--trainer.fast_dev_run", "2"])
    assert not Path("lightning_logs").exists()
