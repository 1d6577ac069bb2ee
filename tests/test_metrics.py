"""What is counted in an evaluation, against torchmetrics and plain arithmetic, in batches and over ranks."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from lit_cifar.results import metrics
from lit_cifar.results.metrics import (
    NUM_BINS,
    NUM_MISTAKES,
    Mistakes,
    Tally,
)

GENERATOR = torch.Generator().manual_seed(0)
NUM_IMAGES, NUM_CLASSES = 500, 7
PROBABILITIES = (3 * torch.randn(NUM_IMAGES, NUM_CLASSES, generator=GENERATOR)).softmax(1)
LABELS = torch.multinomial(PROBABILITIES, 1, generator=GENERATOR).flatten()
IMAGES = torch.randint(0, 256, (NUM_IMAGES, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR)


def batches(size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield from zip(PROBABILITIES.split(size), IMAGES.split(size), LABELS.split(size), strict=True)


def tallied(size: int) -> Tally:
    tally = Tally(NUM_CLASSES)
    for probabilities, images, labels in batches(size):
        tally.update(probabilities.log(), images, labels)
    return tally


@pytest.mark.parametrize("size", [1, 64, NUM_IMAGES])
def test_the_calibration_error_is_torchmetrics(size: int) -> None:
    reference = MulticlassCalibrationError(NUM_CLASSES, n_bins=NUM_BINS)(PROBABILITIES, LABELS)
    calibration = tallied(size).take()[2]
    assert calibration.error == pytest.approx(float(reference), abs=1e-6)
    assert calibration.num_images.sum() == NUM_IMAGES
    assert calibration.num_correct.sum() == (PROBABILITIES.argmax(1) == LABELS).sum()


def test_a_net_that_is_always_sure_and_right_or_wrong_has_error_0_or_1() -> None:
    for labels, error in (([0, 1], 0.0), ([1, 0], 1.0)):
        tally = Tally(2)
        tally.update(torch.eye(2).log(), IMAGES[:2], torch.tensor(labels))
        assert tally.take()[2].error == error


def worst(size: int) -> Mistakes:
    return tallied(size).take()[3]


@pytest.mark.parametrize("size", [1, 64, NUM_IMAGES])
def test_the_worst_mistakes_are_those_that_sorting_all_gives(size: int) -> None:
    confidences, predictions = PROBABILITIES.max(1)
    wrong = (predictions != LABELS).nonzero().flatten()
    order = wrong[confidences[wrong].argsort(descending=True)][:NUM_MISTAKES]
    mistakes = worst(size)
    assert torch.equal(mistakes.images, IMAGES[order])
    assert torch.equal(mistakes.labels, LABELS[order])
    assert torch.equal(mistakes.predictions, predictions[order])
    assert torch.equal(mistakes.confidences, confidences[order])


@pytest.mark.parametrize("num_wrong", [0, 1, 3])
def test_fewer_mistakes_than_there_is_room_for_are_all_there_is(num_wrong: int) -> None:
    labels = PROBABILITIES.argmax(1)[:20].clone()
    labels[:num_wrong] = (labels[:num_wrong] + 1) % NUM_CLASSES
    tally = Tally(NUM_CLASSES)
    tally.update(PROBABILITIES[:20].log(), IMAGES[:20], labels)
    tally.update(PROBABILITIES[:0].log(), IMAGES[:0], labels[:0])  # a rank's empty share
    mistakes = tally.take()[3]
    assert mistakes.images.shape == (num_wrong, 3, 32, 32)
    assert len(mistakes.labels) == len(mistakes.predictions) == len(mistakes.confidences) == num_wrong


def joined(ranks: list[Tally]) -> Tally:
    """The first, with what all counted, as torchmetrics joins ranks: states gathered, then each state's reduction."""
    own = ranks[0]
    for name, reduce in own._reductions.items():
        states = [getattr(tally, name) for tally in ranks]
        if isinstance(states[0], list):
            setattr(own, name, [reduce([part for state in states for part in state])])
        else:
            setattr(own, name, reduce(torch.stack(states)))
    return own


@pytest.mark.parametrize("size", [1, 64, NUM_IMAGES])
def test_the_loss_is_the_mean_in_float64_whatever_the_batches(size: int) -> None:
    losses = torch.nn.functional.cross_entropy(PROBABILITIES.log(), LABELS, reduction="none")
    assert tallied(size).take()[1] == pytest.approx(float(losses.double().mean()), rel=1e-7)


def test_ranks_join_to_what_one_would_have_counted() -> None:
    tallies = [Tally(NUM_CLASSES) for _ in range(3)]
    for rank, tally in enumerate(tallies):
        tally.update(PROBABILITIES[rank::3].log(), IMAGES[rank::3], LABELS[rank::3])
    confusion, loss, calibration, mistakes = joined(tallies).take()
    expected, expected_loss, expected_calibration, expected_mistakes = tallied(64).take()
    assert torch.equal(confusion, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert calibration.error == pytest.approx(expected_calibration.error, abs=1e-12)
    assert torch.equal(mistakes.images, expected_mistakes.images)


def test_a_tally_counts_as_its_metrics_do_and_starts_again_once_taken() -> None:
    logits = PROBABILITIES.log()
    tally = Tally(NUM_CLASSES)
    for _ in range(2):
        for batch in zip(logits.split(64), IMAGES.split(64), LABELS.split(64), strict=True):
            tally.update(*batch)
        confusion, loss, calibration, mistakes = tally.take()
        assert confusion.sum() == NUM_IMAGES
        assert confusion.diag().sum() == (logits.argmax(1) == LABELS).sum()
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits.double(), LABELS)), rel=1e-6)
        assert calibration.error == pytest.approx(tallied(64).take()[2].error, abs=1e-6)
        assert torch.equal(mistakes.images, worst(64).images)


@pytest.mark.parametrize("most_dense", [NUM_CLASSES, NUM_CLASSES - 1])
@pytest.mark.parametrize("size", [1, 64, NUM_IMAGES])
def test_the_confusion_matrix_is_torchmetrics(size: int, most_dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MOST_DENSE", most_dense)
    tally = Tally(NUM_CLASSES)
    for probabilities, images, labels in batches(size):
        tally.update(probabilities.log(), images, labels)
    confusion = tally.take()[0]
    assert confusion.is_sparse == (most_dense < NUM_CLASSES)
    assert confusion.dtype == torch.int64
    reference = MulticlassConfusionMatrix(NUM_CLASSES)(PROBABILITIES, LABELS)
    assert torch.equal(confusion.to_dense(), reference)


@pytest.mark.parametrize("odd", [[math.nan] * NUM_CLASSES, [math.inf, *[0.0] * (NUM_CLASSES - 1)]])
def test_images_whose_logits_are_not_finite_predict_no_class(odd: list[float]) -> None:
    logits, tally = PROBABILITIES.log(), Tally(NUM_CLASSES)
    logits[::5] = torch.tensor(odd)
    tally.update(logits, IMAGES, LABELS)
    confusion, loss, calibration, mistakes = tally.take()
    assert confusion.shape == (NUM_CLASSES, NUM_CLASSES + 1)
    assert confusion.sum() == NUM_IMAGES
    assert torch.equal(confusion[:, -1], torch.bincount(LABELS[::5], minlength=NUM_CLASSES))
    finite = torch.arange(NUM_IMAGES) % 5 > 0
    tally.update(logits[finite], IMAGES[finite], LABELS[finite])
    expected, finite_loss, expected_calibration, expected_mistakes = tally.take()
    assert torch.equal(confusion[:, :-1], expected)
    assert not math.isfinite(loss)
    assert math.isfinite(finite_loss)
    assert calibration.error == expected_calibration.error
    assert calibration.num_images.sum() == finite.sum()
    assert torch.equal(mistakes.images, expected_mistakes.images)


def test_a_class_that_is_ruled_out_by_minus_infinity_is_no_fault() -> None:
    logits, tally = PROBABILITIES.log(), Tally(NUM_CLASSES)
    logits[torch.arange(NUM_IMAGES), (LABELS + 1) % NUM_CLASSES] = -math.inf
    tally.update(logits, IMAGES, LABELS)
    confusion, loss, *_ = tally.take()
    assert confusion.shape == (NUM_CLASSES, NUM_CLASSES)
    assert math.isfinite(loss)


def test_a_tally_moves_with_its_module_and_is_not_in_a_checkpoint() -> None:
    module = torch.nn.ModuleDict({"test": Tally(NUM_CLASSES)})
    assert module.state_dict() == {}
    for batch in batches(64):
        module["test"].update(*batch)
    module.bfloat16().to("meta")  # as --precision bf16-true converts a module
    metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
    states = [state for metric in metrics for name in metric._defaults for state in (getattr(metric, name),)]
    states = [tensor for state in states for tensor in (state if isinstance(state, list) else [state])]
    assert len(metrics) == 1
    assert {state.device.type for state in states} == {"meta"}
    assert torch.bfloat16 not in {state.dtype for state in states}


def test_a_loader_that_gives_nothing_is_a_matrix_of_nothing() -> None:
    confusion, loss, calibration, mistakes = Tally(NUM_CLASSES).take()
    assert (confusion.sum(), calibration.num_images.sum(), len(mistakes.images)) == (0, 0, 0)
    assert math.isnan(loss)
