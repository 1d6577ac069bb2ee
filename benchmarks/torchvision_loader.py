"""Images per second of torchvision's crop, flip, ToTensor and Normalize in a DataLoader with 2 workers, batch 512.

python benchmarks/torchvision_loader.py DATA_DIR [--batches 60]
"""

import argparse
import json
import time
from pathlib import Path

from plain_pytorch import Images
from torch.utils.data import DataLoader
from torchvision import transforms

from lit_cifar.data.source import find_source


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--batches", type=int, default=60)
    args = parser.parse_args()
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ]
    )
    loader = DataLoader(
        Images(find_source(args.data_dir).read(True), transform), batch_size=512, shuffle=True, num_workers=2
    )
    num_images = 0
    for batch, (images, _) in enumerate(loader):
        if batch == 5:  # the workers run, their queues are as full as they get
            started = time.perf_counter()
        elif batch > 5:
            num_images += len(images)
        if batch == args.batches + 5:
            break
    print(json.dumps({"images/s": num_images / (time.perf_counter() - started)}))


if __name__ == "__main__":
    main()
