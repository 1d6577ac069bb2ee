"""SavedModule: what a checkpoint says of a LitClassifier beside its weights, and how one is made of it. run/save.py
knows when states are saved; classifier.py has `load`, which needs no LitClassifier."""

import functools
import importlib
import inspect
import io
import itertools
import json
import sys
from dataclasses import is_dataclass
from typing import Any, Self

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_cifar import log
from lit_cifar.errors import UserError
from lit_cifar.model.check import shape_lazy_layers, unchanged
from lit_cifar.model.chosen import class_of
from lit_cifar.model.classifier import check_classes, check_weights, load
from lit_cifar.model.optimised import OptimisedModule
from lit_cifar.run.read import read_checkpoint
from lit_cifar.run.trust import check_trusted
from lit_cifar.text import printable

MAKERS = ("optimizer", "scheduler")


def plain(value: Any) -> Any:
    """A setting as checkpoints and YAML hold it, which JSON could too: numbers, texts, lists and dicts; None for what
    is none of these."""
    try:
        return json.loads(json.dumps(value, default=lambda inner: vars(inner) if is_dataclass(inner) else inner.item()))
    except (AttributeError, RuntimeError, TypeError, ValueError):  # other objects, tensors, references to itself
        return None


def maker_settings(make: Any) -> dict[str, Any] | None:
    """A class of torch's, or a partial of one, of an optimiser or scheduler as class_path and init_args; None for what
    the file cannot tell: other callables, other classes, arguments that are no plain values."""
    kind, arguments = class_of(make), plain(getattr(make, "keywords", {}))
    told = {"class_path": kind and _path_of(kind)}
    if kind is None or arguments is None or not _is_trusted(told):
        return None
    parameters = inspect.signature(kind).parameters.values()  # as commands, which leave the rate to the model's
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty and each.name != "lr"}
    return {**told, "init_args": {**plain(defaults), **arguments}}


def made_again(make: Any) -> Any:
    """The partial that `maker_settings` describes, or what it is given.

    Raises:
        UserError: it names a class that is not torch's.
    """
    if not _names_class(make):
        return make
    check_trusted(make)
    module, _, name = make["class_path"].rpartition(".")
    return functools.partial(getattr(importlib.import_module(module), name), **make.get("init_args") or {})


def _is_trusted(settings: Any) -> bool:
    try:
        check_trusted(settings)
    except UserError:
        return False
    return _names_class(settings)


def _path_of(kind: type) -> str | None:
    """Where others can import a class, at the shortest; None where they cannot."""
    if kind.__module__ == "__main__":
        return None
    packages = itertools.accumulate(kind.__module__.split("."), "{}.{}".format)
    places = (name for name in packages if getattr(sys.modules.get(name), kind.__qualname__, None) is kind)
    place = next(places, None)
    return place and f"{place}.{kind.__qualname__}"


def net_settings(net: nn.Module) -> dict[str, Any] | None:
    """A net as class_path and init_args, the values of attributes that are called as its arguments are.

    None where the net that is made of them, with the same weights, is another one: where its logits for random images
    differ in a bit, in training or in evaluation.
    """
    kind = type(net)
    path = _path_of(kind)
    if path is None:
        return None
    try:
        found = {name: plain(getattr(net, name, None)) for name in inspect.signature(kind).parameters}
        arguments = {name: value for name, value in found.items() if value is not None}
        with isolate_rng():
            other = kind(**arguments)
            shape_lazy_layers(other)
            other.load_state_dict(net.state_dict())
            same = all(map(torch.equal, _sample(net), _sample(other)))
    except Exception:  # classes raise anything on arguments that are not for them
        return None
    return {"class_path": path, "init_args": arguments} if same else None


@torch.no_grad()
def _sample(net: nn.Module) -> list[Tensor]:
    weight = next(weight for weight in net.parameters() if weight.is_floating_point())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(weight)
    with unchanged(net, weight.device):
        torch.manual_seed(0)  # of dropout
        return [net.train(mode)(images) for mode in (True, False)]


class SavedModule(OptimisedModule):
    """A module whose checkpoints say which net it has and with which settings, as plain values."""

    net: nn.Module
    classes: tuple[str, ...]

    _described: tuple[nn.Module, dict[str, Any] | None] | None = None

    def describe(self, given: dict[str, Any], is_whole: bool) -> None:
        """Makes plain values of LitClassifier's arguments; hyperparameters too, unless a subclass saves what its own
        __init__ takes."""
        settings = plain({key: value for key, value in given.items() if key not in ("net", *MAKERS)})
        settings |= {key: maker_settings(given[key]) for key in MAKERS}
        # of this module, or of the whole command; travels in the checkpoint
        self.config: dict[str, Any] = {"model": settings}
        self.recipe: str | None = None  # what people call this training run; travels in the checkpoint
        if is_whole:
            self.save_hyperparameters({**settings, "net": type(self.net).__name__})

    def describe_net(self) -> dict[str, Any] | None:
        """`net_settings` of the net, found out once: in training it may be wrapped or in parts."""
        if self._described is None or self._described[0] is not self.net:
            self._described = (self.net, net_settings(self.net))
        return self._described[1]

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, *args: Any, net: nn.Module | None = None, trust: bool = False, **kwargs: Any
    ) -> Self:
        """Lightning's, for checkpoints that do not hold the net itself: the file says how it is made.

        Args:
            checkpoint_path: the file.
            args: as of LightningModule.load_from_checkpoint; so are kwargs.
            net: instead of the file's, which then need not be known.
            trust: make the net also where its class is of a package that is not trusted by itself, such as your own.

        Raises:
            UserError: the file does not say which net it holds, or names a class that is not trusted.
        """
        takes = inspect.signature(cls.__init__).parameters
        if net is None:
            state = read_checkpoint(checkpoint_path)
            if "net" in takes or "net" in state.get("hyper_parameters", {}):
                net = load(checkpoint_path, trust=trust)[0].net.train()
            if state.is_net:  # Lightning reads no other files than its own
                torch.save(dict(state), checkpoint_path := io.BytesIO())
                checkpoint_path.seek(0)
            theirs: dict[str, Any] = state.config.get("model", {})
            settings = {key: value for key, value in theirs.items() if not _names_class(value)}
            settings |= {key: theirs[key] for key in MAKERS if _is_trusted(theirs.get(key))}
            if settings.keys() <= takes.keys():  # as they were last; a subclass's own arguments Lightning knows
                kwargs = {**settings, **kwargs}
                lost = [key for key in state["lit_cifar"].get("makers", ()) if kwargs.get(key) is None]
                if lost:
                    own = " and ".join(f"an own {key}" for key in lost)
                    log.warn(f"the checkpoint does not hold {own}, which it was trained with: give it again")
                if "scheduler" in lost:
                    kwargs |= {"scheduler_interval": None, "scheduler_monitor": None}
        if net is not None:
            kwargs["net"] = net
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def share_loggers(self) -> None:
        """Leaves hyperparameters to the command, which has all settings; keeps those apart that a data module has under
        the same names, since Lightning raises where they differ."""
        if "trainer" in self.config:
            self._log_hyperparams = False
        initial, data = self.hparams_initial, getattr(self.trainer, "datamodule", None)
        if shared := initial.keys() & getattr(data, "hparams_initial", {}).keys():
            self._hparams_initial = {f"model/{key}" if key in shared else key: initial[key] for key in initial}

    def note_settings(self) -> bool:
        """Brings `config` up to date with the numbers that are trained with, which callbacks such as LearningRateFinder
        and BatchSizeFinder change in the module and the data module; gives whether one had changed."""
        changed = False
        self.note_optimizer(self.config.get("model", {}))
        for section, owner in (("model", self), ("data", getattr(self._trainer, "datamodule", None))):
            noted = self.config.get(section, {})
            for key, value in noted.items():
                now = getattr(owner, key, value)
                if isinstance(value, (int, float)) and isinstance(now, (int, float)) and now != value:
                    noted[key], changed = type(value)(now), True
        return changed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.note_settings()
        config = self.config
        if "trainer" not in config and (net := self.describe_net()):  # a command's config has the net
            config = {**config, "model": {**config["model"], "net": net}}
        hyper_parameters = checkpoint.get("hyper_parameters", {})
        if isinstance(hyper_parameters.get("net"), nn.Module):  # of a subclass; weights_only refuses it
            hyper_parameters["net"] = type(self.net).__name__
        ours = {"classes": list(self.classes), "config": config, "recipe": self.recipe, "makers": self._chosen()}
        checkpoint["lit_cifar"] = ours

    def _chosen(self) -> dict[str, str]:
        """Names of the optimiser and the scheduler that the user chose in the place of ours."""
        made = {key: getattr(self, f"_{key}") for key in MAKERS}
        return {key: getattr(class_of(make) or make, "__name__", "") for key, make in made.items() if make is not None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.check_fits(checkpoint)
        if self.has_own_optimizer and getattr(getattr(self._trainer, "state", None), "fn", None) == "fit":
            self._check_optimizer(checkpoint)
        named = tuple(checkpoint.get("lit_cifar", {}).get("classes", ()))
        if named and not _are_named(self.classes):
            self.set_classes(named)

    def _check_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError where a checkpoint's optimiser or scheduler is of another kind, or has other groups."""
        theirs, ours = checkpoint.get("lit_cifar", {}).get("makers"), self._chosen()
        states = checkpoint.get("optimizer_states") or []
        before, now = "", ""
        if isinstance(theirs, dict) and theirs != ours:
            before, now = _listed(theirs), _listed(ours)
        elif states and (self.groups or not self._optimizer):
            groups = [str(group.get("name", "net")) for group in states[0]["param_groups"]]
            wanted = [group["name"] for group in self.settings()]
            if groups[: len(wanted)] != wanted:  # callbacks may add more
                before, now = (f"the parameter groups {', '.join(map(printable, names))}" for names in (groups, wanted))
        if before != now:
            raise UserError(
                f"the checkpoint was trained with {before}, and this module has {now}: give LitClassifier the same to "
                "go on"
            )

    def set_classes(self, classes: tuple[str, ...]) -> None:
        """Names the K classes."""
        raise NotImplementedError  # abstract: LitClassifier's, which makes a tally of so many classes for each stage

    def check_fits(self, checkpoint: dict[str, Any], classes: tuple[str, ...] = ()) -> None:
        """Checks that a checkpoint has this net's weights, and the data's classes: `classes`, or those of set_classes.

        Raises:
            UserError: the weights are another net's, or the classes are others.
        """
        if self.strict_loading:
            check_weights(self, self.net, checkpoint["state_dict"])
        classes = classes or self.classes
        theirs = tuple(checkpoint.get("lit_cifar", {}).get("classes", ()))
        if len(theirs) != len(classes) or (_are_named(theirs) and _are_named(classes)):
            check_classes(checkpoint, classes)


def _listed(makers: dict[str, Any]) -> str:
    return " and ".join(f"the {key} {printable(str(name))}" for key, name in makers.items()) or "SGD or Muon of its own"


def _names_class(value: Any) -> bool:
    """Whether a setting is something that is made, such as a net."""
    is_named = isinstance(value, dict) and isinstance(value.get("class_path"), str)
    return is_named and isinstance(value.get("init_args") or {}, dict)


def _are_named(classes: tuple[str, ...]) -> bool:
    """Whether somebody named them; data that name none have numbers."""
    return classes != tuple(map(str, range(len(classes))))
