"""fqt: fully quantized training for PyTorch.

    model = fqt.convert(model, "fqt_1bit")

Weights, activations and gradients of every linear and convolution layer then go through low-bit matrix products, forward and
backward. This page is the whole public face.
"""

from fqt.convert import convert, revert
from fqt.export import Exported, export
from fqt.formats import Format, Grid, Grouping, register_grid
from fqt.freeze import freeze
from fqt.inspect.bisect import bisect
from fqt.inspect.diff import diff
from fqt.inspect.flow import modelled_speedup
from fqt.inspect.memory import Memory, memory
from fqt.inspect.observe import count_saved_bytes, observe_gradients
from fqt.inspect.profile import profile
from fqt.inspect.recommend import Recommendation, recommend
from fqt.inspect.summary import Summary, summary
from fqt.inspect.timing import Profile
from fqt.layers import QuantConv2d, QuantizedLayer, QuantLinear, quantized_layers, register_layer
from fqt.precision import AdaPT, Policy, Precision, build_policy, register_policy
from fqt.qtensor import QTensor, Scales
from fqt.quantizers import Quantizer, quantize, register
from fqt.quantizers.stages import (
    Calibration,
    Estimator,
    ProductTransform,
    Transform,
    register_calibration,
    register_estimator,
    register_transform,
)
from fqt.recipe import Product, Recipe, Rule
from fqt.recipe_yaml import load_recipe, recipes
from fqt.saving import load, save
from fqt.start.calibrate import Calibrated, calibrate
from fqt.start.reconstruct import Reconstructed, reconstruct

__all__ = [
    "AdaPT",
    "Calibrated",
    "Calibration",
    "Estimator",
    "Exported",
    "Format",
    "Grid",
    "Grouping",
    "Memory",
    "Policy",
    "Precision",
    "Product",
    "ProductTransform",
    "Profile",
    "QTensor",
    "QuantConv2d",
    "QuantLinear",
    "QuantizedLayer",
    "Quantizer",
    "Recipe",
    "Recommendation",
    "Reconstructed",
    "Rule",
    "Scales",
    "Summary",
    "Transform",
    "bisect",
    "build_policy",
    "calibrate",
    "convert",
    "count_saved_bytes",
    "diff",
    "export",
    "freeze",
    "load",
    "load_recipe",
    "memory",
    "modelled_speedup",
    "observe_gradients",
    "profile",
    "quantize",
    "quantized_layers",
    "recipes",
    "recommend",
    "reconstruct",
    "register",
    "register_calibration",
    "register_estimator",
    "register_grid",
    "register_layer",
    "register_policy",
    "register_transform",
    "revert",
    "save",
    "summary",
]
__version__ = "0.1.0"
