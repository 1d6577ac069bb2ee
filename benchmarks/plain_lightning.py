"""PyTorch's CIFAR-10 tutorial as most people would write it with Lightning, to measure beside lit_cifar: a
LightningModule with self.log, a torchvision DataLoader, the Trainer's defaults. Nothing here is used by the package.

    python benchmarks/plain_lightning.py DATA_DIR [--seed 0] [--max_steps -1]
"""

import time

STARTED = time.perf_counter()

import json  # noqa: E402
import tempfile  # noqa: E402

import lightning as L  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from plain_pytorch import Net, parse_args, read  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy  # noqa: E402


class LitNet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("test/accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)


def main() -> None:
    args = parse_args()
    L.seed_everything(args.seed)

    train, test = read(args.data_dir)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(max_epochs=2, max_steps=args.max_steps, default_root_dir=folder, accelerator="cpu")
        net = LitNet()
        train_started = time.perf_counter()
        trainer.fit(net, DataLoader(train, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True))
        train_seconds = time.perf_counter() - train_started
        [metrics] = trainer.test(net, DataLoader(test, batch_size=4, num_workers=2))
    seconds = {"train": round(train_seconds, 1), "total": round(time.perf_counter() - STARTED, 1)}
    result = {"accuracy": metrics["test/accuracy"], "seed": args.seed, "num_steps": trainer.global_step}
    print(json.dumps({**result, "seconds": seconds, "lightning": L.__version__}))


if __name__ == "__main__":
    main()
