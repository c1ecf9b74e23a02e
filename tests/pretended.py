"""A GPU that is not there: what would mix the tensors of two devices ends in an error.

The GPU's tensors are a CPU's that claim to be on cuda:0. As on a GPU, an operator takes none of the
CPU's beside them but single numbers, only pinned memory is copied while the program goes on, and
what a graph has captured is computed again from the same tensors. Autocast is the CPU's.
"""

import contextlib
import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, CROSSING = torch.device("cuda", 0), ("copy_", "_to_copy", "index")
real_to = torch.Tensor.to


class OnGPU(torch.Tensor):
    """Wraps `held`, the numbers; autograd sees the wrapper."""

    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        how = dict(dtype=held.dtype, device=held.device, requires_grad=requires_grad)
        how |= dict(strides=held.stride(), storage_offset=held.storage_offset())
        new = torch.Tensor._make_wrapper_subclass(cls, held.size(), **how)
        new.held = held
        return new

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        others = [x for x in given if not isinstance(x, cls) and x.dim() > 0]
        if others and operator.overloadpacket.__name__ not in CROSSING:
            raise RuntimeError(f"{operator} got tensors of two devices")
        args, kwargs = tree_map_only(cls, lambda x: x.held, (args, kwargs or {}))
        made = operator(*args, **kwargs)
        known = {id(x.held): x for x in given if isinstance(x, cls)}  # of an operator in place
        return tree_map_only(
            torch.Tensor, lambda x: known[id(x)] if id(x) in known else cls(x), made
        )


def is_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


def to(x, *args, device=None, dtype=None, non_blocking=False, **how):
    """Tensor.to, which may cross over."""
    for given in args:
        if isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, str | torch.device):
            device = given
    x = real_to(x, dtype) if dtype else x
    if device is None or is_gpu(device) == isinstance(x, OnGPU):
        return x
    if not is_gpu(device):
        return x.held.clone()
    assert not non_blocking or x.is_pinned(), "this memory may be gone before it is copied"
    return OnGPU(x.detach().clone(), x.requires_grad)


def pin_memory(x):
    pinned = x.clone()
    pinned.is_pinned = lambda: True
    return pinned


def module_to(module, *args, **how):
    """Module.to, which leaves tied weights tied."""
    moved = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, x in held.items():
                if x is not None and id(x) not in moved:
                    y = to(x.detach(), *args, **how)
                    kept = torch.nn.Parameter(y, x.requires_grad) if held is part._parameters else y
                    moved[id(x)] = kept
                held[name] = moved.get(id(x))
    return module


def making(function):
    """A function of torch's that makes tensors, with device=cuda, too."""

    @functools.wraps(function)
    def make(*args, device=None, **how):
        if not is_gpu(device):
            return function(*args, device=device, **how)
        return OnGPU(function(*tree_map_only(OnGPU, lambda x: x.held, args), **how))

    return make


class Capture(TorchDispatchMode):
    """torch.cuda.graph: the operators within, for graph.replay."""

    def __init__(self, graph):
        super().__init__()
        graph.captured = []
        self.captured = graph.captured

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert "local_scalar" not in operator.name(), "a graph may not wait for the host"
        made = operator(*args, **(kwargs or {}))
        if OnGPU in types:
            self.captured.append((operator, args, kwargs or {}, made))
        return made


class Graph:
    def replay(self):
        for operator, args, kwargs, made in self.captured:
            again = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, OnGPU) and old.held.data_ptr() != new.held.data_ptr():
                    old.held.copy_(new.held)


class Stream:
    def wait_stream(self, other):
        pass


class Generator:
    def __new__(cls, device="cpu", real=torch.Generator):
        return real()


class Autocast(torch.autocast):
    def __init__(self, device_type, *args, **how):
        super().__init__("cpu", *args, **how)


def pretend():
    """Let this process's torch have one GPU, an H100 by its name."""
    for name in ("arange", "empty", "full", "ones", "tensor", "zeros"):
        setattr(torch, name, making(getattr(torch, name)))
    torch.Tensor.to, torch.Tensor.pin_memory = to, pin_memory
    torch.Tensor.cpu = lambda x: to(x, "cpu")
    tolist = torch.Tensor.tolist
    torch.Tensor.tolist = lambda x: tolist(to(x, "cpu"))
    torch.nn.Module.to = module_to
    save = torch.save
    torch.save = lambda x, file: save(tree_map_only(OnGPU, lambda y: y.held.detach(), x), file)
    torch.Generator = Generator
    torch.autocast, enabled, dtype = Autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.is_autocast_enabled = lambda _: enabled("cpu")
    torch.get_autocast_dtype = lambda _: dtype("cpu")
    cuda, memory = torch.cuda, 80 * 2**30
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: 0
    cuda.get_device_capability, cuda.get_device_name = lambda *_: (9, 0), lambda *_: "H100"
    cuda.mem_get_info = lambda *_: (memory, memory)
    cuda.max_memory_allocated = cuda.memory_allocated = lambda *_: 2**30
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_: None)
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = cuda.current_stream = Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.graph, cuda.CUDAGraph = Capture, Graph
