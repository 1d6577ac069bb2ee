"""A batch is a pure function of (seed, epoch, position): not of the ranks, the workers, or what ran before."""

import gc
import random
import re
import weakref
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pretend import pretended
from torch import Tensor, nn
from torchvision.transforms import v2

from lit_cifar.data import loader as loader_module
from lit_cifar.data.augment import Augment
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.data.loader import DeviceLoader, EvalBatches, TrainBatches
from lit_cifar.data.split import Split
from lit_cifar.errors import UserError

CPU = torch.device("cpu")
AUGMENT = Augment(crop=4, flip="random", cutout=8, brightness=0.2, contrast=0.2)
PATHS = ("resident", "transform")
Batches = list[tuple[Tensor, Tensor]]

# Python 3.12 and later warn when a process with threads forks, which is how torch starts workers on Linux.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Noise(nn.Module):
    """A transform that draws from each of the three global random states."""

    def forward(self, image: Tensor) -> Tensor:
        image = v2.functional.horizontal_flip(image) if random.random() < 0.5 else image
        image = image.roll(int(np.random.randint(32)), 1)
        return v2.RandomCrop(32, padding=4)(image)


def make_split(num_images: int = 23) -> Split:
    """Random images, each labelled with its own index."""
    images = torch.randint(256, (num_images, 3, 32, 32), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    return Split(images, torch.arange(num_images), tuple(map(str, range(num_images))))


def make_loader(path: str = "resident", num_images: int = 23, num_workers: int = 0, **options: Any) -> DeviceLoader:
    batches = TrainBatches(num_images, **{"batch_size": 6, "seed": 3, **options})
    if path == "resident":
        return DeviceLoader(make_split(num_images), batches, CPU, augment=AUGMENT)
    return DeviceLoader(make_split(num_images), batches, CPU, transform=Noise(), num_workers=num_workers)


def epoch_of(loader: DeviceLoader, epoch: int) -> Batches:
    loader.set_epoch(epoch)
    return list(loader)


def same(first: Batches, second: Batches) -> bool:
    """Equal labels and equal pixels in equally many batches."""
    return len(first) == len(second) and all(
        torch.equal(mine, yours) for pair in zip(first, second, strict=True) for mine, yours in zip(*pair, strict=True)
    )


def pixels_by_label(batches: Batches) -> dict[int, Tensor]:
    return {int(label): image for images, labels in batches for image, label in zip(images, labels, strict=True)}


# ---- TrainBatches ----


def shares_of(batches: TrainBatches | EvalBatches, epoch: int = 0) -> list[Tensor]:
    """A rank's indices of each batch."""
    indices, sizes = batches.indices(epoch)
    return list(indices.split(sizes))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_images", [24, 23, 20, 19])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_share_exactly_the_batch_of_one_rank(num_ranks: int, num_images: int, drop_last: bool) -> None:
    whole = TrainBatches(num_images, 6, seed=5, drop_last=drop_last)
    ranks = [TrainBatches(num_images, 6, 5, True, drop_last, rank, num_ranks) for rank in range(num_ranks)]
    expected = shares_of(whole, 2)
    assert all(len(rank) == len(shares_of(rank, 2)) == len(expected) for rank in ranks)
    for index, (batch, *shares) in enumerate(zip(expected, *(shares_of(rank, 2) for rank in ranks), strict=True)):
        assert sorted(torch.cat(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert all(rank.num_in_batch(index) == len(batch) for rank in ranks)
    seen = torch.cat(expected)
    assert len(seen.unique()) == len(seen) == (num_images // 6 * 6 if drop_last else num_images)


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    order = TrainBatches(100, 4, seed=1).order(3)
    torch.manual_seed(12)
    torch.rand(5)
    for batches in (TrainBatches(100, 10, seed=1), TrainBatches(100, 4, 1, True, True, 1, 2)):
        assert torch.equal(batches.order(3), order)
    assert torch.equal(TrainBatches(100, 4, seed=1, shuffle=False).order(3), torch.arange(100))


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    # torch's CPU generator keeps 32 bits of a seed, and (seed << 16) + epoch meets itself: (0, 65537) and (1, 1)
    keys = list(product((0, 1, 2, 65536, 65537, 2**32, 2**32 + 1, 2**63, -1), (0, 1, 2, 65536, 65537)))
    orders = {tuple(TrainBatches(100, 4, seed=seed).order(epoch).tolist()) for seed, epoch in keys}
    assert len(orders) == len(keys)


@pytest.mark.parametrize("batch_size", [0, -4, 24])
def test_a_batch_that_does_not_fit_the_set_names_both_numbers(batch_size: int) -> None:
    with pytest.raises(UserError, match=rf"^batch_size={batch_size} .* 23 ") as raised:
        TrainBatches(23, batch_size)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "num_images", "nearest"),
    [(4, 3, 23, 3), (5, 3, 23, 6), (1, 2, 23, 2), (5, 2, 23, 4), (5, 3, 5, 3), (23, 8, 23, 16)],
)
def test_a_batch_that_ranks_cannot_share_names_the_nearest_that_works(
    batch_size: int, num_ranks: int, num_images: int, nearest: int
) -> None:
    with pytest.raises(UserError, match=rf"^batch_size={batch_size} .* {num_ranks} devices") as raised:
        TrainBatches(num_images, batch_size, num_ranks=num_ranks)
    named = re.search(r"nearest that works is (\d+)", str(raised.value))
    assert named
    assert int(named[1]) == nearest
    assert len(TrainBatches(num_images, nearest, num_ranks=num_ranks)) > 0


# ---- EvalBatches ----


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("num_images", [10_000, 2_000, 101, 5, 2])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_evaluation_takes_every_image_once_in_equally_many_batches(
    num_images: int, num_ranks: int, batch_size: int
) -> None:
    ranks = [EvalBatches(num_images, batch_size, rank, num_ranks) for rank in range(num_ranks)]
    shares = [shares_of(rank) for rank in ranks]
    assert sorted(torch.cat([share for mine in shares for share in mine]).tolist()) == list(range(num_images))
    assert {len(mine) for mine in shares} == {len(rank) for rank in ranks} == {len(ranks[0])}
    totals = [sum(map(len, mine)) for mine in shares]
    assert max(totals) - min(totals) <= 1
    for mine in shares:
        assert max(map(len, mine)) - min(map(len, mine)) <= 1
        assert max(map(len, mine)) <= batch_size
        assert torch.equal(torch.cat(mine), torch.cat(mine).sort().values)


def test_an_evaluation_batch_has_at_least_one_image() -> None:
    with pytest.raises(UserError, match=r"eval_batch_size=0"):
        EvalBatches(10, 0)


@pytest.mark.parametrize(
    ("kind", "memory_bytes", "chosen", "expected"),
    [("cuda", 8e9, None, 2000), ("cuda", 6e9, None, 500), ("cuda", 8e9, 7, 7), ("mps", 0, None, 500)],
)
def test_evaluation_batches_are_large_where_there_is_memory(
    kind: str, memory_bytes: float, chosen: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CIFAR10DataModule(dataset="shapes", eval_batch_size=chosen)
    data.setup("test")
    with pretended(kind) as device:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory_bytes))
        strategy = SimpleNamespace(root_device=device.device, broadcast=lambda size: size)
        data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)  # type: ignore[assignment]
        batches = data.test_dataloader().batches
        assert batches.batch_size == expected


def test_ranks_with_unequal_gpus_evaluate_equally_many_batches() -> None:
    data = CIFAR10DataModule(dataset="shapes")
    data.setup("test")
    strategy = SimpleNamespace(root_device=CPU, broadcast=lambda size: 4 * size)  # rank 0 has the larger one
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=1, world_size=2)  # type: ignore[assignment]
    assert len(data.test_dataloader()) == 1


# ---- DeviceLoader ----


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_loader_that_resumes_gives_the_batches_of_one_that_never_stopped(path: str, num_ranks: int) -> None:
    uninterrupted = [epoch_of(make_loader(path, rank=num_ranks - 1, num_ranks=num_ranks), epoch) for epoch in (4, 5)]
    assert not same(*uninterrupted)
    for stop in range(len(uninterrupted[0]) + 1):
        state = stopped_at(make_loader(path), 4, stop)  # by one rank, whatever number continues
        assert state == {"epoch": 4, "batch": stop}
        loader = make_loader(path, rank=num_ranks - 1, num_ranks=num_ranks)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert len(loader) == 4, "the whole epoch's, as Lightning counts from the position on"
        assert same(list(loader), uninterrupted[0][stop:])
        assert loader.state_dict() == {"epoch": 4, "batch": 4}
        assert same(list(loader), uninterrupted[0]), "the position is used up"
        assert same(epoch_of(loader, 5), uninterrupted[1])


def stopped_at(loader: DeviceLoader, epoch: int, num_batches: int) -> dict[str, int]:
    if num_batches == 0:
        return {"epoch": epoch, "batch": 0}
    loader.set_epoch(epoch)
    batches = iter(loader)
    for _ in range(num_batches):
        next(batches)
    return loader.state_dict()


def test_a_state_is_in_force_when_iter_comes_before_set_epoch() -> None:
    # Lightning loads the state, calls iter(), and sets the epoch after that
    uninterrupted = epoch_of(make_loader(), 4)
    loader = make_loader()
    loader.load_state_dict({"epoch": 4, "batch": 2})
    batches = iter(loader)
    loader.set_epoch(4)
    assert same(list(batches), uninterrupted[2:])


def test_the_state_of_an_epochs_end_leads_to_the_whole_next_epoch() -> None:
    next_epoch = epoch_of(make_loader(), 5)
    loader = make_loader()
    loader.load_state_dict({"epoch": 4, "batch": 4})
    batches: Iterator[tuple[Tensor, Tensor]] = iter(loader)
    loader.set_epoch(5)
    assert same(list(batches), next_epoch)


@pytest.mark.parametrize("path", PATHS)
def test_an_epoch_given_twice_or_after_an_unfinished_one_is_the_same(path: str) -> None:
    loader = make_loader(path, num_workers=2)
    first = epoch_of(loader, 1)
    assert same(list(loader), first)
    assert not same(epoch_of(loader, 2), first)
    next(iter(loader))
    assert same(epoch_of(loader, 1), first)


@pytest.mark.parametrize("chunk", [1, 9, 10_000])
def test_chunks_change_no_pixel(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [epoch_of(make_loader(batch_size=4), epoch) for epoch in range(2)]
    monkeypatch.setattr(loader_module, "CHUNK", chunk)
    for epoch in range(2):
        assert same(epoch_of(make_loader(batch_size=4), epoch), expected[epoch])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_see_together_the_pixels_that_one_rank_sees(path: str, num_ranks: int) -> None:
    whole = epoch_of(make_loader(path), 2)
    ranks = [epoch_of(make_loader(path, rank=rank, num_ranks=num_ranks), 2) for rank in range(num_ranks)]
    for (images, labels), *shares in zip(whole, *ranks, strict=True):
        for rank, (its_images, its_labels) in enumerate(shares):
            assert torch.equal(its_images, images[rank::num_ranks])
            assert torch.equal(its_labels, labels[rank::num_ranks])


@pytest.mark.parametrize("path", PATHS)
def test_an_image_depends_on_seed_and_epoch_but_not_on_the_batch_it_is_in(path: str) -> None:
    original = pixels_by_label(epoch_of(make_loader(path), 2))
    assert sorted(original) == list(range(23))
    rebatched = pixels_by_label(epoch_of(make_loader(path, batch_size=5, shuffle=False), 2))
    assert all(torch.equal(rebatched[label], image) for label, image in original.items())
    for loader, epoch in ((make_loader(path), 3), (make_loader(path, seed=4), 2)):
        others = pixels_by_label(epoch_of(loader, epoch))
        assert sum(torch.equal(others[label], image) for label, image in original.items()) < 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_transform_gets_the_order_and_shares_of_the_resident_path(num_workers: int) -> None:
    for rank in range(2):
        options = {"rank": rank, "num_ranks": 2}
        resident = make_loader("resident", **options)
        transformed = make_loader("transform", num_workers=num_workers, **options)
        for epoch in range(2):
            labels = [labels.tolist() for _, labels in epoch_of(transformed, epoch)]
            assert labels == [labels.tolist() for _, labels in epoch_of(resident, epoch)]


def test_workers_change_no_pixel() -> None:
    alone, shared = make_loader("transform"), make_loader("transform", num_workers=2)
    for epoch in range(2):
        assert same(epoch_of(alone, epoch), epoch_of(shared, epoch))
    shared.load_state_dict({"epoch": 1, "batch": 3})
    assert same(list(shared), epoch_of(alone, 1)[3:])


@pytest.mark.parametrize(("path", "num_workers"), [("resident", 0), ("transform", 0), ("transform", 2)])
def test_a_loader_leaves_the_global_random_states_alone(path: str, num_workers: int) -> None:
    def states() -> str:
        return repr((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))  # type: ignore[index]

    before = states()
    list(make_loader(path, num_workers=num_workers))
    assert states() == before


@pytest.mark.parametrize("path", PATHS)
def test_a_loader_let_go_frees_its_images_and_workers_without_garbage_collection(path: str) -> None:
    # otherwise a later fork inherits a dead loader's workers, and collecting them there has blocked for 10 s
    loader = make_loader(path, num_workers=2)
    list(loader)
    assert loader.batch_sampler.sampler is loader
    alive = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("path", PATHS)
def test_a_rank_whose_share_is_empty_gets_an_empty_batch(path: str) -> None:
    batches = epoch_of(make_loader(path, num_images=13, rank=2, num_ranks=3), 0)
    assert [len(labels) for _, labels in batches] == [2, 2, 0]
    images, labels = batches[-1]
    assert (images.shape, images.dtype, labels.dtype) == ((0, 3, 32, 32), torch.uint8, torch.int64)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_alternating_flips_mirror_each_image_from_epoch_to_epoch(num_ranks: int) -> None:
    batches = TrainBatches(40, 4, seed=3, rank=num_ranks - 1, num_ranks=num_ranks, shuffle=False)
    split = make_split(40)
    loader = DeviceLoader(split, batches, CPU, augment=Augment(flip="alternating"))
    epochs = [torch.cat([images for images, _ in epoch_of(loader, epoch)]) for epoch in range(3)]
    assert torch.equal(epochs[1], epochs[0].flip(3))
    assert torch.equal(epochs[2], epochs[0])
    unflipped = (epochs[0] == split.images[num_ranks - 1 :: num_ranks]).flatten(1).all(1)
    assert 0.2 < unflipped.float().mean() < 0.8, "a random half starts mirrored"


def on_cpu(batches: Batches) -> Batches:
    return [(images.cpu(), labels.cpu()) for images, labels in batches]


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_a_gpu_waits_for_no_epoch_and_sees_the_same_images(flip: Any) -> None:
    split, batches, augment = make_split(), TrainBatches(23, 6, seed=3), Augment(crop=4, flip=flip, cutout=8)
    with pretended("cuda") as device:
        loader, on_the_cpu = (DeviceLoader(split, batches, place, augment) for place in (device.device, CPU))
        for epoch in (0, 1, 2, 5, 4):
            device.waits.clear()
            loader.set_epoch(epoch)
            given = iter(loader)
            first = next(given)
            if epoch in (1, 2):  # made ready with the last batch of the epoch before
                assert not device.waits
            seen = [first, *given]
            assert {kind for kind, *_ in device.waits} <= {"h2d async"}
            assert same(on_cpu(seen), epoch_of(on_the_cpu, epoch))
        loader.load_state_dict({"epoch": 5, "batch": 2})  # which is ready, from its beginning
        assert same(on_cpu(list(loader)), epoch_of(on_the_cpu, 5)[2:])


def test_evaluation_on_a_gpu_begins_without_waiting() -> None:
    with pretended("cuda") as device:
        loader = DeviceLoader(make_split(), EvalBatches(23, 5), device.device)
        device.waits.clear()
        assert len(list(loader)) == 5
        assert [kind for kind, *_ in device.waits] == ["h2d async"]


def test_a_mac_waits_for_the_copies_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[bool] = []

    def to(tensor: Tensor, *args: Any, non_blocking: bool = False, real: Any = Tensor.to, **kwargs: Any) -> Tensor:
        copies.append(non_blocking)
        return real(tensor, *args, **kwargs)

    with pretended("mps") as device:
        loader = DeviceLoader(make_split(), TrainBatches(23, 6), device.device, AUGMENT, Noise())
        monkeypatch.setattr(Tensor, "to", to)
        assert len(list(loader)) == 4
    assert copies
    assert not any(copies), "their memory may be freed before they are made"


@pytest.mark.parametrize(("kind", "num_epochs", "expected"), [("cuda", None, 4), ("cuda", 3, 3), ("mps", None, 3)])
def test_each_epoch_is_drawn_once_and_ahead_for_a_gpu_alone(
    kind: str, num_epochs: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_draws = 0

    def draw(augment: Augment, *args: Any, real: Any = Augment.draw) -> Any:
        nonlocal num_draws
        num_draws += 1
        return real(augment, *args)

    monkeypatch.setattr(Augment, "draw", draw)
    with pretended(kind) as device:
        augment = Augment(flip="alternating")
        loader = DeviceLoader(make_split(), TrainBatches(23, 6), device.device, augment, num_epochs=num_epochs)
        for epoch in range(3):
            epoch_of(loader, epoch)
    assert num_draws == expected


def test_evaluation_gives_the_images_as_they_are() -> None:
    split = make_split()
    images, labels = (torch.cat(part) for part in zip(*DeviceLoader(split, EvalBatches(23, 5), CPU), strict=True))
    assert torch.equal(images, split.images)
    assert torch.equal(labels, split.labels)


@pytest.mark.parametrize(
    ("transform", "given"),
    [
        (v2.ToDtype(torch.float32, scale=True), "torch.float32 (3, 32, 32)"),
        (v2.CenterCrop(28), "torch.uint8 (3, 28, 28)"),
        (v2.ToPILImage(), "Image"),
    ],
)
def test_a_transform_that_gives_no_uint8_image_is_refused(transform: nn.Module, given: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"transform gave {given} where torch.uint8 (3, 32, 32)")):
        DeviceLoader(make_split(), TrainBatches(23, 6), CPU, transform=transform)


class Fails(nn.Module):
    """Fails on the images of some labels, which are their first pixel's value, or gives them another shape."""

    def __init__(self, *values: int, crop: bool = False) -> None:
        super().__init__()
        self.values, self.crop = values, crop

    def forward(self, image: Tensor) -> Tensor:
        if int(image[0, 0, 0]) not in self.values:
            return image
        if self.crop:
            return image[:, 1:]
        raise RuntimeError("no\nsuch colour")


def numbered(num_images: int = 23) -> Split:
    images = torch.arange(num_images, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    return Split(images, torch.arange(num_images), tuple(map(str, range(num_images))))


@pytest.mark.parametrize(
    ("transform", "cause"),
    [
        (v2.MixUp(num_classes=10), "MixUp fails (ValueError: "),
        (v2.CutMix(num_classes=10), "CutMix fails (ValueError: "),
        (nn.Sequential(v2.RandomInvert(p=0), Fails(0)), "Fails fails (RuntimeError: no such colour, in "),
        (v2.Normalize([0.5], [0.5]), "Normalize fails (TypeError: "),
    ],
)
def test_a_transform_that_fails_is_named_with_what_it_gets(transform: nn.Module, cause: str) -> None:
    with pytest.raises(UserError) as raised:
        DeviceLoader(numbered(), TrainBatches(23, 6), CPU, transform=transform)
    line = str(raised.value)
    assert line.startswith(f"transform: {cause}")
    assert line.endswith(
        "a transform gets one image at a time, torch.uint8 (3, 32, 32), without its label and the rest of the batch"
    )
    assert line.isprintable()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("transform", "line"),
    [
        (Fails(17), "transform: Fails fails (RuntimeError: no such colour, in "),
        (Fails(17, crop=True), "transform gave torch.uint8 (3, 31, 32) where torch.uint8 (3, 32, 32) is needed"),
        (Fails(*range(1, 23), crop=True), "transform gave torch.uint8 (3, 31, 32) where"),
    ],
)
def test_a_transform_that_fails_on_a_later_image_ends_in_one_line(
    transform: nn.Module, line: str, num_workers: int
) -> None:
    loader = DeviceLoader(numbered(), TrainBatches(23, 6), CPU, transform=transform, num_workers=num_workers)
    with pytest.raises(UserError) as raised:
        list(loader)
    assert str(raised.value).startswith(line)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_transform_and_the_built_in_augmentation_depend_on_seed_and_epoch_alone(num_ranks: int) -> None:
    def both(num_workers: int = 0, **options: Any) -> DeviceLoader:
        batches = TrainBatches(23, **{"batch_size": 6, "seed": 3, **options})
        return DeviceLoader(make_split(), batches, CPU, AUGMENT, Noise(), num_workers)

    whole = epoch_of(both(), 4)
    assert not same(whole, epoch_of(make_loader("transform"), 4)), "not dropped"
    assert not same(whole, epoch_of(make_loader("resident"), 4))
    resumed = both(num_workers=2)
    resumed.load_state_dict({"epoch": 4, "batch": 1})
    assert same(list(resumed), whole[1:])
    shares = [epoch_of(both(rank=rank, num_ranks=num_ranks), 4) for rank in range(num_ranks)]
    for rank, share in enumerate(shares):
        assert all(torch.equal(mine[0], all_[0][rank::num_ranks]) for mine, all_ in zip(share, whole, strict=True))
