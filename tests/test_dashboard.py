"""TensorBoard tells the story of a run without being configured: by its event files, and in a real browser."""

import html
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import markdown
import numpy as np
import pytest
import torch
from helpers import SHAPES
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import lit_cifar.fit
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.model.module import LitClassifier
from lit_cifar.nets import Net
from lit_cifar.results import pictures
from lit_cifar.training.dashboard import Dashboard, charts, hyperparameters

VALIDATED = [*SHAPES, "--batch_size", "50", "--lr", "0.02", "--max_epochs", "2", "--data.num_val", "1000"]
PICTURES = ["confusion", "mistakes", "reliability"]


def events_of(run: str) -> EventAccumulator:
    events = EventAccumulator(f"lightning_logs/{run}", size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_run_with_validation_fills_every_page() -> None:
    lit_cifar.fit.main([*VALIDATED, "--data.augment.flip", "random"])
    events = events_of("version_0")
    tags = events.Tags()

    for group, names in {
        "train": ["loss", "gradient_norm"],
        "val": ["loss", "accuracy", "calibration_error", "accuracy/star"],
        "test": ["loss", "accuracy", "calibration_error", "accuracy/star"],
        "speed": ["images_per_second", "step_ms", "data_wait_ms", "peak_resident_memory_mb"],
        "lr": ["net"],
    }.items():
        for name in names:
            assert f"{group}/{name}" in tags["scalars"]
            assert all(np.isfinite(event.value) for event in events.Scalars(f"{group}/{name}"))
    assert [event.step for event in events.Scalars("speed/step_ms")] == list(range(50, 351, 50))

    assert [event.step for event in events.Images("val/confusion")] == [180, 360]
    for tag in (*(f"{stage}/{name}" for stage in ("val", "test") for name in PICTURES), "train/images", "net/filters"):
        newest = events.Images(tag)[-1]
        assert newest.step == 360
        picture = Image.open(BytesIO(newest.encoded_image_string))
        assert picture.size == (newest.width, newest.height)
        assert len(np.unique(np.asarray(picture))) > 2, "something is drawn"

    assert "batch_size: 50" in text(events, "config")
    assert "python -m lit_cifar.fit --dataset shapes" in text(events, "run")
    assert torch.__version__ in text(events, "run")
    assert "star" in text(events, "test/classes")
    assert tags["graph"]


def test_tensorboards_logger_may_stand_behind_others() -> None:
    other, tensorboard = CSVLogger("csv"), TensorBoardLogger("lightning_logs", name="", version="version_0")
    trainer = Trainer(
        max_steps=2,
        limit_test_batches=1,
        logger=[other, tensorboard],
        callbacks=[Dashboard()],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    module, data = LitClassifier(Net()), CIFAR10DataModule(dataset="shapes")
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    tags = events_of("version_0").Tags()
    assert {f"test/{name}" for name in PICTURES} <= set(tags["images"])
    assert tags["graph"]
    assert "test/accuracy" in tags["scalars"]
    assert "test/accuracy" in other.experiment.metrics_keys


def patterns(layout: layout_pb2.Layout) -> list[str]:
    return [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]


@pytest.mark.parametrize("num_classes", [3, 10, 100])
def test_custom_scalars_show_each_of_their_tags_in_one_chart(num_classes: int) -> None:
    classes = [f"class.{label}" for label in range(num_classes)]  # a dot, which a pattern must not take for any letter
    layout = charts(["val", "test"], classes)
    lines = [pattern for charts_ in layout.values() for _, tags in charts_.values() for pattern in tags]
    assert all(pattern.startswith("^") and pattern.endswith("$") for pattern in lines)
    tags = [
        "train/loss",
        "val/loss",
        "lr/net",
        "lr/filters",
        *(f"{s}/accuracy/{c}" for s in ("val", "test") for c in classes),
    ]
    for tag in tags:
        assert sum(bool(re.match(pattern, tag)) for pattern in lines) == 1, tag
    for tag in ("val/accuracy", "test/loss", "train/gradient_norm", "speed/step_ms"):
        assert not any(re.match(pattern, tag) for pattern in lines), tag
    for titles in layout.values():
        for title, (_, of_chart) in titles.items():
            shown = [tag for tag in tags if any(re.match(pattern, tag) for pattern in of_chart)]
            assert len(shown) <= 10, f"{title} has too many lines to tell apart"


def test_more_classes_than_have_curves_have_no_charts() -> None:
    layout = charts(["val", "test"], [f"class {label}" for label in range(1000)])
    assert set(layout) == {"loss", "learning rates"}


def test_a_class_of_any_name_has_a_chart_of_its_own_tag() -> None:
    layout = charts(["val"], ["\x1b[2Jcat", *map(str, range(10))])
    chart = next(iter(layout["accuracy"].values()))
    assert re.match(chart[1][0], r"val/accuracy/'\x1b[2Jcat'")
    assert all(title.isprintable() for title in layout["accuracy"])


@pytest.mark.parametrize("command", ["a | b", "a `b` | ``c``", "<script>alert()</script> *a*", "`"])
def test_a_command_of_any_letters_is_one_cell_of_its_table(command: str) -> None:
    shown = markdown.markdown(Dashboard(command)._origin(), extensions=["markdown.extensions.tables"])
    assert f"<td><code>{html.escape(command, quote=False)}</code></td>" in shown
    assert shown.count("<td>") == 2 * shown.count("<tr>") - 2


def test_the_layout_of_a_run_matches_its_own_tags() -> None:
    lit_cifar.fit.main([*VALIDATED, "--max_epochs", "1"])
    events = events_of("version_0")
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    found = patterns(layout)
    scalars = events.Tags()["scalars"]
    for tag in ("train/loss", "val/loss", "lr/net", "val/accuracy/star", "test/accuracy/star"):
        assert tag in scalars
        assert sum(bool(re.match(pattern, tag)) for pattern in found) == 1, tag


def test_the_pictured_images_are_what_the_net_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[torch.Tensor] = []

    def draw(images: torch.Tensor, *_: object) -> pictures.Picture:
        shown.append(images)
        return np.full((8, 8, 3), 255, np.uint8)

    monkeypatch.setattr(pictures, "training_images", draw)
    lit_cifar.fit.main([*VALIDATED, "--max_epochs", "1", "--data.augment.cutout", "16", "--batch_size", "20"])
    (images,) = shown
    assert images.shape == (32, 3, 32, 32), "of two batches"
    grey = (images == 122).all(1).flatten(1).sum(1)
    assert bool((grey >= 64).all()), "a quarter of the square at least is inside"


def test_hyperparameters_say_in_one_word_what_is_off() -> None:
    config = {
        "model": {"net": {"class_path": "lit_cifar.nets.Net"}, "lr": 0.1, "mean": [0.5] * 3},
        "data": {"dataset": "shapes", "augment": {"crop": 4, "pad": "zeros", "flip": "none", "cutout": 0}},
        "trainer": {"max_epochs": 2},
        "seed_everything": 7,
    }
    found = hyperparameters(config)
    assert found["augment"] == "crop 4, pad zeros"
    assert (found["net"], found["lr"], found["seed"]) == ("Net", 0.1, 7)
    config["data"]["augment"] = {"crop": 0, "pad": "zeros", "flip": "none"}
    assert hyperparameters(config)["augment"] == "none"


@pytest.fixture
def browser() -> Iterator[object]:
    """Headless Chromium by its own driver; nothing is downloaded."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'lit_cifar[dev]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1500,1400")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def tensorboard() -> Iterator[str]:
    """The address of a server on this folder's lightning_logs, which need not exist yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "lightning_logs", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load_fast=false", "--reload_interval", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        yield f"http://127.0.0.1:{port}/"
        server.terminate()


# all text of the page, that of the web components' shadows too; and the pictures that have arrived
PAGE = """
const texts = [], pictures = [];
const walk = (node) => {
  if (node.tagName === 'BUTTON' && node.classList.contains('heading')) {  // of a group: open it once
    const pane = node.parentNode.querySelector('iron-collapse');
    if (pane && !pane.opened) node.click();
  }
  if (node.nodeType === 3) texts.push(node.textContent);
  if (node.tagName === 'IMG' && node.naturalWidth > 100) pictures.push(node.naturalWidth);
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return [texts.join(' '), pictures.length];
"""


@pytest.mark.slow
def test_tensorboard_shows_a_demo_run_in_a_browser(browser: Any, tensorboard: str) -> None:
    lit_cifar.fit.main(VALIDATED)
    expected = {
        "scalars": ["train/loss", "train/gradient_norm", "val/accuracy", "speed/images_per_second", "lr/net"],
        "custom_scalars": ["val: accuracy of each class", "training and validation loss", "learning rate of each"],
        "images": ["net/filters", "test/confusion", "test/mistakes", "test/reliability", "train/images"],
        "hparams": ["augment", "batch_size", "test/accuracy", "version_0"],
    }
    for page, names in expected.items():
        deadline = time.monotonic() + 60
        missing = names
        while missing and time.monotonic() < deadline:
            browser.get(f"{tensorboard}?fresh={time.monotonic()}#{page}")
            for _ in range(10):
                time.sleep(1)
                shown, num_pictures = browser.execute_script(PAGE)
                missing = [name for name in names if name not in " ".join(shown.split())]
                if not missing and (page != "images" or num_pictures >= 5):
                    break
        assert not missing, f"{page} does not show {missing}"
        if page == "images":
            assert num_pictures >= 5
