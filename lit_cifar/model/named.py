"""What a dotted name of a config means, and which arguments may follow it: more than jsonargparse itself would take,
for nets are functions without annotations, partials, and callables with **kwargs. classifier.py and the command line
both read configs with it."""

import functools
import inspect
import re
import traceback
from typing import Any

from jsonargparse import Namespace
from jsonargparse import _typehints as typehints
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._util import resolved_import_paths
from torch import nn

from lit_cifar.errors import UserError, calls_chosen

# what nets call the number of their classes; the first is set by itself
NUM_CLASSES = ("num_classes", "n_classes", "num_labels", "num_class", "n_class", "classes", "n_labels", "num_outputs")

_typehints: Any = typehints  # whose functions are jsonargparse's own, and replaced below
_import, _adapt = _typehints.import_object, _typehints.adapt_class_type


@functools.cache
def _returning_net(made: Any, name: str) -> Any:
    """A callable without a return type as a function with one, for jsonargparse asks for it, and of the same name."""

    @calls_chosen("to be made of its settings")
    def make(*args: Any, **settings: Any) -> Any:
        return made(*args, **settings)

    make.__signature__ = inspect.signature(made).replace(return_annotation=nn.Module)  # type: ignore[attr-defined]
    resolved_import_paths.add(make, name)
    return make


def import_named(name: str, *args: Any, **settings: Any) -> Any:
    """What a dotted name means to jsonargparse; what makes something, and does not say what, makes a net.

    Raises:
        ImportError, AttributeError, ValueError: there is nothing of this name.
    """
    try:
        found = _import(name, *args, **settings)
    except (ImportError, AttributeError, ValueError) as error:
        if getattr(error, "name", None) == "timm":
            raise ImportError("timm is not installed: pip install 'lit_cifar[timm]'") from error
        raise
    except Exception as error:  # of the module, as it is imported
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" at {last.filename}:{last.lineno}"
        raise ImportError(f"{type(error).__name__}{place}: {error}") from error
    if inspect.isclass(found) or isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        returned = inspect.signature(found).return_annotation
    except ValueError:  # of builtins
        return found
    is_typed = inspect.isfunction(found) and returned not in (inspect.Signature.empty, Any)
    return found if is_typed else _returning_net(found, name)


def parameters(named: Any) -> dict[str, Any]:
    """The parameters of a class or function by name, with those it hands on by **kwargs where its source tells, and
    their defaults."""
    return {parameter.name: parameter.default for parameter in get_signature_parameters(named, None)}


def takes_anything(named: Any) -> bool:
    """Whether it has **kwargs of which its source does not tell what may be in them."""
    own = inspect.signature(named).parameters
    has_rest = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values())
    return has_rest and parameters(named).keys() <= own.keys()


def way_to_classes(net: nn.Module, settings: dict[str, Any], num_classes: int) -> str:
    """What to do for a net to give so many logits.

    Args:
        net: which gives others.
        settings: of a config, with the class_path that the net was made by; empty if it was made elsewhere.
        num_classes: as many as the data has.
    """
    named = import_named(settings["class_path"]) if settings else type(net)
    known = parameters(named)
    name = next((name for name in NUM_CLASSES if name in known), NUM_CLASSES[0] if takes_anything(named) else None)
    if name:
        return f"set --model.net.{name} {num_classes}"
    return "give it a parameter num_classes, or change its last layer in a function that you name as the net"


@calls_chosen("to be made of its settings")
def adapt_class_type(
    value: Any, serialize: bool, instantiate: bool, parser_settings: dict[str, Any], *args: Any, **settings: Any
) -> Any:
    """Jsonargparse's, which takes what goes through **kwargs under the key dict_kwargs only, keeps that for another
    class that is named later, and needs types unless its caller does without them (4.53)."""
    value, before = map(_typehints.subclass_spec_as_namespace, (value, settings.get("prev_val")))
    if before and before.get("class_path") != value.class_path:
        before.pop("dict_kwargs", None)
    if re.fullmatch(r"(torch\.optim\.lr_scheduler\.)?(SequentialLR|ChainedScheduler)", value.class_path):
        raise UserError(
            "it takes schedulers that are made already: name a function of your own that makes it, "
            "(optimizer: Optimizer) -> LRScheduler, such as --model.scheduler my_file.my_scheduler"
        )
    given = value.get("init_args")
    if isinstance(given, Namespace) and not (serialize or instantiate):
        named = import_named(value.class_path)
        for key, text in vars(given).items():
            if isinstance(text, str):  # as torchvision writes it: the class, then the member
                given[key] = re.sub(r"^(\w+\.)*\w+_Weights\.(?=\w+$)", "", text)
        unknown = vars(given).keys() - parameters(named)
        if unknown and takes_anything(named):
            handed_on = {key: given.pop(key) for key in list(vars(given)) if key in unknown}
            value["dict_kwargs"] = {**(value.get("dict_kwargs") or {}), **handed_on}
    return _adapt(value, serialize, instantiate, {**parser_settings, "fail_untyped": False}, *args, **settings)


# jsonargparse's own places for these (4.53)
_typehints.import_object, _typehints.adapt_class_type = import_named, adapt_class_type
