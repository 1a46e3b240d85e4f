"""How a matrix is rounded with a calibration. Imports no torch: settings are part of a plan."""

from __future__ import annotations

from dataclasses import dataclass

# Added to a factor's diagonal, in shares of its mean: the finite sample says nothing about directions it has not seen.
INPUT_DAMPING, OUTPUT_DAMPING = 0.03, 0.2
# Of coordinate descent after two-sided feedback (docs/methods.md: what they buy).
SWEEPS = 4


@dataclass(frozen=True)
class Settings:
    """What `kbit.quantizers.ldlq` does.

    Attributes:
        feedback: pass errors on to the columns that come after.
        two_sided: pass them on to the rows that come after, too.
        sweeps: of coordinate descent over the rounded matrix.
        search: try scales below the one that spans the block.
        input_damping, output_damping: see INPUT_DAMPING.
    """

    feedback: bool = True
    two_sided: bool = True
    sweeps: int = 0
    search: bool = True
    input_damping: float = INPUT_DAMPING
    output_damping: float = OUTPUT_DAMPING
