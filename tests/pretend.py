"""A pretended accelerator: CPU tensors that say they are on `cuda:0` or `mps:0`, with real numbers in them.

Python sees `.device`, `.is_cuda` and `.is_mps` as the accelerator would give them; torch's C++ side sees `meta`, so
that autograd and the dispatcher work without a driver. Every operator runs on the CPU, after it was checked:

- tensors of two devices in one operator: RuntimeError, as on the accelerator;
- on mps a float64 tensor: TypeError, with Apple's words; an operator without an MPS kernel, by torch's own list of
  them, is noted, and so are those that got theirs after torch 2.8;
- what makes the host wait for the device, or the device for the host, is noted with the line of the project it came
  from: `.item()`, `.cpu()`, copies to the device, nonzero and boolean masks, bincount, ...

Random numbers come from a generator of the device's own. Autocast (C++ picks that by the real device), streams, graphs,
NCCL, and the kernels' own arithmetic are not emulated; a `_foreach_` call counts as one operator.
"""

import contextlib
import functools
import platform
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch  # noqa: F401 (before anything is patched)
import torch
import torchgen
import yaml
from lightning.fabric.accelerators import cuda as fabric_cuda
from lightning.fabric.accelerators.mps import MPSAccelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


def _names(text: str) -> set[str]:
    return set(text.split())


# operators after which the host knows something of the device, for which it waits
WAITS = _names(
    "_local_scalar_dense item is_nonzero equal nonzero masked_select bincount _unique2 unique_dim unique_consecutive "
    "repeat_interleave _linalg_eigh _linalg_svd _linalg_check_errors"
)
# those that take tensors of two devices, and those that launch nothing
MIXED = _names("copy_ index index_put_ _index_put_impl_ set_ _has_compatible_shallow_copy_type")
VIEWS = _names(
    "view reshape expand slice select unbind split split_with_sizes squeeze unsqueeze permute transpose t alias detach "
    "as_strided unfold diagonal _unsafe_view _reshape_alias"
)
# those that have an MPS kernel in torch 2.14 and had none in 2.8, by the lists of the two (native_functions.yaml)
SINCE_2_9 = _names(
    "_cdist_backward _embedding_bag _linalg_eigh _linalg_svd _logcumsumexp _standard_gamma _to_sparse _unique "
    "_upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward avg_pool3d avg_pool3d_backward binomial cauchy_ "
    "cholesky_inverse gcd geometric_ geqrf grid_sampler_2d_backward grid_sampler_3d igamma index_reduce kthvalue lcm "
    "linalg_householder_product linalg_lstsq linalg_lu linalg_lu_solve linalg_matrix_exp linalg_qr log_normal_ vdot "
    "max_pool3d_with_indices max_unpool2d max_unpool3d native_dropout native_group_norm_backward nonzero_static "
    "poisson unique_dim"
)
HAVE_MPS = _names("MPS CompositeExplicitAutograd CompositeImplicitAutograd CompositeExplicitAutogradNonFunctional")
MPS_FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)
STATE_BYTES = {"cuda": 16, "mps": 44}  # of a generator's state, of which the first 16 are its seed and its offset


class Pretended(Tensor):
    """A tensor of the pretended device; `elem` holds its numbers on the CPU."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> "Pretended":
        place = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "layout": elem.layout}
        self = Tensor._make_wrapper_subclass(cls, elem.size(), dtype=elem.dtype, device="meta", **place)
        self.elem = elem
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: Device.current.device)
    is_cuda = property(lambda self: self.device.type == "cuda")
    is_mps = property(lambda self: self.device.type == "mps")
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.elem!r}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        Device.current.note("d2h", "pickle")
        return self.elem.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = Pretended(self.elem.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.current.dispatch(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """The pretended device, of kind 'cuda' or 'mps'; within it, a context, tensors can be there.

    Args:
        kind: 'cuda' or 'mps'.
        before_2_9: with the rules of torch 2.8, on mps.
    """

    current: "Device"

    def __init__(self, kind: str, before_2_9: bool = False) -> None:
        super().__init__()
        self.kind, self.device, self.before_2_9 = kind, torch.device(kind, 0), before_2_9
        self.waits: list[tuple[str, str, str]] = []  # kind, operator, where
        self.launches: Counter[str] = Counter()  # by operator
        self.without_mps: Counter[str] = Counter()  # operators that have no MPS kernel, and where they were called
        self.seed = self.offset = 0

    def __enter__(self) -> "Device":
        Device.current = self
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) asks for the copy where a mode sees it
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        super().__exit__(*error)

    def note(self, kind: str, name: str) -> None:
        self.waits.append((kind, name, _where()))

    # ---- the device's random state ----

    def manual_seed(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def get_rng_state(self, device: Any = None) -> Tensor:
        state = torch.zeros(STATE_BYTES[self.kind], dtype=torch.uint8)
        state.view(torch.int64 if self.kind == "cuda" else torch.int32)[:1] = self.seed % 2**31
        state[8:16].view(torch.int64)[:] = self.offset
        return state

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        assert len(state) == STATE_BYTES[self.kind], "RNG state is wrong size"
        self.seed, self.offset = int(state[:4].view(torch.int32)), int(state[8:16].clone().view(torch.int64))

    def _generator(self) -> torch.Generator:
        self.offset += 4
        return torch.Generator().manual_seed(self.seed * 2**20 + self.offset)

    # ---- operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("pin_memory", "_pin_memory"):  # the driver would be asked
            pinned = args[0].clone()
            pinned.is_pretended_pinned = True
            return pinned
        tensors: list[Tensor] = []
        tree_map(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, (args, kwargs))
        is_ours = any(isinstance(tensor, Pretended) for tensor in tensors)
        target = kwargs.get("device")
        to_us = target is not None and torch.device(target).type == self.kind
        to_us = to_us or (name == "scalar_tensor" and target.type == "meta")  # C++ makes one of a number beside ours
        if not is_ours and not to_us:
            return func(*args, **kwargs)
        if name == "to":  # in inference mode it comes whole
            with self:
                return func.decompose(*args, **kwargs)
        if name == "_to_copy":
            return self._copy(args[0], kwargs, to_us)
        self._check(func, name, args, tensors)
        if to_us:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}
        draws = any(argument.name == "generator" for argument in func._schema.arguments)
        if draws and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self._generator()}
        result = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        if name == "_local_scalar_dense":
            return result
        returns = func._schema.returns
        if len(returns) == 1 and _is_written(returns[0]):  # in place: the tensor that was given
            given = zip(func._schema.arguments, args, strict=False)
            return next((value for argument, value in given if _is_written(argument)), kwargs.get("out"))
        return tree_map(self._wrapped, result)

    def _copy(self, tensor: Tensor, kwargs: dict[str, Any], to_us: bool) -> Tensor:
        is_ours = isinstance(tensor, Pretended)
        stays = is_ours and (to_us or kwargs.get("device") is None)
        if is_ours and to_us and kwargs.get("dtype") in (None, tensor.dtype):
            return self._wrapped(tensor.elem)  # it is there: C++ does not know, and asked for a copy
        if stays:
            self.launches["_to_copy"] += 1
        elif is_ours:
            asynchronous = kwargs.get("non_blocking") and self.kind == "cuda"  # torch pins what it copies to
            self.note("d2h async" if asynchronous else "d2h", "_to_copy")
        else:
            asynchronous = kwargs.get("non_blocking") and hasattr(tensor, "is_pretended_pinned")
            self.note("h2d async" if asynchronous else "h2d" if tensor.dim() else "h2d scalar", "_to_copy")
        rest = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
        result = torch.ops.aten._to_copy.default(_unwrapped(tensor), **rest)
        return self._wrapped(result) if stays or to_us else result

    def _check(self, func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Refuses what the device would refuse, notes what it waits for, and counts."""
        theirs = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
        mixed = [tensor for tensor in theirs if tensor.dim() and len(theirs) < len(tensors)]
        if mixed and name not in MIXED:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{self.device} and cpu: {tuple(mixed[0].shape)} in {name} at {_where()}"
            )
        if name == "copy_" and theirs:
            to_us = isinstance(args[0], Pretended)
            self.note(("h2d" if args[1].dim() else "h2d scalar") if to_us else "d2h", name)
        if name in ("index", "index_put_", "_index_put_impl_"):
            for index in (index for index in args[1] if isinstance(index, Tensor)):
                if index.dtype in (torch.bool, torch.uint8):
                    self.note("wait: boolean mask", name)
                elif not isinstance(index, Pretended):
                    self.note("h2d", name)
        if name in WAITS:
            self.note("wait", name)
        if name not in VIEWS:
            self.launches[name] += 1
        if self.kind == "mps":
            if self.before_2_9 and name in ("index_add", "index_add_") and args[3].dtype == torch.int64:
                raise RuntimeError("index_add(): Expected non int64 dtype for source.")
            operator = f"{name}.{func._overloadname}".removesuffix(".default")
            if (self.before_2_9 and name in SINCE_2_9) or not _has_mps_kernel(operator):
                self.without_mps[f"{operator} at {_where()}"] += 1

    def _wrapped(self, result: Any) -> Any:
        if not isinstance(result, Tensor) or isinstance(result, Pretended):
            return result
        if self.kind == "mps" and result.dtype in (torch.float64, torch.complex128):
            raise TypeError(MPS_FLOAT64)
        with torch.inference_mode(False):  # a wrapper has no numbers; detach() of it must work in inference too
            return Pretended(result)


def _unwrapped(value: Any) -> Any:
    return value.elem if isinstance(value, Pretended) else value


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _where() -> str:
    """The innermost line of the project, and below it that of whoever it called."""
    inner = ""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.name == "pretend.py" or "torch" in path.parts:
            continue
        if "lit_cifar" in path.parts:
            return f"lit_cifar/{path.name}:{frame.lineno}" + (f" ({inner})" if inner else "")
        inner = inner or f"{path.parent.name}/{path.name}:{frame.lineno}"
    return inner


@functools.cache
def _operators() -> dict[str, Any]:
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    entries = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].split("(")[0]: entry for entry in entries}


@functools.cache
def _has_mps_kernel(operator: str) -> bool:
    """Whether an operator, such as 'index_add.out', runs on mps, by torch's list; True for others than aten's own."""
    entry = _operators().get(operator, {})
    if "structured_delegate" in entry:
        return _has_mps_kernel(entry["structured_delegate"])
    keys = {key.strip() for keys in entry.get("dispatch") or () for key in keys.split(",")}
    return not keys or bool(keys & HAVE_MPS)


@contextlib.contextmanager
def pretended(kind: str, before_2_9: bool = False) -> Iterator[Device]:
    """The whole machine has one accelerator of this kind: Lightning finds it, tensors can be moved to it."""
    device = Device(kind, before_2_9)
    with contextlib.ExitStack() as stack:

        def patch(target: Any, **names: Any) -> None:
            for name, value in names.items():
                stack.enter_context(mock.patch.object(target, name, value))

        MPSAccelerator.is_available.cache_clear()  # Lightning asks once and keeps the answer
        stack.callback(MPSAccelerator.is_available.cache_clear)
        patch(torch.backends.mps, is_available=lambda: kind == "mps", is_macos_or_newer=lambda major, minor: True)
        state: dict[str, Callable[..., Any]] = {
            "get_rng_state": device.get_rng_state,
            "set_rng_state": device.set_rng_state,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
        }
        if kind == "cuda":
            patch(torch.cuda, **state, **_cuda(device))
            patch(fabric_cuda, num_cuda_devices=lambda: 1, is_cuda_available=lambda: True)
        else:
            patch(torch.mps, **state, manual_seed=device.manual_seed)
            patch(platform, processor=lambda: "arm")  # by which Lightning knows Apple Silicon
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        yield stack.enter_context(device)


def _cuda(device: Device) -> dict[str, Callable[..., Any]]:
    """What torch.cuda says of an H100."""
    properties = SimpleNamespace(name="Pretended H100", major=9, minor=0, total_memory=80 * 2**30)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_lazy_init": lambda: None,
        "manual_seed_all": device.manual_seed,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 0,
        "memory_stats": lambda device=None: {},
    }
