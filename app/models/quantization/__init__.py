"""Quantized linear layers: int8 with dynamic or static activations, int8 weights alone, and 4-bit NormalFloat.

Knows the decoder's modules and tensors; files are `checkpoints.py`'s. Embedding, head, norms and positions stay as they
are.
"""

from app.models.quantization.config import QuantizationConfig, Scheme
from app.models.quantization.conversion import Sizes, dequantize, prepare, quantize, quantized_bytes
from app.models.quantization.layer import QuantizedLinear

__all__ = [
    "QuantizationConfig",
    "QuantizedLinear",
    "Scheme",
    "Sizes",
    "dequantize",
    "prepare",
    "quantize",
    "quantized_bytes",
]
