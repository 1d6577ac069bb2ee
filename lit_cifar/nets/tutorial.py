"""The net of PyTorch's CIFAR-10 tutorial. LitClassifier scales and normalises its input.

Source: https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and three linear layers: 62,006 parameters for ten classes.

    Args:
        num_classes: number of classes K, the length of each row of logits.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes  # checkpoints read arguments from attributes of their names
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images (B, 3, 32, 32) to logits (B, K)."""
        features = self.pool(F.relu(self.conv1(images)))
        features = self.pool(F.relu(self.conv2(features)))
        features = features.flatten(1)
        features = F.relu(self.fc1(features))
        features = F.relu(self.fc2(features))
        logits: Tensor = self.fc3(features)
        return logits
