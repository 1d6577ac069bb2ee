"""A pretended accelerator: CPU tensors that say they are on `cuda:0` or `mps:0`, with real numbers in them.

Python sees `.device`, `.is_cuda` and `.is_mps` as the accelerator would give them; torch's C++ side sees `meta`, so
that autograd and the dispatcher work without a driver. Every operator runs on the CPU, after it was checked:

- tensors of two devices in one operator: RuntimeError, as on the accelerator;
- on mps a float64 tensor: TypeError, with Apple's words; an operator that native_functions.yaml gives no MPS kernel:
  NotImplementedError;
- what makes the host wait for the device, or the device for the host, is noted with the line of the project it came
  from: `.item()`, `.cpu()`, copies to the device, nonzero and boolean masks, bincount, ...

It does not emulate autocast (C++ picks that by the real device), streams, graphs or NCCL.
"""

import contextlib
import functools
import platform
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch  # noqa: F401 (before anything is patched)
import torch
import yaml
from lightning.fabric.accelerators.mps import MPSAccelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
WAITS = {  # operators after which the host knows something of the device: CUDA and MPS synchronise in them
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave", "aten::is_nonzero",
    "aten::_linalg_eigh", "aten::_linalg_svd", "aten::_linalg_check_errors", "aten::_assert_async_never",
}  # fmt: skip
MAY_MIX = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::set_"}
MPS_FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)
VIEWS = (
    "view reshape expand slice select unbind split squeeze unsqueeze permute transpose alias detach as_strided unfold"
)
FREE = {
    f"aten::{name}" for name in (*VIEWS.split(), "t", "_unsafe_view", "split_with_sizes", "_reshape_alias", "diagonal")
}


class Pretended(torch.Tensor):
    """A tensor of the pretended device; `elem` holds its numbers on the CPU."""

    elem: torch.Tensor
    pretended: torch.device

    @staticmethod
    def __new__(cls, elem, device):
        self = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device="meta", requires_grad=False,
        )  # fmt: skip
        self.elem, self.pretended = elem, device
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.pretended)
    is_cuda = property(lambda self: self.pretended.type == "cuda")
    is_mps = property(lambda self: self.pretended.type == "mps")
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self):
        return self.pretended.index or 0

    def __repr__(self, *, tensor_contents=None):
        return f"Pretended({self.elem!r}, device={self.pretended})"

    def __reduce_ex__(self, protocol):
        Device.current.note("d2h", "pickle")
        return self.elem.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = Pretended(self.elem.detach().clone(), self.pretended).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Device.current.dispatch(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Where the pretended device is; use it as a context."""

    current: "Device"

    def __init__(self, kind, project="lit_cifar", float64=None, before_2_9=False, mps_kernels=None):
        super().__init__()
        self.kind, self.device = kind, torch.device(kind, 0)
        self.project = project
        self.allows_float64 = kind != "mps" if float64 is None else float64
        self.before_2_9 = before_2_9
        self.mps_kernels = mps_kernels
        self.waits: list[tuple[str, str, str]] = []  # (kind, operator, where)
        self.launches: Counter = Counter()
        self.without_mps: Counter = Counter()
        self.refused: list[str] = []
        self.lenient = False  # True: note what mps refuses, and go on
        self.paused = False

    def __enter__(self):
        Device.current = self
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) asks for the copy where a mode sees it
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        return super().__exit__(*error)

    def where(self):
        """The innermost line of the project, and below it that of whoever it called."""
        ours, inner = "", ""
        for frame in reversed(traceback.extract_stack()[:-3]):
            if "/torch/" in frame.filename or frame.filename.endswith("pretend.py"):
                continue
            path = Path(frame.filename)
            if f"/{self.project}/" in frame.filename:
                ours = f"{self.project}/{path.name}:{frame.lineno}"
                break
            inner = inner or "/".join(path.parts[-2:]) + f":{frame.lineno}"
        return f"{ours} ({inner})" if ours and inner else ours or inner

    def note(self, kind, name):
        if not self.paused:
            self.waits.append((kind, name, self.where()))

    def reset(self):
        self.waits, self.launches = [], Counter()

    def is_ours(self, device):
        return device is not None and torch.device(device).type == self.kind

    def refuse(self, error):
        if not self.lenient:
            raise error
        self.refused.append(f"{type(error).__name__}: {error} at {self.where()}")

    def wrap(self, result):
        if isinstance(result, torch.Tensor) and not isinstance(result, Pretended):
            if result.dtype in (torch.float64, torch.complex128) and not self.allows_float64:
                self.refuse(TypeError(MPS_FLOAT64))
            with torch.inference_mode(False):  # a wrapper has no numbers; detach() of it must work in inference too
                return Pretended(result, self.device)
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func, args, kwargs):
        name = func._schema.name
        if name in ("aten::pin_memory", "aten::_pin_memory"):  # a driver would be asked
            pinned = args[0].clone()
            pinned.is_pretended_pinned = True
            return pinned
        ours, others = [], []

        def sort(value):
            if isinstance(value, Pretended):
                ours.append(value)
            elif isinstance(value, torch.Tensor):
                others.append(value)
            return value

        tree_map(sort, (args, kwargs))
        target = kwargs.get("device")
        if not ours and not self.is_ours(target):
            return func(*args, **kwargs)

        def unwrap(value):
            return value.elem if isinstance(value, Pretended) else value

        if name == "aten::to":  # in inference mode it comes whole
            with self:
                return func.decompose(*args, **kwargs)
        if name == "aten::_to_copy":
            return self.copy(args[0], kwargs, unwrap)
        if name == "aten::copy_":
            if not ours or not isinstance(args[0], Pretended):
                self.note("d2h", name)
            elif others:
                self.note("h2d" if args[1].dim() else "h2d scalar", name)
        if ours and others and name not in MAY_MIX:
            mixed = [other for other in others if other.dim()]
            if mixed:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but got cpu {tuple(mixed[0].shape)} beside "
                    f"{self.device} in {name} at {self.where()}"
                )
        if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and ours:
            for index in args[1]:
                if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.note("wait: boolean mask", name)
                elif isinstance(index, torch.Tensor) and not isinstance(index, Pretended):
                    self.note("h2d", name)
        elif name in WAITS:
            self.note("wait", name)
        if self.kind == "mps":
            self.check_mps(func, name, args)
        if name not in FREE:
            self.launches[name] += 1
        if self.is_ours(target):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if name == "aten::_local_scalar_dense":
            return result
        written = [
            given
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        returns = func._schema.returns
        if written and len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            return written[0]
        if kwargs.get("out") is not None:
            return kwargs["out"]
        return tree_map(self.wrap, result)

    def copy(self, tensor, kwargs, unwrap):
        target = kwargs.get("device")
        rest = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
        to_ours = self.is_ours(target) or (target is None and isinstance(tensor, Pretended))
        if isinstance(tensor, Pretended) and not to_ours:
            self.note("d2h", "aten::_to_copy")
        elif not isinstance(tensor, Pretended) and to_ours:
            asynchronous = kwargs.get("non_blocking") and hasattr(tensor, "is_pretended_pinned")
            self.note("h2d async" if asynchronous else "h2d" if tensor.dim() else "h2d scalar", "aten::_to_copy")
        elif self.is_ours(target) and kwargs.get("dtype", tensor.dtype) in (None, tensor.dtype):
            return self.wrap(tensor.elem)  # it is there: C++ does not know, and asked for a copy
        else:
            self.launches["aten::_to_copy"] += 1
        result = aten._to_copy.default(unwrap(tensor), **rest)
        return self.wrap(result) if to_ours else result

    def check_mps(self, func, name, args):
        if self.before_2_9 and name in ("aten::index_add", "aten::index_add_") and args[3].dtype == torch.int64:
            self.refuse(RuntimeError("index_add(): Expected non int64 dtype for source."))  # until torch 2.9
        if self.mps_kernels is not None:
            overload = f"{name[6:]}.{func._overloadname}".removesuffix(".default")
            if not self.mps_kernels(overload):
                self.without_mps[f"{overload} at {self.where()}"] += 1


@functools.cache
def mps_kernels(folder=None):
    """Whether an operator runs on MPS, by native_functions.yaml: `kernels('index_add.out')`."""
    import torchgen

    root = Path(folder or torchgen.__file__).parent if folder is None else Path(folder)
    text = (root / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = {}
    for entry in yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        entries[entry["func"].split("(")[0]] = entry

    def has(overload):
        entry = entries.get(overload)
        if entry is None:
            return True  # not one of aten's own: nothing known
        if "structured_delegate" in entry:
            return has(entry["structured_delegate"])
        dispatch = entry.get("dispatch")
        if dispatch is None:
            return True  # CompositeImplicit
        if entry.get("autogen") and entry["func"].split("(")[0] not in entries:
            return True
        keys = {part.strip() for key in dispatch for part in key.split(",")}
        return bool(keys & {"MPS", "CompositeExplicitAutograd", "CompositeImplicitAutograd",
                            "CompositeExplicitAutogradNonFunctional"})  # fmt: skip

    return has


@contextlib.contextmanager
def pretended(kind, **settings):
    """The whole machine has one accelerator of this kind: Lightning finds it, tensors can be moved to it."""
    with contextlib.ExitStack() as stack:
        MPSAccelerator.is_available.cache_clear()  # Lightning asks once and keeps the answer
        stack.callback(MPSAccelerator.is_available.cache_clear)

        def patch(target, **names):
            for name, value in names.items():
                stack.enter_context(mock.patch.object(target, name, value))

        if kind == "cuda":
            properties = SimpleNamespace(name="Pretended H100", major=9, minor=0, total_memory=80 * 2**30)
            patch(torch.cuda, is_available=lambda: True, device_count=lambda: 1, _lazy_init=lambda: None,
                  set_device=lambda device: None, current_device=lambda: 0, empty_cache=lambda: None,
                  get_device_capability=lambda device=None: (9, 0), get_device_name=lambda device=None: "Pretended",
                  get_device_properties=lambda device=None: properties, manual_seed_all=lambda seed: None,
                  synchronize=lambda device=None: None, reset_peak_memory_stats=lambda device=None: None,
                  memory_stats=lambda device=None: {})  # fmt: skip
            patch(torch.backends.mps, is_available=lambda: False)
            from lightning.fabric.accelerators import cuda as fabric_cuda

            patch(fabric_cuda, num_cuda_devices=lambda: 1, is_cuda_available=lambda: True)
        else:
            patch(torch.backends.mps, is_available=lambda: True)
            patch(platform, processor=lambda: "arm")  # by which Lightning knows Apple Silicon
            if hasattr(torch, "mps"):
                patch(torch.mps, manual_seed=lambda seed: None, synchronize=lambda: None, empty_cache=lambda: None)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        yield stack.enter_context(Device(kind, **settings))
