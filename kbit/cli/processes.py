"""A command that torchrun starts several times at once: they act as one, and the first speaks for all.

Imports nothing heavy, and without torchrun it does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, NoReturn, TypeVar

import typer

from kbit.cli.heavy import import_torch
from kbit.host.errors import UsageError

if TYPE_CHECKING:
    from kbit.backends.parallel import Group
    from kbit.engine.loader import LoadedModel
    from kbit.graph.backend import Backend

T = TypeVar("T")

# Commands that several processes can share. Any other would do all its work once in each of them, and write to the same
# files; `refuse_copies` keeps it from that.
SHARED = frozenset({"run", "chat", "eval"})


class Peers:
    """The processes of one command; usually this one alone.

    Attributes:
        group: how they reach each other; None for one alone.
        speaks: whether this is the one that prints.
    """

    def __init__(self, group: Group | None) -> None:
        self.group = group
        self.speaks = group is None or group.rank == 0

    def decided_by_first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the process that speaks, which alone calls it. It must be fit for JSON."""
        return work() if self.group is None else self.group.decided_by_first(work)

    def together(self) -> AbstractContextManager[None]:
        """A block that fails everywhere if it fails anywhere; nothing in it may use the group."""
        return nullcontext() if self.group is None else self.group.together()

    def seed(self, seed: int | None) -> int | None:
        """A seed for all: without one, each would draw its own."""
        if self.group is None or seed is not None:
            return seed
        import secrets

        return self.group.decided_by_first(lambda: secrets.randbits(63))

    def fetch(self, models: list[str], text: Callable[[], object] | None = None) -> None:
        """Has models, and what `text` gets, downloaded (or sampled), if need be, once and with one progress bar, before
        all open them."""
        if self.group is None:
            return
        from kbit.models.opening import open_model

        def fetch() -> None:
            for model in models:
                open_model(model).close()
            if text is not None:
                text()

        self.group.decided_by_first(fetch)

    def loader(self, backend: Backend, threads: int | None) -> Callable[..., LoadedModel]:
        """`load_model` for this process's share of any model; all that it loads take turns on one backend."""
        from functools import partial

        from kbit.cli.loading import loading_line
        from kbit.engine.loader import load_model

        if backend.name != "native":
            import_torch()
        if self.group is not None:
            from kbit.backends.parallel import split

            backend = split(backend, self.group)
        progress = loading_line() if self.speaks else None
        return partial(load_model, threads=threads, backend=backend, group=self.group, progress=progress)


@contextmanager
def processes() -> Iterator[Peers]:
    """The processes of this command. An error of any is printed by one, and ends all.

    Raises:
        UsageError, UnsupportedError, KbitError: they cannot meet (`kbit.backends.parallel.join`).
    """
    if not _several():
        yield Peers(None)
        return
    from kbit.backends.parallel import PeerError, join

    group = join()
    try:
        yield Peers(group)
    except PeerError as error:
        if group.rank == 0:
            raise
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        if group.rank == 0:
            raise
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # Alone, a process whose reader has gone ends well. Here the others would wait for it: torchrun ends them when
        # one ends badly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    group.close()  # not after an error: the others may not come


def refuse_copies(what: str) -> None:
    """For what one process does alone: ends every process of several.

    Args:
        what: the command, as a user would name it.

    Raises:
        UsageError: torchrun started several. In the first of this machine only: the others end without a word.
    """
    if not _several():
        return
    # Other launchers set RANK as well, but not LOCAL_RANK: there every process speaks, as it may be the only one to.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise typer.Exit(UsageError.exit_code)
    raise UsageError(f"{what} runs as one process: start it without torchrun, or unset RANK and WORLD_SIZE")


def _several() -> bool:
    """Whether torchrun, or what sets its variables, started more than this process."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def end(code: int) -> NoReturn:
    """Ends this process with an exit code.

    One that is still in a group, after an error, ends at once: torch's threads would go on while the interpreter is
    taken down under them, and now and then one aborts ("terminate called without an active exception"). To leave the
    group first is no way out, since that waits for what the other processes owe.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
