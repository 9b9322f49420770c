"""fqt: fully quantized training for PyTorch.

    model = fqt.convert(model, "fqt_1bit")

Weights, activations and gradients of every linear and convolution layer then go through low-bit matrix products, forward and
backward. This page is the whole public face.
"""

from fqt.convert import convert, revert
from fqt.formats import Format
from fqt.inspect.memory import Memory, memory
from fqt.inspect.observe import count_saved_bytes, observe_gradients
from fqt.inspect.profile import profile
from fqt.inspect.summary import Summary, modelled_speedup, summary
from fqt.inspect.timing import Profile
from fqt.layers import QuantConv2d, QuantLinear, quantized_layers
from fqt.precision import AdaPT, Policy, Precision, build_policy, register_policy
from fqt.qtensor import QTensor
from fqt.quantizers import Quantizer, quantize, register
from fqt.recipe import Product, Recipe, Rule, load_recipe, recipes

__all__ = [
    "AdaPT",
    "Format",
    "Memory",
    "Policy",
    "Precision",
    "Product",
    "Profile",
    "QTensor",
    "QuantConv2d",
    "QuantLinear",
    "Quantizer",
    "Recipe",
    "Rule",
    "Summary",
    "build_policy",
    "convert",
    "count_saved_bytes",
    "load_recipe",
    "memory",
    "modelled_speedup",
    "observe_gradients",
    "profile",
    "quantize",
    "quantized_layers",
    "recipes",
    "register",
    "register_policy",
    "revert",
    "summary",
]
__version__ = "0.1.0"
