"""Programs of a few instructions, and passes through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.draw import Draw
from kbit import _native

_WIDTHS = (16, 32, 48, 1, 2, 7)
_KV, _LAYERS, _HEADS, _DIM, _VOCABULARY = "fp32", 2, 2, 16, 37


class Recorder:
    """A program and its buffers.

    Args:
        draw: the choices.
        context: the kernels.
    """

    def __init__(self, draw: Draw, context: Any) -> None:
        self.draw, self.context = draw, context
        self.program = _native.Program(context, draw.given(draw.choice(("int8", "fp32", "bf16"))))
        self.buffers = [(self.program.buffer(draw.given(width)), width) for width in _WIDTHS for _ in range(2)]

    def buffer(self, width: int = 0) -> Any:
        """One of this width, mostly."""
        fitting = [index for index, wide in self.buffers if wide == width or not width]
        return self.draw.given(self.draw.choice(fitting or [0]))

    def pair(self, width: int) -> tuple[Any, Any]:
        """Two of a width, mostly two different ones."""
        fitting = [index for index, wide in self.buffers if wide == width]
        return self.draw.given(fitting[0]), self.draw.given(fitting[-1])

    def weights(self, rows: int, columns: int) -> Any:
        """A dense matrix of this shape, mostly."""
        return _native.Matrix.dense(self.draw.array((rows, columns), "f4"), "fp32", self.context)

    def some(self, *shape: int) -> Any:
        """An array, or None."""
        return self.draw.floats(*shape) if self.draw.below(2) else None

    def instruction(self) -> None:
        """Any of them."""
        names = sorted(name for name in dir(self) if name.startswith("do_"))
        getattr(self, self.draw.choice(names))()

    def do_given(self) -> None:
        self.program.given(self.buffer())

    def do_embed(self) -> None:
        width = self.draw.choice(_WIDTHS)
        table = self.weights(_VOCABULARY, width)
        of = self.draw.given(self.draw.choice(("tokens", "positions", "types")))
        self.program.embed(table, self.buffer(width), of, self.draw.given(self.draw.below(3)))

    def do_matmul(self) -> None:
        draw, wide, out = self.draw, self.draw.choice(_WIDTHS), self.draw.choice(_WIDTHS)
        count = 1 + draw.below(2)
        activation = draw.given(draw.choice((None, None, "silu", "gelu", "relu")))
        x, y = self.pair(out)
        norm = self.some(wide)
        self.program.matmul(
            self.buffer(wide),
            [draw.given(self.weights(out, wide)) for _ in range(count)],
            [self.some(out) for _ in range(draw.given(count))],
            [y] if activation else [y, x][:count],
            norm,
            draw.given(1e-5),
            activation,
            y if count == 1 and draw.below(3) == 0 else None,
            self.some(wide) if norm is not None else None,
            bool(draw.below(2)),
        )

    def do_norm(self) -> None:
        width, groups = self.draw.choice(_WIDTHS), self.draw.choice((1, 1, 2, 4))
        x, out = self.pair(width)
        centred = bool(self.draw.below(2))
        bias = self.some(width) if centred else None
        self.program.norm(x, self.draw.floats(width), 1e-5, out, bias, centred, self.draw.given(groups))

    def do_rows(self) -> None:
        width = self.draw.choice(_WIDTHS)
        x, out = self.pair(width)
        kind = self.draw.below(6)
        if kind == 0:
            self.program.add(x, self.buffer(width), out)
        elif kind == 1:
            self.program.multiply(x, self.buffer(width), out)
        elif kind == 2:
            self.program.map(x, out, self.draw.given(2.0), self.draw.given(0.5))
        elif kind == 3:
            self.program.columns(
                self.buffer(48), self.buffer(self.draw.choice((7, 16))), self.draw.given(self.draw.below(40))
            )
        elif kind == 4:
            self.program.activate(x, self.buffer(width), self.draw.given("silu"), out)
        else:
            self.program.sigmoid_gate(x, self.buffer(self.draw.choice((1, width))), out)

    def do_heads(self) -> None:
        x, out = self.pair(self.draw.choice((16, 32, 48)))
        if self.draw.below(2):
            self.program.rotate(x, out, self.draw.given(16), self.draw.given(0), self.draw.given(self.draw.below(9)))
        else:
            shared = self.draw.given(self.buffer(7)) if self.draw.below(2) else None
            self.program.fit_heads(self.buffer(16), shared, self.buffer(48), self.draw.given(2))

    def do_attend(self) -> None:
        draw = self.draw
        q, out = self.pair(32)
        k, v = self.pair(32)
        stores = draw.below(4)
        self.program.attend(
            q,
            k if stores else None,
            v if stores else None,
            out,
            draw.given(draw.below(_LAYERS)),
            draw.given(_HEADS),
            draw.given(_HEADS),
            draw.given(_DIM),
            draw.given(0.25),
            draw.given(draw.choice((None, 1, 5))),
            bool(draw.below(2)),
            self.some(32) if draw.below(4) == 0 else None,
            draw.given(draw.choice((None, (0, 8), (0, 4), (4, 8)))),
            draw.given(0.0),
            self.some(_HEADS) if draw.below(4) == 0 else None,
            self.some(_HEADS * 5) if draw.below(4) == 0 else None,
        )

    def do_cross(self) -> None:
        draw = self.draw
        x, y = self.pair(32)
        shape = [draw.given(draw.below(_LAYERS)), draw.given(_HEADS), draw.given(_HEADS), draw.given(_DIM)]
        if draw.below(2):
            self.program.store_keys(x, y, *shape)
        else:
            self.program.cross_attend(x, y, *shape, 0.25)

    def do_states(self) -> None:
        draw = self.draw
        kind, state = draw.below(3), draw.given(draw.below(2))
        x, out = self.pair(48)
        heads, beta = self.pair(2)
        if kind == 0:
            sizes = [draw.given(number) for number in (1, 2, 8, 16)]
            self.program.recur(x, heads, beta, draw.floats(2), self.buffer(32), state, *sizes)
        elif kind == 1:
            sizes = [draw.given(number) for number in (1, 2, 8, 16)]
            self.program.scan(x, heads, draw.floats(2), draw.floats(2), self.buffer(32), state, *sizes)
        else:
            self.program.convolve(x, draw.floats(3 * 48), out, state, draw.given(3), self.some(48))

    def do_experts(self) -> None:
        draw, count = self.draw, 7
        matrices = [
            [draw.given(self.weights(*shape)) for _ in range(count)] for shape in ((32, 16), (32, 16), (16, 32))
        ]
        none: list[Any] = [None] * count
        self.program.experts(
            self.pair(16)[0],
            self.buffer(7),
            self.pair(16)[1],
            *matrices,
            *(none, none, none),
            self.some(count),
            draw.given(1 + draw.below(count)),
            draw.given(draw.choice(("softmax", "sigmoid", "softmax_of_chosen", "sparsemixer"))),
            bool(draw.below(2)),
            draw.given(1.0),
            draw.given(draw.choice((0, 1, 7))),
            draw.given(draw.choice((0, 1, 3))),
            draw.given("silu"),
            draw.given(1.0),
            draw.given(draw.choice((0.0, 7.0))),
            bool(draw.below(2)),
            self.some(count),
            draw.given(0.01),
            bool(draw.below(2)),
        )


def program(draw: Draw, context: Any, scratch: Path) -> None:
    """A program is recorded and run."""
    recorder = Recorder(draw, context)
    for _ in range(draw.size(5)):
        recorder.instruction()
    recorder.program.finish(recorder.buffer(32))
    with_head = draw.below(3) > 0
    if with_head:
        head = recorder.weights(_VOCABULARY, 32)
        recorder.program.head(
            head, recorder.some(32), 1e-5, None, False, 1.0, draw.given(0.0), recorder.some(_VOCABULARY)
        )
    rows, count, length = draw.size(4), draw.size(3), 8
    pages = _native.KVPages(
        draw.given(_LAYERS), draw.given(_HEADS), draw.given(_DIM), draw.choice(("fp32", "8", "4", "2")), count
    )
    order = np.zeros(rows, np.int32) if draw.below(4) else draw.array((rows,), "i4", 2)
    positions = np.arange(rows, dtype=np.int32) if draw.below(4) else draw.array((rows,), "i4", 70)
    chosen = draw.array((rows,), "i8", rows) if with_head else None
    states = None
    if draw.below(2):
        arrays = [draw.floats(3, draw.choice((256, 96, 96))) for _ in range(2)]
        states = (arrays, draw.array((2,), "i4", 3, -1), draw.array((2,), "i4", 3))
    encoder = None
    if draw.below(2):
        texts = _native.KVPages(_LAYERS, _HEADS, _DIM, "fp32", 2)
        encoder = (draw.given(texts), draw.array((2, 2), "i4", 2), draw.array((2,), "i4", 100, 1))
    for _ in range(1 + draw.below(2)):
        recorder.program.run(
            draw.array((rows,), "i8", _VOCABULARY),
            order,
            positions,
            draw.floats(length, 8),
            draw.floats(length, 8),
            draw.array((rows,), "i4", length),
            pages,
            draw.array((2, count), "i4", count),
            chosen,
            draw.floats(rows, _VOCABULARY if with_head else 32),
            draw.array((rows,), "i4", rows) if draw.below(4) == 0 else None,
            draw.given(encoder),
            draw.given(states),
            draw.array((rows,), "i8", 3) if draw.below(2) else None,
            draw.floats(rows, draw.choice(_WIDTHS)) if draw.below(3) == 0 else None,
        )
    if with_head:
        recorder.program.logits(draw.floats(rows, 32), draw.floats(rows, _VOCABULARY))
