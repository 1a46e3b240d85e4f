"""What the operating system says about this process, and how many threads it may use."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from kbit.backends.select import MAX_THREADS, set_threads
from kbit.host.errors import UsageError
from kbit.host.process import peak_rss_bytes, share_one_heap


def test_peak_follows_what_is_used_and_never_falls() -> None:
    before = peak_rss_bytes()
    if before is None:
        pytest.skip("this system does not tell")
    block = bytearray(b"x" * (300 << 20))
    peak = peak_rss_bytes()
    assert peak is not None
    assert peak >= len(block)
    del block
    after = peak_rss_bytes()
    assert after is not None
    # The kernel counts a process's pages on every processor apart, and adds them up now and then.
    assert after >= peak - (1 << 20)
    assert peak >= before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own figure is used")
def test_a_program_does_not_inherit_the_size_of_what_started_it() -> None:
    block = bytearray(b"x" * (300 << 20))  # this process is large while the child starts
    code = "from kbit.host.process import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # A bare interpreter takes about 10 MB.
    assert 1 << 20 < int(done.stdout) < len(block) // 3


# Eight threads take 16 MB each in turn, in blocks that are not mapped by themselves, and give them back.
_TAKERS = """
import ctypes, re, sys, threading
if sys.argv[1] == "one":
    from kbit.host.process import share_one_heap
    assert share_one_heap()
ctypes.CDLL(None).mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD, which glibc raises by itself once something large was freed
turn = threading.Barrier(8)
def take(number):
    for each in range(8):
        turn.wait()
        if each == number:
            blocks = [b"x" * (40_000 + each) for _ in range(400)]
            del blocks
    turn.wait()
    if number == 0:
        print(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
    turn.wait()
threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_threads_that_share_a_heap_take_over_what_others_gave_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if platform.libc_ver()[0] != "glibc":
        assert not share_one_heap()
        pytest.skip("this system's malloc is not glibc's")
    kept = {}
    for heaps in ("one", "many"):
        done = subprocess.run([sys.executable, "-c", _TAKERS, heaps], capture_output=True, text=True, check=True)
        kept[heaps] = int(done.stdout) * 1024
    assert kept["many"] - kept["one"] > 3 * 16_000_000


_PINNED = """
import re
from kbit.host.process import give_back_free_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
blocks = [b"x" * (40_000 + each) for each in range(400)]
last = b"y" * 40_000
del blocks
before = resident()
assert give_back_free_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_free_memory_below_what_is_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _PINNED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 14_000_000


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_somebody_set_for_the_heap_holds(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "4" if name == "MALLOC_ARENA_MAX" else "glibc.malloc.arena_max=4")
    assert not share_one_heap()


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            set_threads(threads)
            assert torch.get_num_threads() == threads
        set_threads(None)
        assert torch.get_num_threads() == 2
        for threads in (0, -1, MAX_THREADS + 1, 1 << 31):
            with pytest.raises(UsageError, match=f"--threads {threads}: expected at least 1 and at most 1024"):
                set_threads(threads)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
