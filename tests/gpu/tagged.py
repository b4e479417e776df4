"""A GPU without one: tensors that report `cuda:0` and compute on the CPU.

Under `GpuPretence`, what is made on or moved to a CUDA device is an `OnGpu`. An operation that
mixes it with host tensors raises, as on a GPU. Each time the host would wait for the device is
counted by kind: a value read back, a copy from memory that is not pinned, a size that depends on
data, a synchronisation. Streams are told apart (`tests.gpu.streams`), and what they do in an order
that nothing guarantees raises. A CUDA graph records the operations, and its replay computes them
again from what its tensors hold by then; a wait or a copy from the host while it records raises.
What the pretence does not show: kernels, autocast (its rules for CUDA are never chosen, so that
tests compute in float32).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.gpu.streams import Order, Reached, Stream, Unordered

CUDA = torch.device("cuda", 0)
# sizes of what they return depend on data, so that the host reads it first
SIZED_BY_DATA = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
    "repeat_interleave",
}
MASKS = (torch.bool, torch.uint8)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class MixedDevices(RuntimeError):
    """An operation was given tensors of the host and of the device."""


_entered: list["GpuPretence"] = []


def entered() -> "GpuPretence":
    """The pretence that is on."""
    assert _entered, "a tensor of a pretended GPU is used outside the pretence"
    return _entered[-1]


class OnGpu(Tensor):
    """A tensor on `cuda:0`; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            requires_grad=held.requires_grad,
        )
        made.held = held.detach()
        entered().order.begin(made)
        return made

    # C++ still takes it for a host tensor: what reads memory directly goes through these.
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def tolist(self) -> Any:
        return entered().read(self).tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self) -> str:
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return entered().compute(func, args, kwargs or {})


class Event:
    """A CUDA event: its time can be read only once the host has waited for it."""

    def __init__(self, **_: Any) -> None:
        self.place, self.reached = -1, dict[Stream, int]()

    def record(self, stream: Stream | None = None) -> None:
        gpu = entered()
        self.place = gpu.num_issued
        self.reached = dict((stream or gpu.order.current()).reached)

    def query(self) -> bool:
        return entered().order.is_done(self.reached)

    def synchronize(self) -> None:
        if not self.query():
            entered().wait("event", self.reached)

    def elapsed_time(self, end: "Event") -> float:
        if self.place < 0 or not (self.query() and end.query()):
            raise RuntimeError("CUDA error: device not ready")
        return 1e-3 * (end.place - self.place)  # a microsecond an operation


class Recorded(NamedTuple):
    """An operation of a graph."""

    name: str
    again: Callable[[], Any]  # its results on the host
    made: list[Tensor]  # where they go; none of what it changes in place, or views

    def describe(self) -> tuple[str, list[tuple[int, ...]]]:
        return self.name, [tuple(tensor.shape) for tensor in self.made]


class CUDAGraph:
    """A CUDA graph."""

    def __init__(self) -> None:
        self.operations: list[Recorded] = []
        self.num_replays = 0
        entered().graphs.append(self)

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        self.num_replays += 1
        entered().issue("replay")
        for operation in self.operations:
            found = operation.again()
            if operation.made:
                for place, new in zip(operation.made, _tensors([found]), strict=True):
                    assert place.shape == new.shape
                    place.copy_(new)


class Recording:
    """`torch.cuda.graph`."""

    def __init__(
        self, graph: CUDAGraph, pool: Any = None, *, stream: Any, capture_error_mode: str
    ) -> None:
        assert capture_error_mode == "thread_local", "other threads may allocate meanwhile"
        self.graph = graph

    def __enter__(self) -> None:
        entered().wait("capture")
        entered().recording = self.graph

    def __exit__(self, *_: object) -> None:
        entered().recording = None
        for operation in self.graph.operations:  # nothing has been computed yet
            for tensor in operation.made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)


class GpuPretence(TorchFunctionMode):
    """While it is entered, there is one GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.num_issued = 0  # operations
        self.order = Order(Event)
        self.graphs: list[CUDAGraph] = []
        self.recording: CUDAGraph | None = None
        # By the address of their storage: kept alive, and the copies of them.
        self._pinned: dict[int, Tensor] = {}
        self._copies: dict[int, Reached] = {}
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        fakes: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "mem_get_info": lambda *_: (60 << 30, 80 << 30),
            "get_per_process_memory_fraction": lambda *_: 1.0,
            "memory_reserved": lambda *_: 0,
            "memory_allocated": lambda *_: 0,
            "_lazy_init": lambda: None,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": Recording,
            "Stream": Stream,
            "stream": self.order.using,
            "current_stream": self.order.current,
            "default_stream": lambda *_: self.order.default,
            "synchronize": lambda *_: self.wait("synchronize"),
        }
        for name, fake in fakes.items():
            self._patches.setattr(torch.cuda, name, fake)
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._overwrite = overwrite
        _entered.append(self)
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        _entered.remove(self)
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrite)
        self._patches.undo()

    @property
    def num_waits(self) -> int:
        return sum(self.waits.values())

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """The pretence in another thread: a mode is that of the thread which entered it."""
        super().__enter__()
        yield
        super().__exit__(None, None, None)

    def wait(self, kind: str, reached: Reached | None = None) -> None:
        """The host waits until that is done, or everything on the thread's own stream."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind}")
        self.waits[kind] += 1
        self.order.wait_for(self.order.current().reached if reached is None else reached)

    def issue(self, name: str, *tensors: OnGpu) -> None:
        """The next operation of the thread's own stream."""
        self.num_issued += 1
        self.order.operate(name, tensors)

    def _made(self, held: Tensor) -> OnGpu:
        made = OnGpu(held)
        self.order.wrote(made)
        return made

    def read(self, tensor: OnGpu) -> Tensor:
        """Its values on the host."""
        self.issue("read", tensor)
        self.wait("read")
        return tensor.held.clone()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        self._check_copies(func, args)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._move(func, args, kwargs)
        if func is Tensor.pin_memory:
            return self._pin(args[0].clone())
        if func is Tensor.is_pinned:
            return args[0].untyped_storage().data_ptr() in self._pinned
        if func is Tensor.new_tensor and isinstance(args[0], OnGpu):
            like, func, args = args[0], torch.tensor, args[1:]
            kwargs = {"dtype": like.dtype, "device": CUDA, **kwargs}
        pinned = kwargs.pop("pin_memory", False)
        wanted = kwargs.get("device")
        if wanted is None or torch.device(wanted).type != "cuda":
            made = func(*args, **kwargs)
            return self._pin(made) if pinned else made
        kwargs["device"] = "cpu"
        made = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            if isinstance(args[0], OnGpu):
                return made
            self.wait("pageable copy")
        if isinstance(made, OnGpu):  # like another tensor on the device
            return made
        self.issue("fill")
        self._record(func.__name__, partial(func, *args, **kwargs), [made])
        return self._made(made)

    def _copied(self, pinned: Tensor) -> None:
        self._copies[pinned.untyped_storage().data_ptr()] = dict(self.order.current().reached)

    def _check_copies(self, func: Any, args: tuple[Any, ...]) -> None:
        """Raise where the host changes pinned memory that is still being copied."""
        name = getattr(func, "__name__", "")
        changes = name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))
        if changes and args and isinstance(args[0], Tensor) and not isinstance(args[0], OnGpu):
            copy = self._copies.get(args[0].untyped_storage().data_ptr())
            if copy and not self.order.is_done(copy):
                raise Unordered(f"{name}: pinned memory is changed before it was copied")

    def _record(self, name: str, again: Callable[[], Any], made: list[Tensor]) -> None:
        if self.recording is not None:
            self.recording.operations.append(Recorded(name, again, made))

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor, *rest = args
        if func is Tensor.cpu:
            rest, kwargs = ["cpu", *rest], kwargs
        elif func is Tensor.cuda:
            rest = [CUDA, *rest[1:]]
        if rest and isinstance(rest[0], Tensor):
            rest = [rest[0].device, rest[0].dtype, *rest[1:]]
        elif "other" in kwargs:
            other = kwargs.pop("other")
            rest = [other.device, other.dtype]
        copy = kwargs.pop("copy", False)
        wanted, dtype, non_blocking, _ = torch._C._nn._parse_to(*rest, **kwargs)
        here = tensor.device.type
        there = wanted.type if wanted is not None else here
        if here == "cuda" and there == "cpu":
            tensor = self.read(tensor)
        elif here == "cpu" and there == "cuda":
            if self.recording is not None:
                raise RuntimeError("a replay would copy what the host's memory holds by then")
            self.issue("copy")
            if non_blocking and self.is_pinned(tensor):
                self._copied(tensor)
            else:
                self.wait("pageable copy")
            tensor = self._made(tensor.detach().clone())
        elif there == "meta":
            return func(*args, **kwargs)
        return Tensor.to(tensor, dtype or tensor.dtype, copy=copy)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that some tensor on the device takes part in."""
        operation = _operation(func)
        if operation.has_parts:
            found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        name = operation.name
        tensors = _tensors([*args, *kwargs.values()])
        self._check(name, args, [tensor for tensor in tensors if not isinstance(tensor, OnGpu)])
        if name == "_local_scalar_dense":
            return self.read(args[0]).item()
        self._wait_for_sizes(name, args)
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        self.issue(name, *on_gpu)

        def again() -> Any:
            held = {key: _mapped(value, _held) for key, value in kwargs.items()}
            return func(*(_mapped(value, _held) for value in args), **held)

        found = again()
        if not func.is_view:
            is_new = operation.num_returned > 0 and operation.changed is None
            self._record(name, again, _tensors([found]) if is_new else [])
        if operation.num_returned == 0:
            return None
        if operation.num_returned > 1:
            return tuple(self._found(part, on_gpu) for part in found)
        if operation.changed is not None:  # in place
            return self._changed(args, kwargs, operation.changed)
        # In inference mode, too, a view of a tensor from outside it is one of that kind.
        inference = torch.is_inference_mode_enabled()
        if inference and func.is_view and not args[0].is_inference():
            inference = False
        with torch.inference_mode(inference):
            return self._found(found, on_gpu)

    def _changed(self, args: tuple[Any, ...], kwargs: Any, place: int) -> Any:
        """What an operation changed and returns."""
        tensor = args[place] if place < len(args) else kwargs["out"]
        if isinstance(tensor, OnGpu):
            self.order.wrote(tensor)
        return tensor

    def _found(self, found: Any, inputs: Sequence[OnGpu]) -> Any:
        """What an operation returns; what is no view of its inputs was written by it."""
        known = {tensor.held.untyped_storage().data_ptr() for tensor in inputs}

        def on_gpu(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            is_view = value.untyped_storage().data_ptr() in known
            return OnGpu(value) if is_view else self._made(value)

        return _mapped(found, on_gpu)

    def _wait_for_sizes(self, name: str, args: tuple[Any, ...]) -> None:
        if name in SIZED_BY_DATA:
            self.wait(name)
        if name in INDEXING and any(index.dtype in MASKS for index in _tensors(args[1])):
            self.wait("boolean index")

    def _check(self, name: str, args: tuple[Any, ...], of_host: Sequence[Tensor]) -> None:
        """Raise where host and device tensors may not meet; count the wait where they may."""
        if of_host and name == "copy_":
            non_blocking = len(args) > 2 and args[2]
            if non_blocking and all(map(self.is_pinned, of_host)):
                for tensor in of_host:
                    self._copied(tensor)
            else:
                self.wait("read" if isinstance(args[1], OnGpu) else "pageable copy")
            return
        of_host = [tensor for tensor in of_host if tensor.dim() > 0]  # others are plain numbers
        if not of_host:
            return
        if name in INDEXING and isinstance(args[0], OnGpu):
            indices = _tensors(args[1])
            if all(any(tensor is index for index in indices) for tensor in of_host):
                self.wait("index on the host")
                return
        shapes = [tuple(tensor.shape) for tensor in of_host]
        raise MixedDevices(f"{name}: tensors on cuda:0 and on the host, of shapes {shapes}")


class _Operation(NamedTuple):
    name: str
    has_parts: bool  # PyTorch runs it as several others
    num_returned: int
    changed: int | None  # the place of the argument that it changes and returns


@cache
def _operation(func: Any) -> _Operation:
    schema = func._schema
    name = schema.name.split("::")[-1]
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    written = [
        place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    changed = written[0] if written and len(schema.returns) == 1 else None
    return _Operation(
        name, composite and name not in ("linear", "matmul"), len(schema.returns), changed
    )


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, change) for part in value)
    return change(value)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value
