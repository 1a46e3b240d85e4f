"""Parts of packed tensors: the values of the whole, in arrays that the part's format prescribes."""

from __future__ import annotations

import pytest
import torch

from kbit.formats.blockwise import quantize_blockwise
from kbit.formats.codec import Cut
from kbit.formats.quant_format import QuantFormat
from kbit.formats.quant_tensor import QuantTensor
from kbit.host.errors import UnsupportedError


class TestCutting:
    @pytest.mark.parametrize(
        "text",
        ["nf4-b16", "int3-b32-asym-dq", "int5-b16-asym-bf16", "nf4-row", "lloyd3-row-fp32", "quantile7-b64-dq"]
        + ["int8-b64", "nf4-b16-dq", "int2-b4096", "int6-b16-asym-dq"],
    )
    def test_a_part_has_the_values_of_the_whole(self, text: str) -> None:
        """Every cut at a whole unit, and three of rows; bit for bit, in arrays that the part's format prescribes."""
        format, shape = QuantFormat.parse(text), (30, 205)
        whole = quantize_blockwise(torch.randn(shape, generator=torch.Generator().manual_seed(1)), format)
        values, unit = whole.dequantize(), format.column_unit(shape[1])
        ends = [*range(unit, shape[1], unit), shape[1]]
        cuts = [Cut(0, 0, 13), Cut(0, 13, 30), Cut(0, 0, 30)]
        cuts += [Cut(1, 0, end) for end in ends] + [Cut(1, start, shape[1]) for start in ends[:-1]]
        for cut in cuts:
            part = whole.cut(cut)
            assert part.shape == cut.shape(shape)
            QuantTensor.checked("part", part.format, part.shape, part.stored, part.codebook)
            assert torch.equal(part.dequantize(), cut.of(values)), cut
            for array in part.stored.values():
                assert array.untyped_storage().nbytes() == array.numel() * array.element_size()

    def test_double_quantized_scales_stay_where_their_superblocks_are_whole(self) -> None:
        x = torch.randn((64, 1024), generator=torch.Generator().manual_seed(2))
        whole = quantize_blockwise(x, QuantFormat.parse("nf4-b64-dq"))
        for cut, format in ((Cut(0, 32, 64), "nf4-b64-dq"), (Cut(0, 8, 64), "nf4-b64-fp32")):
            part = whole.cut(cut)
            assert str(part.format) == format
            assert torch.equal(part.dequantize(), cut.of(whole.dequantize()))

    def test_a_cut_through_a_block_or_a_byte_is_refused(self) -> None:
        for text, stop, unit in (("nf4-b64", 96, 64), ("int3-row", 100, 8), ("nf4-row", 101, 2)):
            whole = quantize_blockwise(torch.ones((2, 205)), QuantFormat.parse(text))
            with pytest.raises(
                UnsupportedError, match=rf"^o: columns 0 to {stop} of 205 are no whole blocks of {unit}"
            ):
                whole.cut(Cut(1, 0, stop), "o")
