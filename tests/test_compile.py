"""--compile: every graph is there before the first step, and nothing else changes. TF32 and the choice of cuDNN's
kernels on a pretended GPU."""

import os
import pickle
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import SHAPES, assert_same_run, error_of, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from pretend import pretended
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import lit_cifar.fit
import lit_cifar.test
from lit_cifar.model import kernels
from lit_cifar.model.check import unchanged
from lit_cifar.nets import Net
from lit_cifar.run.stop import Stopped

# 1,500 images make seven batches of 200, which the loader makes two by two, and one of 100
FEW = [*SHAPES, "--batch_size", "200", "--data.num_val", "8500", "--data.eval_batch_size", "300", "--compile", "true"]
FEW += ["--trainer.limit_val_batches", "1"]


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Iterator[None]:
    """Compiled code and settings of the process are left as they were found."""
    config, cudnn, matmul = torch._dynamo.config, torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, config.recompile_limit
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, config.recompile_limit = before
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()


class Graphs:
    """A backend that compiles nothing, and counts graphs and how often they run."""

    def __init__(self) -> None:
        self.num_graphs = self.num_runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.num_graphs += 1

        def run(*args: Any) -> Any:
            self.num_runs += 1
            return graph.forward(*args)

        return run


class Counts(Callback):
    """Notes the graphs and their runs at the border of each stage."""

    seen: dict[str, tuple[int, int]] = {}  # noqa: RUF012

    def note(self, when: str) -> None:
        assert isinstance(kernels.BACKEND, Graphs)
        self.seen[when] = kernels.BACKEND.num_graphs, kernels.BACKEND.num_runs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("before the first step")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("after the last step")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("before the test's first batch")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("after the test")


@pytest.mark.filterwarnings("ignore:Found 1 module")  # Lightning's, of what is frozen
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_all_graphs_are_compiled_before_the_first_step(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BACKEND", Graphs())
    monkeypatch.setattr(Counts, "seen", {})
    flags = ["--model.net", "test_compile.Restless", "--model.sides", "[16,20,24,32]", "--model.tta", "mirror_shift"]
    flags += ["--precision", "bf16-mixed"]
    flags += ["--trainer.callbacks+=test_compile.Counts", "--max_epochs", "1", "--strategy", strategy]
    try:
        lit_cifar.fit.main([*FEW, *flags])
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    graphs, runs = ({when: counts[i] for when, counts in Counts.seen.items()} for i in (0, 1))
    # four sides of two sizes, and one size of validation: more than torch keeps by itself
    assert graphs["before the first step"] == graphs["after the last step"] == 9
    assert runs["after the last step"] - runs["before the first step"] == 8 + 6, "steps, views of a validation batch"
    # 2,000 images make five batches of 286 and two of 285; in inference mode validation's graphs do not fit
    assert graphs["before the test's first batch"] == graphs["after the test"] == 11
    assert runs["after the test"] - runs["before the test's first batch"] == 7 * 6


def test_a_script_compiles_for_its_validation_alone_and_can_pickle_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BACKEND", Graphs())
    module = lit_cifar.LitClassifier(Net(), compile=True)
    data = lit_cifar.CIFAR10DataModule(dataset="shapes", num_val=1000, eval_batch_size=250)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(module, data, verbose=False)
    assert (kernels.BACKEND.num_graphs, kernels.BACKEND.num_runs) == (1, 1 + 4), "warmed up, then four batches"
    module.trainer = None
    copied = pickle.loads(pickle.dumps(module))
    images = torch.zeros(250, 3, 32, 32, dtype=torch.uint8)
    assert copied(images).equal(module.eval()(images))


class Restless(nn.Module):
    """A net whose buffers and random state change with each forward pass."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 5, stride=3), nn.BatchNorm2d(8)
        self.frozen = nn.BatchNorm2d(8).eval()
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.frozen(self.norm(self.conv(images))).relu().amax((2, 3))))


class StopAtStepTwo(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:Found 1 module")  # Lightning's, of what is frozen
def test_a_compiled_run_has_the_same_bits_also_resumed_and_tensorboards_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "BACKEND", "eager")  # the same arithmetic, so that whatever else changes is seen
    flags = [*FEW, "--model.net", "test_compile.Restless", "--model.sides", "[20,32]", "--trust", "true"]
    lit_cifar.fit.main([*flags, "--max_epochs", "2", "--compile", "false"])
    with pytest.raises(Stopped):
        lit_cifar.fit.main([*flags, "--max_epochs", "2", "--trainer.callbacks+=test_compile.StopAtStepTwo"])
    lit_cifar.fit.main(["--resume", "lightning_logs/version_1", "--trust", "true"])
    assert_same_run("version_0", "version_1")
    assert not {key for key in weights("version_1") if "_orig_mod" in key}
    assert weights("version_1")["net.frozen.num_batches_tracked"] == 0, "what is frozen stays so"
    events = EventAccumulator("lightning_logs/version_1")
    events.Reload()
    assert events.Tags()["graph"]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_black_images_leave_the_random_state_of_each_kind_of_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = ["before"]
    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", states.append)
    with unchanged(Net(), torch.device(kind)):
        states.append("drawn from")
    assert states[-1] == "before"


def no_compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_without_a_compiler_the_command_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BACKEND", no_compiler)
    line = error_of(lit_cifar.fit.main, [*FEW, "--max_epochs", "1"])
    assert line.startswith("--compile true does not work here (")
    assert "No working C++ compiler" in line
    assert "use --compile false" in line


def test_a_python_that_torch_cannot_compile_for_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torch.compile is not supported on Python 3.19+")

    monkeypatch.setattr(torch, "compile", refuse)
    line = error_of(lit_cifar.fit.main, [*FEW, "--max_epochs", "1"])
    assert line.startswith("--compile true does not work here (RuntimeError: torch.compile is not supported on Python")


@pytest.mark.slow
def test_torchs_own_backend_compiles_growing_images_once_and_gives_the_same_weights() -> None:
    flags = [
        *FEW,
        "--model.net",
        "lit_cifar.nets.SpeedNet",
        "--model.net.widths",
        "[8,8,8]",
        "--model.sides",
        "[24,32]",
    ]
    flags += ["--data.drop_last", "true", "--data.num_val", "0"]
    # in float64 what is summed in another order shows only if it is another sum
    flags += ["--max_epochs", "1", "--trainer.limit_train_batches", "4", "--precision", "64-true"]
    counts = torch._dynamo.utils.counters["stats"]
    lit_cifar.fit.main([*flags, "--compile", "false"])
    before = counts["unique_graphs"]
    lit_cifar.fit.main(flags)
    assert counts["unique_graphs"] - before == 2 + 2, "sides, and the test's two sizes"
    plain, fast = weights("version_0"), weights("version_1")
    assert plain.keys() == fast.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(fast[name], weight, rtol=1e-9, atol=1e-9)
    lit_cifar.test.main(["--ckpt_path", "lightning_logs/version_1/checkpoints/last.ckpt", "--compile", "false"])


@pytest.mark.parametrize(
    ("flags", "tf32", "benchmark"),
    [
        ([], False, True),
        (["--model.tf32", "true"], True, True),
        (["--trainer.deterministic", "true"], False, False),
        (["--trainer.benchmark", "false"], False, False),
    ],
)
def test_float32_means_float32_on_a_gpu_and_cudnn_tries_its_kernels(
    flags: list[str],
    tf32: bool,
    benchmark: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from lightning.fabric.accelerators.cuda import _check_cuda_matmul_precision

    _check_cuda_matmul_precision.cache_clear()  # it hints once in a process
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: None)
    graphs = []
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_graph", lambda *given: graphs.append(given[2]))
    few = [*SHAPES[:2], "--batch_size", "50", "--trainer.max_steps", "2", "--trainer.limit_test_batches", "1"]
    with pretended("cuda"):
        lit_cifar.fit.main([*few, "--log_level", "debug", *flags])
        assert [image.device.type for image in graphs] == ["cuda"], "TensorBoard's graph is traced where the net is"
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest"), "as Lightning asks"
    assert torch.backends.cudnn.benchmark is benchmark
    assert "Tensor Cores" not in capfd.readouterr().err


def test_in_a_script_of_ones_own_torch_stays_as_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "set_tf32", lambda on: pytest.fail("nobody asked for it"))
    with pretended("cuda"):
        module, data = lit_cifar.LitClassifier(Net()), lit_cifar.CIFAR10DataModule(dataset="shapes")
        trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_test_batches=1)
        trainer.test(module, data, verbose=False)
    assert module.reports["test"].num_images
