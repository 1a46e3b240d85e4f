"""What the operating system says about this process, and how it takes memory."""

from __future__ import annotations

import ctypes
import os
import sys

_M_ARENA_MAX = -8  # malloc.h of glibc


def peak_rss_bytes() -> int | None:
    """Largest resident set this process has had, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return _windows_peak()
    if sys.platform == "linux" and (peak := _linux_peak()) is not None:
        return peak
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes, Linux and the BSDs KiB


def share_one_heap() -> bool:
    """Has all threads of this process allocate from one heap; to be called before there are any.

    glibc gives every thread a heap of its own, and what was freed stays where it was taken: a server whose requests are
    read by many threads would keep the largest request of each. MALLOC_ARENA_MAX, or tunables that name it, hold where
    somebody set them.

    Returns:
        Whether anything was set: not where malloc is not glibc's.
    """
    said = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in said:
        return False
    library = _glibc()
    return library is not None and bool(library.mallopt(_M_ARENA_MAX, 1))


def give_back_free_memory() -> bool:
    """Returns to the system what lies free in this process's heap, also between what is in use.

    glibc keeps a freed megabyte where it lies above another that is in use. Takes about a millisecond for 10 MB; the
    heap is locked meanwhile.

    Returns:
        Whether there was any: False where malloc is not glibc's, too.
    """
    library = _glibc()
    return library is not None and bool(library.malloc_trim(ctypes.c_size_t(0)))


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def _linux_peak() -> int | None:
    """VmHWM, which begins anew with the program. ru_maxrss does not: it keeps the size of what started it (exec)."""
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"VmHWM:"):
                    return int(line.split()[1]) * 1024  # "VmHWM:     1234 kB"
    except OSError:  # no /proc, in some sandboxes
        pass
    return None


if sys.platform == "win32":
    from ctypes import wintypes

    class _MemoryCounters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS of psapi.h."""

        _fields_ = (
            ("cb", wintypes.DWORD),
            ("PageFaultCount", wintypes.DWORD),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("WorkingSetSize", ctypes.c_size_t),
            ("QuotaPeakPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPagedPoolUsage", ctypes.c_size_t),
            ("QuotaPeakNonPagedPoolUsage", ctypes.c_size_t),
            ("QuotaNonPagedPoolUsage", ctypes.c_size_t),
            ("PagefileUsage", ctypes.c_size_t),
            ("PeakPagefileUsage", ctypes.c_size_t),
        )

    def _windows_peak() -> int | None:
        counters = _MemoryCounters(cb=ctypes.sizeof(_MemoryCounters))
        process = ctypes.windll.kernel32.GetCurrentProcess
        process.restype = wintypes.HANDLE
        query = ctypes.windll.psapi.GetProcessMemoryInfo
        query.argtypes = [wintypes.HANDLE, ctypes.c_void_p, wintypes.DWORD]
        if not query(process(), ctypes.byref(counters), counters.cb):
            return None
        return int(counters.PeakWorkingSetSize)
