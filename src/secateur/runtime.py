"""Threads, devices, dtypes and versions of this process."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import shlex
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "BFLOAT16_PEAKS",
    "configure_threads",
    "core_count",
    "environment",
    "has_accelerator",
    "install_command",
    "pick_batch",
    "pick_device",
    "pick_dtype",
    "quiet_libraries",
    "without_main",
]

#: dense bfloat16 peaks from the data sheets: part of a device's name -> FLOPs a second
BFLOAT16_PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}


def configure_threads(threads: int) -> None:
    """Set thread counts for processes that start later, or for this one before it imports torch.

    Idle OpenMP threads must not spin, or they take the cores from each other. A fixed count also fixes the order of
    sums, and thereby the exact bits of results.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"})


def quiet_libraries() -> None:
    """Keep the progress bars and notices of libraries off the terminal, without importing them."""
    os.environ.update({"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    for name in ("torchao", "torch.utils._pytree"):  # kernels for other devices, reported when transformers is imported
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # which reads the variables only when it is imported
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


def pick_device(name: str) -> str:
    """Resolve ``auto`` to CUDA if available; each of several processes gets its own device.

    Raises:
        UserError: if the device is unknown or not available.
    """
    import torch

    from secateur import distributed
    from secateur.errors import UserError
    from secateur.formatting import plural

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"`device`: {name!r} is unknown; use auto, cpu, cuda, cuda:1 ... or mps")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"`device`: {name} is not available, torch sees no CUDA device; use cpu")
    if distributed.world_size() == 1 or name == "cpu":
        return name
    if name != "cuda":
        raise UserError(f"`device`: {name} cannot be used by several processes; use cpu, or cuda for one device each")
    number, devices = distributed.local_rank()[0], torch.cuda.device_count()
    if number >= devices:
        raise UserError(
            f"`device`: this machine has {plural(devices, 'CUDA device')}; start torchrun with --nproc-per-node "
            f"{devices}, or use cpu"
        )
    torch.cuda.set_device(number)  # where nccl computes
    return f"cuda:{number}"


def pick_dtype(name: str, device: str) -> torch.dtype:
    """Resolve ``auto``: bfloat16 on a GPU, float32 elsewhere."""
    import torch

    if name == "auto":
        name = "bfloat16" if device.startswith("cuda") else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def pick_batch(seqlen: int, device: str) -> int:
    """Default number of windows in a batch: just enough to keep the device busy.

    On a CPU larger batches are slower: the states between two operations no longer fit in a cache.
    """
    return max(1, (2**14 if device.startswith("cuda") else 2**9) // seqlen)


def environment() -> dict[str, str]:
    """Versions, machine type and system; no names of hosts or users."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions, "machine": platform.machine(), "system": sys.platform}


def has_accelerator() -> bool:
    """Whether a GPU's driver is there: CUDA's, that of WSL or ROCm's. Torch is not imported, which takes a second."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def install_command(*arguments: str) -> str:
    """The command that installs a package, or an extra such as ``secateur[tasks]``, where this process runs.

    An extra is resolved from the installed metadata, so that it is the same for a clone and for a wheel.
    """
    pip = [sys.executable, "-m", "pip", "install"]
    if find_spec("pip") is None:  # as in the environments that uv makes
        pip = ["uv", "pip", "install", "-p", sys.executable]
    return shlex.join([*pip, *arguments])


def core_count() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_main_lock = threading.Lock()


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Start processes that do not run the caller's script again: it may have no ``__main__`` guard.

    ``multiprocessing`` finds the script by these attributes; what the processes run is imported from secateur.
    """
    with _main_lock:
        main = sys.modules["__main__"]
        attributes = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
        vars(main).update(dict.fromkeys(attributes))
        try:
            yield
        finally:
            vars(main).update(attributes)
