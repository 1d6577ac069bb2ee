"""What torch.hub finds here: a trained net from a checkpoint. lit_cifar/model/classifier.py makes it."""

from lit_cifar import load

dependencies = ["torch", "torchvision", "lightning", "torchmetrics", "tensorboard", "jsonargparse", "safetensors"]


def classifier(ckpt_path="speedrun94", tta=None, trust=False):
    """The net of a checkpoint as `lit_cifar.load` gives it, with the names of its classes in the attribute `classes`.

    It maps images (B, 3, 32, 32) uint8 0..255 to logits (B, K).

    Args:
        ckpt_path: a checkpoint that lit_cifar.fit wrote, or a net that comes with the package.
        tta: test-time augmentation instead of the run's: 'none', 'mirror' or 'mirror_shift'.
        trust: make the net even if its class is from a package that is not trusted by default.
    """
    net, classes = load(ckpt_path, tta, trust)
    net.classes = classes
    return net
