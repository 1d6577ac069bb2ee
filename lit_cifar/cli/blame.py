"""Whose fault an exception is: the user's, who gets one line, or this package's, which keeps its traceback. checks.py
refuses before a run begins what can be known then.

It depends on where the exception was raised and on what was being done, not on its type. What is raised in others'
code, while a function marked by `errors.calls_chosen` calls it, is about what the user chose. What is raised in this
package, or in torch where this package calls it for itself, is a bug. Files of the user's own, which are no installed
package's, are under development: what fails in them while a net trains keeps its traceback too. Only where memory is
short does the place not matter.
"""

import os
import re
import sysconfig
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.accelerators.accelerator import Accelerator
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import lit_cifar
from lit_cifar.cli.wording import gist
from lit_cifar.errors import is_memory, what_calls
from lit_cifar.model.named import adapt_class_type
from lit_cifar.text import printable

OURS = str(Path(lit_cifar.__file__).parent) + os.sep
INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
WORKER = "Original Traceback"  # within a message: one of a DataLoader's worker
NUM_CHARACTERS = 400  # of a message at most: torch's may be pages long
# what torch and Lightning say, and the way out
WAYS_OUT = {
    r"Expected to have finished reduction|parameters that were not used in producing the loss": (
        "some parameters of the net have no part in a step: add --strategy ddp_find_unused_parameters_true"
    ),
    r"Expected more than 1 value per channel": (
        "BatchNorm needs more than one image in a batch: add --data.drop_last true, or choose another --batch_size"
    ),
    r"labels should be index": "it takes whole batches, and --data.transform gives it single images: leave it out",
    r"does not have a deterministic implementation": "add --trainer.deterministic warn, or leave it out",
    r"Training spike": "go on from the last state with --resume and a smaller --lr, or give it a larger rtol",
    r"zip\(\) argument 2 is shorter": "it does not know groups that a callback adds: use --model.schedule constant",
    r"The parameter 'num_classes' expected value": (
        "these weights are of a net with so many outputs: replace its last layer in a function of your own, or take "
        "timm.create_model with pretrained true, which does so"
    ),
    r"keyword argument 'num_classes'": "name the setting that says how many classes there are, such as n_classes",
    r"trying to locate the file on the Hub|urlopen error": (
        "the weights lie on a server that does not answer: train without them, or fetch them where there is a network"
    ),
    r"pip install|HINT": "install what is missing, or leave it out",
}
PARTS = (
    (Callback, "the callback"),
    (Logger, "the logger"),
    (Profiler, "the profiler"),
    (Precision, "the precision"),
    (CheckpointIO, "the plugin"),
    (ClusterEnvironment, "the environment"),
    (Accelerator, "the accelerator"),
    (Strategy, "the strategy"),
    (LRScheduler, "the scheduler"),
    (nn.Module, "the module"),
)
MAKING = ("to be made of its settings", "when its layers were given their shapes")  # the user's own classes too
# what is meant where no part is found, and what a module is
UNKNOWN = {"to be made of its settings": "something", "on an image": "the transform"}
MODULES = {"on images": "the net", "on an image": "the transform"}


def explain(error: BaseException) -> str | None:
    """One line about an exception that the user can do something about; None for a bug of this package."""
    if is_memory(error):
        return f"there is not enough memory ({_message(error)}): choose a smaller --batch_size or a smaller net"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    num_ours = max((i for i, frame in enumerate(frames, 1) if frame.f_code.co_filename.startswith(OURS)), default=0)
    if not num_ours or num_ours == len(frames):
        return None
    theirs = frames[num_ours:]
    doing = what_calls(frames[num_ours - 1].f_code)
    if doing is None and "strategies" in Path(theirs[0].f_code.co_filename).parts:
        doing = "when processes exchange values"
    if doing is None:
        return None
    message = _message(error)
    way_out = next((way for pattern, way in WAYS_OUT.items() if re.search(pattern, message)), None)
    place = _place(error, num_ours)
    if place and not way_out and doing not in MAKING:
        return None
    classes = re.findall(r"class_path='[^']*?(\w+)'", str(error))  # in the value that jsonargparse reports
    making = [frame.f_locals for frame in frames[:num_ours] if frame.f_code is adapt_class_type.__code__]
    made = [printable(str(variables["value"].get("class_path"))) for variables in making]
    return (
        f"{' or '.join(classes) or _part(theirs, doing, *made[-1:])} failed {doing}{place}: {type(error).__name__}: "
        f"{message}: {way_out or 'fix it or choose another one'}; --log_level debug prints more"
    )


def is_another_process_gone(error: BaseException) -> bool:
    """Whether an exception says that the process at the other end has ended, in a collective call."""
    pattern = r"(closed|reset) by peer|remote process exited"  # gloo's and NCCL's words
    return isinstance(error, RuntimeError) and re.search(pattern, str(error)) is not None


def _message(error: BaseException) -> str:
    text = str(error)
    if WORKER in text:
        text = text.strip().splitlines()[-1]
    text = printable(" ".join(gist(text).split())).rstrip(".")
    return text if len(text) <= NUM_CHARACTERS else f"{text[:NUM_CHARACTERS]}..."


def _part(frames: list[FrameType], doing: str, named: str = "") -> str:
    """Which of the things that the user chose was called: the innermost one, but of nested modules the outermost.

    Args:
        named: what a config says was to be made, if anything was.
    """
    part = named or UNKNOWN.get(doing, "the Trainer")
    for frame in frames:
        found: Any = frame.f_locals.get("self")
        if isinstance(found, LightningModule):
            continue
        if words := next((words for kind, words in PARTS if isinstance(found, kind)), None):
            part = f"{MODULES.get(doing, words) if isinstance(found, nn.Module) else words} {type(found).__name__}"
        if isinstance(found, nn.Module) and type(found) is not nn.Sequential:
            break
    return part


def _place(error: BaseException, num_ours: int) -> str:
    """Where in the user's own files it was raised, which are no installed package's; empty if in none."""
    frames = list(traceback.walk_tb(error.__traceback__))[num_ours:]
    places = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in frames]
    if WORKER in str(error):
        places += re.findall(r'File "(.*?)", line (\d+), in (\S+)', str(error))
    for path, line, function in reversed(places):
        if not path.startswith((*INSTALLED, OURS, "<")) and Path(path).is_file():
            return f" at {printable(path)}:{line} in {function}"
    return ""
