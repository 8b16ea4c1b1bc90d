"""8-bit integers: the kit's own quantization method, and an example of how one is added.

Importing this package registers it with transformers, whose `from_pretrained` then loads what it
saved, or quantizes what it reads:

    import qlora_kit.quantize.int8
    model = AutoModelForCausalLM.from_pretrained("folder made by qlora-kit quantize")
    model = AutoModelForCausalLM.from_pretrained("any model", quantization_config=Int8Config())

`numbers` is the arithmetic, `layer` a linear layer made of it, `config` what config.json says,
`quantizer` what transformers calls while it loads, `observe` the ranges of activations, and `make`
the method for `qlora-kit quantize`.
"""

from qlora_kit.quantize.int8.config import METHOD, Int8Config
from qlora_kit.quantize.int8.layer import Int8Linear
from qlora_kit.quantize.int8.quantizer import Int8Quantizer

__all__ = ["METHOD", "Int8Config", "Int8Linear", "Int8Quantizer"]
