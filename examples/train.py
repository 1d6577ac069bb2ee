"""Trains, validates and tests with a plain Lightning Trainer: no command line, no download.

python examples/train.py
"""

from lightning.pytorch import Trainer, seed_everything

from lit_cifar import CIFAR10DataModule, LitClassifier
from lit_cifar.nets import Net

seed_everything(0)
data = CIFAR10DataModule(dataset="shapes", batch_size=50, num_val=1000)  # dataset="cifar10" downloads CIFAR-10
model = LitClassifier(Net(num_classes=10), lr=0.02)
trainer = Trainer(max_epochs=2)
trainer.fit(model, datamodule=data)
trainer.test(model, datamodule=data)

print(f"accuracy {trainer.callback_metrics['test/accuracy']:.4f}")
for name, accuracy in model.reports["test"].per_class_accuracy.items():
    print(f"  {name:<10} {accuracy:.4f}")
