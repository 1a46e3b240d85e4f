"""How kbit's pictures look: one place for colours, marks, sizes of type, axes and files.

Matplotlib's objects are used directly (Figure and its savefig, no pyplot): nothing global stays behind, and no window
or display is ever needed. Widths are ordered, so their colours are too: they grow lighter along matplotlib's
plasma (perceptually uniform, also for the colour-blind), and every width has a mark of its own besides. Data types are
not ordered: they take the Okabe-Ito palette, which all common kinds of colour blindness tell apart, and keep their
colour in every picture, whoever else is in it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbit.host.errors import KbitError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# text.parse_math: names come from files, and "$" in them is no formula. The salt makes equal pictures equal files.
RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#30343b",
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8ec",
    "grid.linewidth": 0.7,
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "svg.hashsalt": "kbit",
}
INK, MUTED = "#22252a", "#6d737d"

# plasma at 0, 0.2, 0.38, 0.53, 0.66, 0.78, 0.88: wider steps among the few bits, whose lines cross; above is too light.
_WIDTHS = {2: "#0d0887", 3: "#6a00a8", 4: "#ab2494", 5: "#d24f71", 6: "#eb7655", 7: "#fb9f3a", 8: "#fdc627"}
_WIDTH_MARKS = {2: "v", 3: "s", 4: "o", 5: "D", 6: "^", 7: "P", 8: "X"}
_DTYPES = {
    "nf": "#0072B2",
    "int": "#E69F00",
    "float": "#009E73",
    "int-asym": "#D55E00",
    "lloyd": "#CC79A7",
    "dynamic": "#56B4E9",
    "quantile": "#8C6D1F",
}
# For what has no colour of its own: other grids of floats, methods, block sizes.
_OTHERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D1F", "#5b616b")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")

# Longer names would push the picture aside; the tables have them whole.
_LONGEST_NAME = 28


@contextmanager
def drawing() -> Iterator[None]:
    """Inside, figures are drawn in kbit's style; outside, matplotlib is as it was.

    Raises:
        KbitError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise KbitError("matplotlib is not installed: pip install matplotlib, then draw again") from None
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes: no reason to disturb the terminal.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches, laid out so that nothing overlaps or is cut off."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, stem: Path, kinds: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write a figure as `stem`.png and so on; the same figure gives the same bytes.

    Raises:
        KbitError: the files cannot be written.
    """
    written = []
    for kind in kinds:
        path = stem.with_name(f"{stem.name}.{kind}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rendered(figure, kind))
        except OSError as error:
            raise KbitError(f"{path} cannot be written: {error.strerror or error}") from error
        written.append(path)
    return written


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a "png" or "svg" file."""
    buffer = io.BytesIO()
    with drawing():
        metadata = {"Date": None, "Creator": "kbit"} if kind == "svg" else {"Software": "kbit"}
        figure.savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def inline_svg(svg: bytes, prefix: str) -> str:
    """An SVG file of `save` as an element for a page that holds several: ids begin with `prefix`, so that none
    clash."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    return re.sub(r"url\(#", f"url(#{prefix}-", text)


def width_color(bits: int) -> str:
    """Of a width, 2 to 8; black for any other, such as the original's."""
    return _WIDTHS.get(bits, INK)


def width_mark(bits: int) -> str:
    """The mark of a width."""
    return _WIDTH_MARKS.get(bits, "h")


def dtype_colors(names: list[str]) -> dict[str, str]:
    """A colour for each data type; those without one of their own take what is left over."""
    left = iter([color for color in _OTHERS if color not in {_DTYPES[name] for name in names if name in _DTYPES}])
    return {name: _DTYPES[name] if name in _DTYPES else next(left, MUTED) for name in names}


def colors(count: int) -> list[str]:
    """Colours for `count` things without an order."""
    return [_OTHERS[index % len(_OTHERS)] for index in range(count)]


def ordered_colors(count: int) -> list[str]:
    """Colours for `count` things with an order (models by size, block sizes): viridis, dark to light."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps["viridis"]
    return [to_hex(scale(0.08 + 0.74 * (index / max(1, count - 1)))) for index in range(count)]


def marks(count: int) -> list[str]:
    """Marks for `count` things."""
    return [_MARKS[index % len(_MARKS)] for index in range(count)]


def shown(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name from a file as text in a picture: printable, and cut in the middle where it is long."""
    text = "".join(char if char.isprintable() else "?" for char in name) or "(no name)"
    if len(text) > longest:
        head = (longest - 1) // 2
        text = f"{text[:head]}…{text[-(longest - 1 - head) :]}"
    return f" {text}" if text.startswith("_") else text  # a leading "_" hides a line from matplotlib's legends


def size_label(nbytes: float) -> str:
    """Bytes for people, decimal units: "8.2 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.3g} B"


def plain(value: float) -> str:
    """A number on an axis: without exponents from 0.0001 to 99,999."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else ""
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:,.10f}".rstrip("0").rstrip(".") if abs(value) < 1 else f"{value:,.6g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10**exponent:.3g}e{exponent}"


def log_axis(axis: Any, label: Callable[[float], str], *, low: float, high: float, most: int = 8) -> None:
    """Make an axis (axes.xaxis or .yaxis) logarithmic with readable ticks at round numbers.

    Args:
        label: what to write at a tick.
        low, high: what the axis shows.
        most: ticks with a label.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    set_scale, set_limits = (
        (axis.axes.set_xscale, axis.axes.set_xlim)
        if axis.axis_name == "x"
        else (axis.axes.set_yscale, axis.axes.set_ylim)
    )
    set_scale("log")
    set_limits(low, high)
    axis.set_major_locator(FixedLocator(log_ticks(low, high, most)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axis.set_minor_locator(LogLocator(subs=tuple(range(1, 10)), numticks=50))
    axis.set_tick_params(which="minor", length=2)
    axis.set_minor_formatter(NullFormatter())


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers between two limits for a logarithmic axis, the densest pattern that gives at most `most`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for pattern in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**d for d in decades for m in pattern if low <= m * 10.0**d <= high]
        if len(found) <= most:
            return found
    step = -(-len(found) // most)
    return found[::step]


def log_limits(values: list[float], pad: float = 0.06) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values, with some room."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(pad * (high - low), 0.04)
    return 10 ** (low - room), 10 ** (high + room)
