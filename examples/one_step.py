"""A training step in plain PyTorch, from the package's parts: no Lightning, no command line, no download.

python examples/one_step.py
"""

import torch
import torch.nn.functional as F

from lit_cifar.data.loader import DeviceLoader, TrainBatches
from lit_cifar.data.shapes import draw_shapes
from lit_cifar.model.classifier import normalise
from lit_cifar.nets import Net

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
train = draw_shapes(train=True)  # images (10000, 3, 32, 32) uint8 0..255, labels (10000,) int64
batches = TrainBatches(num_images=len(train.labels), batch_size=50)  # which images make each batch
loader = DeviceLoader(train, batches, device)
net = Net(num_classes=len(train.classes)).to(device)
optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
mean = std = torch.full((3, 1, 1), 0.5, device=device)

for step, (images, labels) in enumerate(loader, start=1):  # one epoch
    logits = net(normalise(images, mean, std))  # (50, 10)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3} of {len(loader)}  loss {loss.item():.3f}")
