"""PyTorch's CIFAR-10 tutorial as a plain script, to measure beside lit_cifar. Nothing here is used by the package.

    python benchmarks/plain_pytorch.py DATA_DIR [--seed 0] [--max_steps -1]

Its net, transforms, DataLoader (batch 4, 2 workers), loss, optimiser, two epochs and test are the tutorial's. Only the
images come from lit_cifar's reader, so that both see the same data. As in torchvision's CIFAR10, they lie in memory as
arrays and become PIL images one by one.
"""

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn, optim  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision import transforms  # noqa: E402

from lit_cifar.data.source import find_source  # noqa: E402
from lit_cifar.data.split import Split  # noqa: E402


class Images(Dataset):
    def __init__(self, split: Split, transform: transforms.Compose) -> None:
        self.images = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def parse_args() -> argparse.Namespace:
    """The arguments of this script and of plain_lightning.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=-1)
    return parser.parse_args()


def read(data_dir: Path) -> tuple[Images, Images]:
    """Training and test images with the tutorial's transforms."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])
    source = find_source(data_dir)
    return Images(source.read(True), transform), Images(source.read(False), transform)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)

    train, test = read(args.data_dir)
    train_loader = DataLoader(train, batch_size=4, shuffle=True, num_workers=2)
    test_loader = DataLoader(test, batch_size=4, shuffle=False, num_workers=2)

    net = Net()
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(net.parameters(), lr=0.001, momentum=0.9)

    train_started = time.perf_counter()
    num_steps = 0
    for epoch in range(2):
        running_loss = 0.0
        for i, (inputs, labels) in enumerate(train_loader, 0):
            optimizer.zero_grad()
            loss = criterion(net(inputs), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            if i % 2000 == 1999:
                print(f"[{epoch + 1}, {i + 1:5d}] loss: {running_loss / 2000:.3f}", flush=True)
                running_loss = 0.0
            num_steps += 1
            if num_steps == args.max_steps:
                break
        if num_steps == args.max_steps:
            break
    train_seconds = time.perf_counter() - train_started

    correct = total = 0
    with torch.no_grad():
        for inputs, labels in test_loader:
            predicted = net(inputs).argmax(1)
            total += labels.size(0)
            correct += (predicted == labels).sum().item()
    seconds = {"train": round(train_seconds, 1), "total": round(time.perf_counter() - STARTED, 1)}
    result = {"accuracy": correct / total, "seed": args.seed, "num_steps": num_steps}
    print(json.dumps({**result, "seconds": seconds, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
