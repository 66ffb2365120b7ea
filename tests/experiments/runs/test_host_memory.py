"""Freed memory stays with the process: the kernel's count of page faults tells."""

import platform
import subprocess
import sys

import pytest

# Threads allocate, as those of XLA do. 64 MB are 15,625 pages of 4 KiB.
PROGRAM = """
import resource, sys, threading
from experiments.runs.host_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=lambda: b"x" * 64_000_000)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
print(*[faults() for _ in range(4)][1:])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
@pytest.mark.parametrize("what", ["keep", "plain"])
def test_memory_that_was_freed_costs_no_page_faults(what):
    run = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True)
    counts = [int(word) for word in run.stdout.split()]
    assert len(counts) == 3
    assert all(count < 200 for count in counts) if what == "keep" else all(count > 10_000 for count in counts)
