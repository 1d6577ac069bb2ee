"""SpeedNet and ResNet-18: what is fixed about them, against torch and torchvision."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_cifar.nets import ResNet18, SpeedNet


def correlated_images() -> torch.Tensor:
    """Images whose neighbours are alike, as natural images' are."""
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return 3 * nn.functional.avg_pool2d(noise, 3, stride=1, padding=1) + 0.3 * noise


def test_whitening_gives_uncorrelated_outputs_of_one_variance_in_both_signs() -> None:
    images, net = correlated_images(), SpeedNet()
    net.init_from_images(images)
    outputs = net.whiten(images).transpose(0, 1).flatten(1)  # (24, num_patches)
    torch.testing.assert_close(outputs[:12], -outputs[12:])
    second_moments = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    raw = nn.functional.unfold(images, 2).transpose(1, 2).flatten(0, 1).T
    raw_moments = raw @ raw.T / raw.shape[1]
    assert (raw_moments - raw_moments.diag().diag()).abs().max() > 0.1  # there was something to whiten
    torch.testing.assert_close(second_moments, torch.eye(12), rtol=0, atol=0.1)


def test_the_whitening_layer_and_batchnorms_scales_are_not_trained() -> None:
    frozen = {name for name, parameter in SpeedNet().named_parameters() if not parameter.requires_grad}
    norms = {f"blocks.{i}.norm{j}.weight" for i in range(3) for j in (1, 2)}
    assert frozen == {"whiten.weight"} | norms


def test_the_first_filters_of_each_convolution_pass_their_input_on() -> None:
    conv = SpeedNet().blocks[1].conv1
    features = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(conv(features)[:, :64], features)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("side", [16, 20, 24, 28, 32])
def test_speednet_takes_images_of_any_side_and_its_head_knows_no_scale(side: int, depth: int) -> None:
    net = SpeedNet(num_classes=7, widths=(8, 12, 16), depth=depth).eval()  # type: ignore[arg-type]
    assert net(torch.randn(3, 3, side, side)).shape == (3, 7)
    assert net.head.weight.std().item() == pytest.approx(1.0)


def test_a_block_of_three_convolutions_has_a_residual_connection() -> None:
    block = copy.deepcopy(SpeedNet(depth=3).blocks[0]).eval()
    nn.init.zeros_(block.conv3.weight)
    features = torch.randn(2, 24, 9, 9)
    pooled = nn.functional.max_pool2d(block.conv1(features), 2)
    shortcut = block.activation(block.norm1(pooled))
    torch.testing.assert_close(block(features), block.activation(shortcut), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("synchronised", [False, True])
def test_batchnorm_stays_float32_beside_half_precision(synchronised: bool) -> None:
    net = SpeedNet()
    if synchronised:  # as on several GPUs
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.blocks[0].norm1.running_mean += 1 / 3
    before = copy.deepcopy(net.blocks[0].norm1.state_dict())
    net.bfloat16()
    torch.testing.assert_close(net.blocks[0].norm1.state_dict(), before, rtol=0, atol=0)
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) == 6
    for norm in norms:
        assert not norm.weight.requires_grad
        assert {norm.bias.dtype, norm.weight.dtype, norm.running_mean.dtype} == {torch.float32}
    assert net.head.weight.dtype == torch.bfloat16
    if not synchronised:  # which the CPU cannot compute
        net(torch.randn(4, 3, 32, 32, dtype=torch.bfloat16)).sum().backward()
        net.bfloat16()
        assert net.blocks[0].norm1.bias.grad.dtype == torch.float32


def test_resnet18_is_channels_last_throughout_and_its_weights_fit_either_layout() -> None:
    ours, images, layouts = ResNet18(), torch.randn(4, 3, 32, 32), []
    for module in ours.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(lambda module, given, features: layouts.append(features))
    logits = ours(images)
    assert len(layouts) == 20
    assert all(features.is_contiguous(memory_format=torch.channels_last) for features in layouts)
    older = ResNet18().to(memory_format=torch.contiguous_format)  # as in checkpoints of before
    older.load_state_dict(ours.state_dict())
    assert all(weight.equal(ours.state_dict()[name]) for name, weight in older.state_dict().items())
    ours.load_state_dict(older.state_dict())
    assert ours.conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(older(images), logits, rtol=1e-4, atol=1e-4)


def test_resnet18_equals_torchvisions_with_the_small_stem() -> None:
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    ours = ResNet18()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 11_173_962
    # both list the same layers, but torchvision's blocks list their shortcut last too
    ours.load_state_dict(dict(zip(ours.state_dict(), reference.state_dict().values(), strict=True)))
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), reference.eval()(images), rtol=1e-4, atol=1e-4)
