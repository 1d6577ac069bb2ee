"""What is counted while a net is evaluated, summed or joined over ranks. report.py words it, pictures.py draws it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

NUM_BINS = 15  # of confidence, as in arXiv 1706.04599
NUM_MISTAKES = 16  # kept for the picture
MOST_DENSE = 2000  # classes up to which a confusion matrix is dense: 32 MB


class _Exact(Metric):
    """A metric that moves to its module's device and keeps its numbers' types, whatever the weights become.

    Sums are pairs of what was added and what rounding left out (see `_add`): float64, or float32 on Apple's mps, which
    has no float64.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # torchmetrics' own guard knows half() and its like, not to(dtype), with which --precision bf16-true converts
        def move(tensor: Tensor) -> Tensor:
            to_mps = fn(torch.empty(0, dtype=torch.uint8, device=tensor.device)).device.type == "mps"
            kept = torch.float32 if to_mps and tensor.dtype == torch.float64 else tensor.dtype
            return fn(tensor.to(kept)).to(kept)

        return super()._apply(move, exclude_state)


def _add(sums: Tensor, addends: Tensor) -> Tensor:
    """Sums (2, ...), a total and what its rounding left out, after adding (...); D. Knuth's TwoSum (TAOCP 2, 4.2.2).

    1.3 million float32 losses in batches of 500 so come within 1e-7 of their sum in float64.
    """
    total, left_out = sums
    addends = addends.to(sums.dtype)
    new = total + addends
    added = new - total
    return torch.stack([new, left_out + ((total - (new - added)) + (addends - added))])


class Pairs(_Exact):
    """The pair of true and predicted class of each image of all ranks, from which the confusion matrix is counted.

    8 bytes an image, where an image has 3,072: torchmetrics' MulticlassConfusionMatrix counts the same, but in K x K
    numbers, which it holds four times; with 10,000 classes that is 3 GB.

    Args:
        num_classes: number of classes K.
    """

    pairs: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("pairs", [], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Adds images by their predicted classes (B,) int64, K where there is none, and labels (B,)."""
        self.pairs.append(labels * (self.num_classes + 1) + predictions)

    def compute(self) -> Tensor:
        """One number for each image, label * (K + 1) + prediction."""
        return dim_zero_cat(self.pairs) if len(self.pairs) else torch.zeros(0, dtype=torch.int64, device=self.device)

    @staticmethod
    def counted(pairs: Tensor, num_classes: int) -> Tensor:
        """The confusion matrix (K, K) int64 of what `compute` gave, on the CPU; rows true and columns predicted.

        Where images have no prediction, a last column counts them: (K, K + 1). Above MOST_DENSE classes it is sparse.
        """
        found, counts = pairs.cpu().unique(return_counts=True)
        rows, columns = found // (num_classes + 1), found % (num_classes + 1)
        num_columns = num_classes + int(bool((columns == num_classes).any()))
        confusion = torch.sparse_coo_tensor(
            torch.stack([rows, columns]), counts, (num_classes, num_columns), check_invariants=True
        )
        return confusion.to_dense() if num_classes <= MOST_DENSE else confusion


class SummedLoss(_Exact):
    """Mean cross-entropy over all images of all ranks: an exact sum and an integer count, divided last."""

    total: Tensor
    num_images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds the losses of logits (B, K) for labels (B,)."""
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        self.total = _add(self.total, losses.to(self.total.dtype).sum())
        self.num_images += len(labels)

    def compute(self) -> Tensor:
        return self.total.sum() / self.num_images


@dataclass(frozen=True)
class Calibration:
    """How often the net is right at each confidence, in NUM_BINS equal bins of confidence from 0 to 1.

    Args:
        num_images: (NUM_BINS,) int64, images whose confidence falls in each bin.
        num_correct: (NUM_BINS,) int64, those of them classified right.
        confidence: (NUM_BINS,) float64, sum of their confidences.
    """

    num_images: Tensor
    num_correct: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, num_images: Tensor, num_correct: Tensor, confidence: Tensor) -> "Calibration":
        """From what SummedCalibration computes."""
        return cls(num_images.cpu(), num_correct.cpu(), confidence.cpu())

    @property
    def error(self) -> float:
        """Expected calibration error, 0 to 1: the mean distance of accuracy and confidence, weighted by images."""
        return float((self.num_correct - self.confidence).abs().sum() / self.num_images.sum().clamp(min=1))


class SummedCalibration(_Exact):
    """Calibration over all images of all ranks.

    torchmetrics' MulticlassCalibrationError gives the same error; it keeps each image's confidence and has no bins to
    draw a diagram from.
    """

    num_images: Tensor
    num_correct: Tensor
    confidence: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, zeros in (
            ("num_images", torch.zeros(NUM_BINS, dtype=torch.int64)),
            ("num_correct", torch.zeros(NUM_BINS, dtype=torch.int64)),
            ("confidence", torch.zeros(2, NUM_BINS, dtype=torch.float64)),
        ):
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds images by their probabilities (B, K), 0 to 1, and labels (B,); an image with NaN is left out."""
        confidence, predictions = probabilities.max(1)
        known = ~confidence.isnan()
        confidence = torch.where(known, confidence, 0.0)
        bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        # scatter_add_, because mps has no index_add_ of integers up to torch 2.8
        self.num_images.scatter_add_(0, bins, known.long())
        self.num_correct.scatter_add_(0, bins, (known & (predictions == labels)).long())
        sums = torch.zeros(NUM_BINS, dtype=self.confidence.dtype, device=bins.device)
        self.confidence = _add(self.confidence, sums.scatter_add_(0, bins, confidence.to(sums.dtype)))

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of Calibration. Metric.compute takes no frozen dataclass."""
        return self.num_images, self.num_correct, self.confidence.sum(0)


@dataclass(frozen=True)
class Mistakes:
    """M images that the net got wrong, the most confident mistake first.

    Args:
        images: (M, 3, 32, 32) uint8.
        labels: (M,) int64, the true classes.
        predictions: (M,) int64, the classes that the net predicted.
        confidences: (M,) float32, the net's confidence in them, 0 to 1.
    """

    images: Tensor
    labels: Tensor
    predictions: Tensor
    confidences: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, predictions: Tensor, confidences: Tensor) -> "Mistakes":
        """From what WorstMistakes computes."""
        real = confidences >= 0
        return cls(images[real].cpu(), labels[real].cpu(), predictions[real].cpu(), confidences[real].cpu())


def _join_ranks(state: Tensor) -> Tensor:
    return state.flatten(0, 1)  # (ranks, M, ...)


class WorstMistakes(_Exact):
    """The NUM_MISTAKES most confident mistakes of all ranks."""

    images: Tensor
    labels: Tensor
    predictions: Tensor
    confidences: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape, dtype, empty in (
            ("images", (3, 32, 32), torch.uint8, 0),
            ("labels", (), torch.int64, 0),
            ("predictions", (), torch.int64, 0),
            ("confidences", (), torch.float32, -1),  # below all real ones
        ):
            state = torch.full((NUM_MISTAKES, *shape), empty, dtype=dtype)
            self.add_state(name, state, dist_reduce_fx=_join_ranks)

    def update(self, probabilities: Tensor, images: Tensor, labels: Tensor) -> None:
        """Takes in images (B, 3, 32, 32) uint8 with their probabilities (B, K), 0 to 1, and labels (B,).

        An image with NaN is left out.
        """
        confidences, predictions = probabilities.max(1)
        confidences = torch.where((predictions == labels) | confidences.isnan(), -1.0, confidences)
        confidences, new = confidences.topk(min(NUM_MISTAKES, len(labels)))
        self.images, self.labels, self.predictions, self.confidences = self._worst(
            torch.cat([self.images, images[new]]),
            torch.cat([self.labels, labels[new]]),
            torch.cat([self.predictions, predictions[new]]),
            torch.cat([self.confidences, confidences]),
        )

    def _worst(
        self, images: Tensor, labels: Tensor, predictions: Tensor, confidences: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        confidences, worst = confidences.topk(NUM_MISTAKES)
        return images[worst], labels[worst], predictions[worst], confidences

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of Mistakes, NUM_MISTAKES of each; where there were fewer, the rest have a confidence of -1."""
        return self._worst(self.images, self.labels, self.predictions, self.confidences)


class Tally(nn.Module):
    """All that is counted in one stage of evaluation: confusion matrix, loss, calibration and worst mistakes.

    The counts move with the module that holds the tally, and are not in its state_dict.

    Args:
        num_classes: number of classes K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.confusion = Pairs(num_classes)
        self.loss = SummedLoss()
        self.calibration = SummedCalibration()
        self.mistakes = WorstMistakes()

    def update(self, logits: Tensor, images: Tensor, labels: Tensor) -> None:
        """Counts images (B, 3, 32, 32) uint8 by their logits (B, K), of any float dtype, and labels (B,) int64.

        Where logits hold NaN or infinity they predict no class.
        """
        probabilities = logits.float().softmax(1)
        undecided = probabilities[:, 0].isnan()  # softmax makes all of a row NaN, or nothing
        self.confusion.update(torch.where(undecided, self.num_classes, logits.argmax(1)), labels)
        self.loss.update(logits, labels)
        self.calibration.update(probabilities, labels)
        self.mistakes.update(probabilities, images, labels)

    def take(self) -> tuple[Tensor, float, Calibration, Mistakes]:
        """What was counted on all ranks, for a Report; counting starts again from nothing.

        Every rank must call it at once, and each gets the same.

        Returns:
            The confusion matrix, as Pairs.counted gives it; the mean cross-entropy, NaN where a logit is; the
            calibration; the worst mistakes. All tensors are on the CPU.
        """
        taken = (
            Pairs.counted(self.confusion.compute(), self.num_classes),
            self.loss.compute().item(),
            Calibration.of(*self.calibration.compute()),
            Mistakes.of(*self.mistakes.compute()),
        )
        for metric in (self.confusion, self.loss, self.calibration, self.mistakes):
            metric.reset()
        return taken
