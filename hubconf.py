"""What torch.hub finds here: a trained net out of a checkpoint. How it is made is lit_cifar.classifier's."""

from lit_cifar import load

dependencies = ["torch", "torchvision", "lightning", "torchmetrics", "tensorboard", "jsonargparse"]


def classifier(ckpt_path, tta=None, trust=False):
    """The net of a checkpoint as `lit_cifar.load` gives it, its classes' names in the attribute `classes`.

    It maps images (B, 3, 32, 32) uint8 0..255 to logits (B, K).

    Args:
        ckpt_path: a checkpoint that lit_cifar.fit wrote.
        tta: test-time augmentation in place of the run's: 'none', 'mirror' or 'mirror_shift'.
        trust: make the net also where its class is of a package that is not trusted by itself.
    """
    net, classes = load(ckpt_path, tta, trust)
    net.classes = classes
    return net
