"""The allocator's setting, in a process of its own: it stays for good."""

import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, torch
from app.training.allocator import keep_freed_memory
assert keep_freed_memory()
def faults():
    for _ in range(20):
        kept = [torch.ones(8 * 2**20 // 4) for _ in range(4)]  # 8 MiB each
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first, second = faults(), faults()
print(second - first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_was_freed_is_used_again_without_a_page_fault() -> None:
    result = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1000  # as glibc comes, 8,192 pages for each of the 20 rounds


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.training import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
