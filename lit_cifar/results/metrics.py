"""What is counted while a net is evaluated, summed or joined over ranks. report.py words it, pictures.py draws it."""

import math
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


def count_confusion(pairs: Tensor, num_classes: int) -> Tensor:
    """The confusion matrix (K, K) int64 of `Tally.compute`'s pairs, on the CPU; rows true and columns predicted.

    Where images have no prediction, a last column counts them: (K, K + 1). Above MOST_DENSE classes it is sparse.
    """
    found, counts = pairs.unique(return_counts=True)
    rows, columns = found // (num_classes + 1), found % (num_classes + 1)
    num_columns = num_classes + int(bool((columns == num_classes).any()))
    confusion = torch.sparse_coo_tensor(
        torch.stack([rows, columns]), counts, (num_classes, num_columns), check_invariants=True
    )
    return confusion.to_dense() if num_classes <= MOST_DENSE else confusion


@dataclass(frozen=True)
class Calibration:
    """How often the net is right at each confidence, in NUM_BINS equal bins of confidence from 0 to 1.

    torchmetrics' MulticlassCalibrationError gives the same error, and has no bins to draw a diagram from.

    Args:
        num_images: (NUM_BINS,) int64, images whose confidence falls in each bin.
        num_correct: (NUM_BINS,) int64, those of them classified right.
        confidence: (NUM_BINS,) float64, sum of their confidences.
    """

    num_images: Tensor
    num_correct: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, pairs: Tensor, confidences: Tensor, num_classes: int) -> "Calibration":
        """From what Tally computes, on the CPU; an image without a confidence is left out."""
        known = ~confidences.isnan()
        pairs, confidences = pairs[known], confidences[known]
        bins = (confidences * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        right = pairs // (num_classes + 1) == pairs % (num_classes + 1)
        return cls(
            bins.bincount(minlength=NUM_BINS),
            bins[right].bincount(minlength=NUM_BINS),
            bins.bincount(confidences.double(), minlength=NUM_BINS),
        )

    @property
    def error(self) -> float:
        """Expected calibration error, 0 to 1: the mean distance of accuracy and confidence, weighted by images."""
        return float((self.num_correct - self.confidence).abs().sum() / self.num_images.sum().clamp(min=1))


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
    def of(cls, images: Tensor, pairs: Tensor, confidences: Tensor, num_classes: int) -> "Mistakes":
        """From what Tally computes, on the CPU."""
        real = confidences >= 0
        pairs = pairs[real]
        return cls(images[real], pairs // (num_classes + 1), pairs % (num_classes + 1), confidences[real])


def _join_ranks(state: Tensor) -> Tensor:
    return state.flatten(0, 1)  # (ranks, M, ...)


class Tally(Metric):
    """All that is counted in one stage of evaluation: confusion matrix, loss, calibration and worst mistakes.

    What became of each image of all ranks (its true and predicted class, its loss, the net's confidence) is kept as it
    comes, 16 bytes an image, where an image has 3,072; the CPU counts and sums it once, in integers and float64.
    Apple's mps has no float64, and sums in float32 would drift. torchmetrics' MulticlassConfusionMatrix counts the
    same, but waits for a GPU in each batch (bincount), and holds K x K numbers four times; with 10,000 classes that is
    3 GB.

    The counts move with the module that holds the tally, and are not in its state_dict. Nothing waits for the device
    before `take`.

    Args:
        num_classes: number of classes K.
    """

    full_state_update = False
    pairs: list[Tensor]
    losses: list[Tensor]
    confidences: list[Tensor]
    worst_images: Tensor
    worst_pairs: Tensor
    worst_confidences: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name in ("pairs", "losses", "confidences"):
            self.add_state(name, [], dist_reduce_fx="cat")
        images, pairs = torch.zeros(NUM_MISTAKES, 3, 32, 32).byte(), torch.zeros(NUM_MISTAKES).long()
        self.add_state("worst_images", images, dist_reduce_fx=_join_ranks)
        self.add_state("worst_pairs", pairs, dist_reduce_fx=_join_ranks)
        below_all = torch.full((NUM_MISTAKES,), -1.0)
        self.add_state("worst_confidences", below_all, dist_reduce_fx=_join_ranks)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # numbers keep their types, whatever the weights become: torchmetrics' own guard knows half() and its like, not
        # to(dtype), with which --precision bf16-true converts
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)

    def update(self, logits: Tensor, images: Tensor, labels: Tensor) -> None:
        """Counts images (B, 3, 32, 32) uint8 by their logits (B, K), of any float dtype, and labels (B,) int64.

        Where logits hold NaN or infinity they predict no class.
        """
        logits = logits.float()
        probabilities = logits.softmax(1)
        undecided = probabilities[:, 0].isnan()  # softmax makes all of a row NaN, or nothing
        predictions = torch.where(undecided, self.num_classes, logits.argmax(1))
        confidences = torch.where(undecided, math.nan, probabilities.amax(1))
        pairs = labels * (self.num_classes + 1) + predictions
        self.pairs.append(pairs)
        self.losses.append(F.cross_entropy(logits, labels, reduction="none"))
        self.confidences.append(confidences)
        wrong = torch.where((predictions == labels) | undecided, -1.0, confidences)
        wrong, new = wrong.topk(min(NUM_MISTAKES, len(labels)))
        self.worst_images = torch.cat([self.worst_images, images[new]])
        self.worst_pairs = torch.cat([self.worst_pairs, pairs[new]])
        self.worst_confidences = torch.cat([self.worst_confidences, wrong])
        self.worst_images, self.worst_pairs, self.worst_confidences = self._worst()

    def _worst(self) -> tuple[Tensor, Tensor, Tensor]:
        confidences, worst = self.worst_confidences.topk(NUM_MISTAKES)
        return self.worst_images[worst], self.worst_pairs[worst], confidences

    def compute(self) -> tuple[Tensor, ...]:
        """Of each image label * (K + 1) + prediction (N,) int64, K where there is no prediction, loss and confidence
        (N,) float32, by ranks; images, pairs and confidences of NUM_MISTAKES mistakes, of -1 where there are fewer."""
        return *map(dim_zero_cat, (self.pairs, self.losses, self.confidences)), *self._worst()

    def take(self) -> tuple[Tensor, float, Calibration, Mistakes]:
        """What was counted on all ranks, for a Report; counting starts again from nothing.

        Every rank must call it at once, and each gets the same.

        Returns:
            The confusion matrix, as count_confusion gives it; the mean cross-entropy, NaN where a logit is; the
            calibration; the worst mistakes. All tensors are on the CPU.
        """
        if not self.update_called:  # a loader without a batch
            none = torch.zeros(0, device=self.device)
            self.update(none.new_zeros(0, self.num_classes), none.new_zeros(0, 3, 32, 32).byte(), none.long())
        pairs, losses, confidences, *worst = (values.cpu() for values in self.compute())
        self.reset()
        return (
            count_confusion(pairs, self.num_classes),
            float(losses.double().mean()),
            Calibration.of(pairs, confidences, self.num_classes),
            Mistakes.of(worst[0], worst[1], worst[2], self.num_classes),
        )
