"""How many tokens a pass may have, by how long passes took."""

from __future__ import annotations

from kbit.engine.scheduler import BATCH_TOKENS
from kbit.graph.pages import PAGE

# How long a step may take while answers are being written, and while only prompts are read: the latter bounds how
# long a cancelled request holds its seat.
STEP_SECONDS, PROMPT_STEP_SECONDS = 0.050, 0.500
_FEWEST_ROWS = 16
_MEMORY = 0.8  # of the measured speed that a new measurement leaves in place


class Pace:
    """The speed of a model's passes, and what follows for the next one.

    Args:
        step_seconds: how long a pass may take while answers are being written.

    Attributes:
        rows_per_second: beyond the time that any pass takes; 0: not measured yet.
        pass_seconds: the time that any pass takes.
    """

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self.rows_per_second = 0.0
        self.pass_seconds = 0.0

    def rows(self, writing: int) -> int:
        """Tokens of the next pass.

        Args:
            writing: answers that are being written.
        """
        if not self.rows_per_second:
            return PAGE
        seconds = (self._step_seconds if writing else PROMPT_STEP_SECONDS) - self.pass_seconds
        # However many write and however slow the machine: prompts are read, or they would wait for others' ends.
        return int(min(max(seconds * self.rows_per_second, writing + _FEWEST_ROWS), BATCH_TOKENS))

    def measure(self, rows: int, seconds: float) -> None:
        """Learns from a pass."""
        if rows < _FEWEST_ROWS:  # a pass over few rows takes as long as its weights
            old = self.pass_seconds
            self.pass_seconds = seconds if not old else _MEMORY * old + (1 - _MEMORY) * seconds
        else:
            speed = rows / max(seconds - self.pass_seconds, seconds / 4, 1e-6)
            old = self.rows_per_second
            self.rows_per_second = speed if not old else _MEMORY * old + (1 - _MEMORY) * speed
