"""What the operating system says about this process, and how many threads it may use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kbit.backends.select import MAX_THREADS, set_threads
from kbit.host.errors import UsageError
from kbit.host.process import peak_rss_bytes


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
