"""kbit inside transformers 5: `import kbit.transformers` registers the quantization method "kbit".

    import kbit.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("org/name", quantization_config=kbit.transformers.KbitConfig(bits=4))
    model = AutoModelForCausalLM.from_pretrained("out/")    # a folder of kbit quantize, or of model.save_pretrained

docs/transformers.md has the rest.
"""

from kbit.host.errors import UnsupportedError

try:
    import transformers
except ModuleNotFoundError:
    raise UnsupportedError(
        "kbit.transformers needs transformers 5, which this Python has not: pip install 'transformers>=5'"
    ) from None
if int(transformers.__version__.partition(".")[0]) < 5:
    raise UnsupportedError(
        f"kbit.transformers needs transformers 5, and this is {transformers.__version__}: pip install 'transformers>=5'"
    )

from kbit.modules.convert import dequantize_, quantize_, set_compute
from kbit.transformers.config import KbitConfig
from kbit.transformers.quantizer import KbitHfQuantizer

__all__ = ["KbitConfig", "KbitHfQuantizer", "dequantize_", "quantize_", "set_compute"]
