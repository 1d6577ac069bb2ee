"""README, docs and recipes do what they say: every command in them parses or runs, every recipe trains."""

import ast
import io
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, Run, write_official
from PIL import Image

import lit_cifar.bench
import lit_cifar.export
import lit_cifar.fit
import lit_cifar.predict
import lit_cifar.runs
import lit_cifar.sweep
import lit_cifar.test
from lit_cifar.cli.parser import SHORT_FLAGS
from lit_cifar.data import shapes

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
USING = (ROOT / "docs/using-the-net.md").read_text()
RUN = [ROOT / "docs/your-own-data.md", ROOT / "docs/your-own-net.md"]  # their commands are run, in their order
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SPACES = sorted((ROOT / "configs/sweeps").glob("*.yaml"))


def commands(document: Path) -> list[tuple[str, str]]:
    found = re.finditer(
        r"python -m lit_cifar\.(fit|test|bench|predict|export|runs|sweep)(?=[\s`])([^`\n]*)", document.read_text()
    )
    return [(match[1], re.sub(r"\s+#.*", "", match[2]).strip()) for match in found]


COMMANDS = sorted({command for document in DOCUMENTS if document not in RUN for command in commands(document)})


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
        shutil.copytree(trained, "lightning_logs/version_0")
    if module == "test":
        lit_cifar.test.main(typed)
        return
    if module in ("predict", "export"):
        _use(module, typed, monkeypatch)
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


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


@pytest.fixture
def flowers(tmp_path: Path) -> np.ndarray:
    """Training images (3 classes, 4 images, 32, 32, 3) uint8 of a tree `flowers`, which lies in an archive too."""
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 32, 32, 3), dtype=np.uint8)
    for class_name, of_class in zip(("daisy", "rose", "tulip"), images, strict=True):
        for split in ("train", "test"):
            folder = tmp_path / "flowers" / split / class_name
            folder.mkdir(parents=True)
            for index, image in enumerate(of_class):
                Image.fromarray(image).save(folder / f"{index}.png")
    with tarfile.open("flowers.tar.gz", "w:gz") as tar:
        tar.add("flowers")
    return images


@pytest.fixture
def my_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The document's own files, in the working folder, which `python -m` puts first on Python's path."""
    python = blocks(ROOT / "docs/your-own-net.md", "python")
    (tmp_path / "my_net.py").write_text("\n".join(python))
    (groups,) = blocks(ROOT / "docs/your-own-net.md", "yaml")
    (tmp_path / "groups.yaml").write_text(groups)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_net", None)


@pytest.mark.parametrize("document", RUN, ids=lambda path: path.stem)
def test_the_commands_of_a_document_run_in_turn(
    document: Path, tmp_path: Path, flowers: np.ndarray, my_net: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("configs").symlink_to(ROOT / "configs")
    write_official(tmp_path / "data", "cifar100", monkeypatch)
    monkeypatch.setattr("lit_cifar.data.download.fetch_folder", lambda *_: pytest.fail("would download"))
    main = {"fit": lit_cifar.fit.main, "test": lit_cifar.test.main}
    for module, args in commands(document):
        typed = shlex.split(args)
        if "--dataset" not in typed and "--data_dir" not in typed and module == "fit" and "--resume" not in typed:
            typed += ["--data_dir", "flowers"]  # where the document means CIFAR-10
        if {"--devices", "--compile", "resnet18"} & set(typed):  # for long
            with pytest.raises(SystemExit):
                lit_cifar.fit.main([*typed, "--print_config"])
        else:
            main[module]([*typed, "--accelerator", "cpu", *(["--data.num_workers", "0"] if module == "fit" else [])])


def test_python_finds_a_net_in_the_working_folder(flowers: np.ndarray, my_net: None, run_command: Run) -> None:
    args = ["--model.net", "my_net.MyNet", "--data_dir", "flowers", "--accelerator", "cpu"]
    done = run_command("lit_cifar.fit", *args)
    assert done.returncode == 0, done.stderr
    assert "output (4, 3), global batch 4" in done.stdout


def test_mean_and_std_as_the_document_computes_them(flowers: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    (python,) = blocks(ROOT / "docs/your-own-data.md", "python")
    exec(python, {})
    mean, std = (np.array(part.split(","), float) for part in re.findall(r"\[(.*?)\]", capsys.readouterr().out))
    pixels = flowers.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-3)


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
            main(["--help", *(["all"] if main is lit_cifar.fit.main else [])])
    lit_cifar.bench.main(["--help"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out)) | {f"--{short}" for short in SHORT_FLAGS}
    known |= {"--version"}  # of lit_cifar itself
    known |= {"--nodes", "--ntasks", "--signal", "--wait"}  # Slurm's
    known |= {"--shm"}  # Docker's --shm-size
    known |= {"--study", "--trials", "--storage", "--sort", "--json"}
    known |= {"--ckpt_path", "--logdir", "--print_config", "--model.net.num_classes", "--model.net.width"}
    known |= {
        f"--model.net.{name}" for name in ("name", "model_name", "img_size", "drop_rate", "pretrained", "num_labels")
    }
    known |= {"--model.factor", "--trainer.callbacks.monitor", "--backend"}  # timm's, MLflow's
    known |= {f"--trainer.logger.{name}" for name in ("offline", "project", "save_dir", "tracking_uri")}
    known |= {"--model.optimizer.weight_decay"}  # of classes that are named beside them, as are the next
    known |= {f"--model.scheduler.{name}" for name in ("max_lr", "step_size", "gamma")}
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
