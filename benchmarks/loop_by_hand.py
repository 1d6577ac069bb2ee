"""The tutorial's step with everything on, beside a loop written by hand on the same images in memory with the same
kernels and nothing around them: no Trainer, callbacks, checks, logger or states.

    python benchmarks/loop_by_hand.py DATA_DIR [--num_steps 2500] [--runs 5]

The last line is JSON: microseconds of CPU time a step, in turn in one process on one thread, and their ratios. CPU time
counts the threads that write events too, and leaves out what else the machine does. Each run trains anew, and leaves
the steps before the 500th out.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import cross_entropy

from lit_cifar import bench
from lit_cifar.data.datamodule import CIFAR10DataModule
from lit_cifar.data.loader import CHUNK
from lit_cifar.model.kernels import to_logits
from lit_cifar.nets import Net

WARM_UP_STEPS = 500
BATCH_SIZE = 4


def ours(data_dir: str, num_steps: int) -> float:
    """Microseconds a step, as `python -m lit_cifar.fit` takes them."""
    times = []

    def note(trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step in (WARM_UP_STEPS, num_steps):
            times.append(time.process_time())

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        flags = ["--config", "tutorial", "--data_dir", data_dir, "--accelerator", "cpu"]
        bench.take_steps([*flags, "--trainer.default_root_dir", folder], num_steps, False, note)
    return 1e6 * (times[1] - times[0]) / (num_steps - WARM_UP_STEPS)


def by_hand(data: Any, num_steps: int) -> float:
    """Microseconds a step of the loop by hand; images are taken from memory as many at a time as ours are."""
    images, labels = data.images, data.labels
    net, mean, std = Net(), torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9, fused=True)
    parameters = list(net.parameters())
    num_taken, begun = 0, 0.0
    while True:
        for chunk in torch.randperm(len(labels)).split(CHUNK):
            for batch in zip(images[chunk].split(BATCH_SIZE), labels[chunk].split(BATCH_SIZE), strict=True):
                if num_taken == WARM_UP_STEPS:
                    begun = time.process_time()
                if num_taken == num_steps:
                    return 1e6 * (time.process_time() - begun) / (num_steps - WARM_UP_STEPS)
                loss = cross_entropy(to_logits(net, batch[0], mean, std), batch[1])
                for parameter in parameters:  # what zero_grad does, sooner
                    parameter.grad = None
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                num_taken += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--num_steps", type=int, default=2500)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    data = CIFAR10DataModule(args.data_dir)
    data.prepare_data()
    data.setup("fit")
    steps = [(ours(args.data_dir, args.num_steps), by_hand(data.train, args.num_steps)) for _ in range(args.runs)]
    ratios = [one / other for one, other in steps]
    names = {"ours, us": [one for one, _ in steps], "by hand, us": [other for _, other in steps], "ratio": ratios}
    print(json.dumps({name: {"median": statistics.median(values), "values": values} for name, values in names.items()}))


if __name__ == "__main__":
    main()
