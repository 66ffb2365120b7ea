"""Lets the MKL inside PyTorch use its fastest kernels on any processor that has the instructions.

MKL asks whether the processor is Intel's, and takes AVX2 kernels where it is not: on an AMD Zen 5 its products then run
at less than half of their speed. Beside such a peer a ratio means little, so every PyTorch side answers yes. The answer
changes which kernels run in this process, nothing else.
"""

import ctypes
import mmap
import os
import platform
from pathlib import Path

_RETURN_TRUE = b"\xb8\x01\x00\x00\x00\xc3"  # x86-64: mov eax, 1; ret
_QUESTIONS = ("mkl_serv_intel_cpu_true", "mkl_serv_intel_cpu")
_READ_WRITE_EXECUTE = 7


def use_all_cores() -> None:
    """Gives PyTorch a thread for each core, and MKL its fastest kernels; to be called before the first product."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    use_fast_kernels()


def use_fast_kernels() -> bool:
    """Answers MKL's question with yes; returns whether this build of PyTorch asks it."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if platform.machine() != "x86_64" or not library.exists():
        return False
    functions = [getattr(ctypes.CDLL(str(library)), name, None) for name in _QUESTIONS]
    for function in filter(None, functions):
        _overwrite(ctypes.cast(function, ctypes.c_void_p).value or 0, _RETURN_TRUE)
    return any(functions)


def _overwrite(address: int, code: bytes) -> None:
    page = address - address % mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), address - page + len(code), _READ_WRITE_EXECUTE) != 0:
        raise OSError(ctypes.get_errno(), "the pages of MKL cannot be made writable")
    ctypes.memmove(address, code, len(code))
