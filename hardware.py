"""What this machine is, and what suits it: device, dtype, attention, compiler, micro-batch."""

import contextlib
import ctypes
import gc
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

from common import UserError, check_disk

PACKAGES = ("torch", "numpy", "tiktoken", "gigatoken", "pyarrow")  # their versions change results


def find_device(name, say):
    """auto -> this rank's GPU, else MPS, else CPU."""
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "mps" if mps else "cpu"
        if name == "cpu" and not torch.version.cuda and shutil.which("nvidia-smi"):
            say("an NVIDIA driver is here, but this torch is for CPUs: see pytorch.org")
    if not {"cuda": gpus, "mps": mps, "cpu": True}.get(name):
        raise UserError(f"device={name} is not available here; try --device=auto")
    rank = int(os.environ.get("LOCAL_RANK", 0))  # 0 on each of them with --virtual-local-rank
    if name == "cuda" and rank >= gpus:
        raise UserError(f"rank {rank} finds no GPU of its own here; try --nproc_per_node={gpus}")
    return torch.device(name, rank if name == "cuda" else None)


def find_dtype(name, device, say):
    """auto -> bfloat16 where the hardware multiplies in it, float16 on older CUDA, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16
        say(f"compute capability {major}.{minor}, no bfloat16: float16 and loss scaling")
        return torch.float16
    if device.type == "cpu":
        for native in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):  # private
            if getattr(torch.cpu, native, lambda: False)():
                return torch.bfloat16
    say(f"{device.type} without native bfloat16: float32")
    return torch.float32


def product_dtype(x):
    """What x is multiplied in: autocast's dtype, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def prepare_memory(device):
    """Keep what a CPU run frees: it is fast to take again. Refuse a GPU what would be swapped."""
    if device.type == "mps":
        torch.mps.set_per_process_memory_fraction(1.0)  # not 1.7, which swaps
    elif device.type == "cuda" and sys.platform == "win32":  # whose driver swaps, too
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(0.95 * free / total, device)
    elif device.type == "cpu" and sys.platform == "linux":
        # glibc's malloc keeps what is freed: new pages take 4 to 16% of a step
        with contextlib.suppress(AttributeError):  # other C libraries have no mallopt
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped, hence unmapped, by itself
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def compile_obstacle(device):
    """Why torch.compile cannot work here, or nothing."""
    cuda = device.type == "cuda"
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)  # as inductor has it
    header = Path(sysconfig.get_path("include"), "Python.h")
    obstacles = {
        "it is not ready for MPS": device.type == "mps",
        "needs capability 7.0": cuda and torch.cuda.get_device_capability(device) < (7, 0),
        "the triton package is missing": cuda and not importlib.util.find_spec("triton"),
        f"there is no C++ compiler {compiler}": not shutil.which(compiler),
        "no Python.h; install this Python's development package": not header.exists(),
    }
    return next((why for why, there in obstacles.items() if there), "")


PEAK_FLOPS = {  # dense bf16, fp32 accumulation; the first whose words are in the GPU's name
    "GB200": 2.5e15, "B200": 2.25e15, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12,
    "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A6000": 154.8e12,
    "A10G": 70e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device, dtype):
    """FLOP/s the device could reach in bf16; 0 where unknown: a wrong MFU is worse than none."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return 0.0
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    if words & {"Laptop", "Max", "Ti", "D", "MIG"}:  # another speed than the card of that number
        return 0.0
    return next((peak for part, peak in PEAK_FLOPS.items() if words.issuperset(part.split())), 0.0)


def lacks_memory(error):
    """Whether a RuntimeError says that a device's memory is full."""
    told = str(error)  # by MPS, the compiler, cuBLAS and the driver in errors of their own
    words = ("out of memory", "ALLOC_FAILED", "Invalid buffer size", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in told for word in words)


@contextlib.contextmanager
def telling_memory(who, remedy):
    """Turn a device's lack of memory into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise UserError(f"{who} is out of memory: {remedy}") from None


def forget_memory(runtime):
    """Give cached memory back, and count its peak from here on."""
    gc.collect()  # a compilation that failed is held by cycles
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif runtime.device.type == "mps":
        torch.mps.empty_cache()


SPARE = 1 / 64  # of a GPU's memory: NCCL and kernels take some beside torch, fragments are lost


def spare_memory(device):
    """Bytes to leave free when a micro-batch is fitted."""
    return int(SPARE * torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 0


def fit_micro_batch(model, B, runtime, resumed=False):
    """B, halved until a forward and backward pass of B sequences fits on every rank."""
    if runtime.device.type == "cpu":
        return B  # nothing could be caught

    # copies of the weights that a step adds: AdamW's moments, unless resumed, and log_norms' own
    copies = (0 if resumed else 2) + model.cfg.log_norms

    def one_pass(B):
        idx = torch.zeros(B, model.cfg.block_size + 1, dtype=torch.long, device=runtime.device)
        with runtime.autocast():
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()

    def fits(B):
        try:
            one_pass(B)
            state = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
            one_pass(B)  # now with gradients and copies in memory, as every later step
            del state
            return True
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            return False

    remedy = "its weights alone are too much: take a smaller model"
    with telling_memory(f"rank {runtime.rank}", remedy):
        held = [torch.empty_like(p) for p in model.parameters() if runtime.world > 1]  # DDP's
        spare = spare_memory(runtime.device)
        held.append(torch.empty(spare, dtype=torch.int8, device=runtime.device))
    while True:
        fitted = fits(B)
        model.zero_grad(set_to_none=True)
        forget_memory(runtime)  # before ranks meet, which takes NCCL some
        if runtime.all(fitted):
            break
        if B == 1:
            remedy = "try --gradient_checkpointing=True, or lower block_size or n_layer"
            raise UserError(f"not even one sequence fits in memory: {remedy}")
        B //= 2
    del held
    forget_memory(runtime)
    runtime.print(f"micro_batch_size={B}: it fits, divides a step, and is at most 64")
    return B


def versions():
    """{package: its version} of those that are installed."""
    found = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    found["torch"] = str(torch.__version__)  # says which CUDA it is for, too
    with contextlib.suppress(RuntimeError):  # LD_LIBRARY_PATH may have one that does not fit
        found |= {"cudnn": torch.backends.cudnn.version()} if torch.version.cuda else {}
    return found


def refuse_wrong(cfg, runtime):
    """Raise a UserError for what a device is known to compute wrongly."""
    if runtime.device.type == "mps" and cfg.gradient_checkpointing and cfg.dropout:
        wrong = "gradient_checkpointing=True recomputes with another dropout on MPS"
        raise UserError(f"{wrong} (torch 2.13): set --dropout=0")
    if cfg.attention == "cudnn" and cfg.dropout:
        raise UserError("attention=cudnn rounds dropout to sixteenths: set --attention=flash")


def choose_attention(cfg, runtime):
    """Let cfg's kernel compute attention, or for `auto` the fastest."""
    most = 256 if cfg.compile_model else 128
    short = runtime.device.type == "cpu" and cfg.block_size <= most
    if cfg.attention == "auto" and short and runtime.dtype == torch.bfloat16:
        allow_attention("math")  # up to twice as fast there, backward above all
    else:
        allow_attention(cfg.attention)
        if cfg.dropout:  # which cuDNN rounds to sixteenths; from torch 2.12 on it is not taken then
            torch.backends.cuda.enable_cudnn_sdp(False)


def allow_attention(name):
    """Allow scaled_dot_product_attention one kernel (auto: all), and math where that cannot run."""
    kernels = {"flash": "flash", "cudnn": "cudnn", "efficient": "mem_efficient"}
    for kernel, its in kernels.items():
        getattr(torch.backends.cuda, f"enable_{its}_sdp")(name in ("auto", kernel))


@contextlib.contextmanager
def without_cudnn_attention():
    """For shapes that vary, if another is on: cuDNN plans for 0.03 to 0.4 s at each new one."""
    cuda = torch.backends.cuda
    was = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(was and not cuda.flash_sdp_enabled())
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(was)


def attention_kernel(cfg, runtime):
    """The name of the kernel that training takes, such as `flash attention`."""
    choose = getattr(torch, "_fused_sdp_choice", None)  # private, in 2.11 to 2.13
    if not choose or runtime.device.type == "mps":  # which has no such function
        return f"attention={cfg.attention}"
    shape = (1, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
    q = torch.zeros(shape, dtype=runtime.dtype, device=runtime.device)
    kernel = torch.nn.attention.SDPBackend(choose(q, q, q, None, cfg.dropout, True)).name
    return f"{kernel.removesuffix('_ATTENTION').lower()} attention"


def checkpoint_bytes(model):
    """What a checkpoint of a model takes: its weights, and AdamW's two moments of each."""
    return 3 * sum(p.nbytes for p in model.parameters())


def describe(model, folder, runtime):
    """Say what else decides how a run goes: versions, and room on the disk."""
    cfg, found = model.cfg, [f"{package} {number}" for package, number in versions().items()]
    runtime.print(f"with   Python {platform.python_version()}, {', '.join(found)}")
    size = checkpoint_bytes(model) * (cfg.keep_checkpoints + 1)
    check_disk(folder, size)
    runtime.print(f"disk   has room for {size / 2**30:.1f} GiB of checkpoints\nready to train")
