"""Step sizes and updates, with torch's own schedulers, its SGD and its SVD as references."""

import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from lit_cifar.errors import UserError
from lit_cifar.model.optim import QUINTIC, Group, MuonSGD, Schedule, claim, lr_factor, orthogonalise

SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine", "onecycle")


def rates(scheduler: type[lr_scheduler.LRScheduler], num_steps: int, **options: Any) -> list[float]:
    """The learning rates that a scheduler of torch's gives at steps 0 to num_steps - 1, of a base rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = scheduler(optimizer, **options)
    seen = []
    for _ in range(num_steps):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        with warnings.catch_warnings():
            # its cosine is recursive in some releases and calls its own step through a deprecated path
            warnings.simplefilter("ignore", UserWarning)
            if len(seen) < num_steps:  # OneCycleLR refuses one step too many
                schedule.step()
    return seen


@pytest.mark.parametrize("num_steps", [3, 10, 97])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.5, 0.95])
def test_onecycle_equals_torchs_at_every_step(warmup: float, num_steps: int) -> None:
    expected = rates(
        lr_scheduler.OneCycleLR, num_steps, max_lr=1.0, total_steps=num_steps, pct_start=warmup, cycle_momentum=False
    )
    given = [lr_factor(step, num_steps, "onecycle", warmup) for step in range(num_steps)]
    assert given == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_onecycle_that_only_rises_ends_at_its_peak() -> None:
    given = [lr_factor(step, 11, "onecycle", 1.0) for step in range(11)]
    assert given == sorted(given)
    assert given[0] == pytest.approx(1 / 25)
    assert given[-1] == 1


def test_linear_equals_torchs_at_every_step() -> None:
    expected = rates(lr_scheduler.LinearLR, 50, start_factor=1.0, end_factor=1e-12, total_iters=50)
    assert [lr_factor(step, 50, "linear") for step in range(50)] == pytest.approx(expected, abs=1e-9)


def test_cosine_equals_torchs_at_every_step() -> None:
    expected = rates(lr_scheduler.CosineAnnealingLR, 50, T_max=50)
    assert [lr_factor(step, 50, "cosine") for step in range(50)] == pytest.approx(expected, abs=1e-9)


def test_cosine_after_its_warmup_falls_over_the_steps_that_are_left() -> None:
    given = [lr_factor(step, 50, "cosine", 0.2) for step in range(10, 50)]
    assert given == pytest.approx([(1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warmup_rises_in_equal_steps_to_the_base_rate(schedule: Schedule) -> None:
    assert [lr_factor(step, 40, schedule, 0.1) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert lr_factor(4, 40, schedule, 0.1) == 1


def test_constant_stays_at_the_base_rate() -> None:
    assert {lr_factor(step, 10) for step in range(12)} == {1.0}


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_factors_are_in_0_to_1_and_the_last_stays(schedule: Schedule, warmup: float, num_steps: int) -> None:
    given = [lr_factor(step, num_steps, schedule, warmup) for step in range(num_steps + 3)]
    assert all(0 < factor <= 1 for factor in given)
    assert set(given[num_steps:]) == {given[num_steps - 1]}


# ---- orthogonalisation ----


@pytest.mark.parametrize("shape", [(1, 8, 20), (3, 20, 8), (2, 16, 16)])
def test_orthogonalising_keeps_singular_vectors_and_evens_out_singular_values(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(random, full_matrices=False)
    spectrum = torch.linspace(1.0, 0.1, u.shape[2], dtype=torch.float64)
    result = u.mT @ orthogonalise(u @ torch.diag(spectrum) @ vh) @ vh.mT  # in the basis of the singular vectors
    values = result.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(result, torch.diag_embed(values), rtol=0, atol=1e-9)
    assert values.min() > 0.3
    assert values.max() < 1.4
    # the orthogonal factor of the SVD has ones; the spectrum is four times nearer to it than it was
    assert values.std() < spectrum.std() / 1.5


def test_orthogonalising_knows_no_scale_and_keeps_zeros() -> None:
    matrices = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(matrices), orthogonalise(1e-6 * matrices), rtol=1e-4, atol=1e-5)
    assert orthogonalise(torch.zeros(1, 4, 4)).eq(0).all()


class Launches(TorchDispatchMode):
    """Names the operators that a device would be told to compute, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "view" not in func.__name__:
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_orthogonalising_is_the_quintic_polynomial_in_three_products_an_iteration() -> None:
    matrices = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = QUINTIC
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    for _ in range(3):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    with Launches() as launches:
        result = orthogonalise(matrices)
    torch.testing.assert_close(result, x, rtol=1e-12, atol=1e-12)
    assert launches.names[-9:] == 3 * ["bmm", "baddbmm", "baddbmm"]


def test_a_muon_step_of_many_banks_launches_little_besides_its_products() -> None:
    weights = [nn.Parameter(torch.randn(8, 4, 3, 3)) for _ in range(20)]  # of one shape
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = MuonSGD([{"params": weights, "kind": "muon", "lr": 0.1, "momentum": 0.6, "nesterov": True}])
    optimizer.step()
    with Launches() as launches:
        optimizer.step()
    assert len(launches.names) < 30


# ---- the optimiser ----


def small_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, first: int = 0) -> None:
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 5

        def closure(images: torch.Tensor = images, labels: torch.Tensor = labels) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_sgd_kind_is_torchs_sgd(momentum: float, weight_decay: float, nesterov: bool) -> None:
    if nesterov and not momentum:
        pytest.skip("torch refuses it")
    options = {"lr": 0.05, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    ours, theirs = small_net(), small_net()
    train(ours, MuonSGD([{"params": list(ours.parameters()), "kind": "sgd", **options}]), 5)
    train(theirs, torch.optim.SGD(theirs.parameters(), **options), 5)  # type: ignore[arg-type]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_muon_step_scales_the_bank_and_moves_it_by_the_orthogonal_factor() -> None:
    weight = nn.Parameter(torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    weight.grad = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    MuonSGD([{"params": [weight], "kind": "muon", "lr": 0.1, "momentum": 0.0}]).step()
    update = orthogonalise(weight.grad.reshape(1, 6, 12)).view_as(weight)
    torch.testing.assert_close(weight.detach(), before * 6**0.5 / before.norm() - 0.1 * update)


def test_filters_of_one_shape_are_orthogonalised_together_as_they_are_alone() -> None:
    def stepped(count: int) -> torch.Tensor:
        weights = [nn.Parameter(torch.full((4, 2, 3, 3), 1.0 + i)) for i in range(count)]
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(i))
        MuonSGD([{"params": weights, "kind": "muon", "lr": 0.1, "momentum": 0.6, "nesterov": True}]).step()
        return weights[0].detach()

    torch.testing.assert_close(stepped(1), stepped(3))


def test_the_optimiser_goes_on_from_its_state_to_the_bit() -> None:
    def made() -> tuple[nn.Module, MuonSGD]:
        net = small_net()
        groups = claim(net.named_parameters(), [Group("filters", r"^0\.weight", "muon"), Group("rest", "")])
        options = {"lr": 0.05, "momentum": 0.6, "nesterov": True}
        kinds = ("muon", "sgd")
        return net, MuonSGD([{"params": p, "kind": k, **options} for p, k in zip(groups, kinds, strict=True)])

    whole, optimizer = made()
    train(whole, optimizer, 6)
    first, optimizer = made()
    train(first, optimizer, 3)
    second, resumed = made()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, 3, first=3)
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert one.equal(other)


# ---- parameter groups ----


def test_the_first_pattern_that_matches_claims_and_frozen_parameters_are_left() -> None:
    net = small_net()
    net[0].bias.requires_grad_(False)  # type: ignore[index]
    first, rest = claim(net.named_parameters(), [Group("filters", r"^0\."), Group("rest", "")])
    assert [id(p) for p in first] == [id(net[0].weight)]  # type: ignore[index]
    assert [id(p) for p in rest] == [id(net[2].weight), id(net[2].bias)]  # type: ignore[index]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group("filters", "weight")], "no pattern matches 0.bias"),
        ([Group("all", ""), Group("late", "bias")], "late's pattern 'bias' claims no parameter"),
        ([Group("all", "", "muon")], "0.bias, which is no matrix"),
        ([Group("all", "(")], "no regular expression"),
        ([Group("a", "weight"), Group("a", "")], "share a name"),
    ],
)
def test_groups_that_cannot_be_meant_are_refused(groups: list[Group], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        claim(small_net().named_parameters(), groups)
