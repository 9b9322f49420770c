"""Precision policies: what chooses each layer's bits while a model trains. One policy, one file, found by itself."""

import importlib
import pkgutil

from fqt.precision.adapt import AdaPT
from fqt.precision.budget import Budget
from fqt.precision.cost import Cost, training_cost
from fqt.precision.formats import Precision, at_gradient_bits, at_precision, at_word_length
from fqt.precision.policy import POLICIES, Decision, Policy, build_policy, register_policy
from fqt.precision.push_down import push_down
from fqt.precision.push_up import gradient_diversity, push_up
from fqt.precision.schedule import Schedule
from fqt.precision.static import Static
from fqt.precision.step_time import StepTime
from fqt.precision.variance import Variance

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "POLICIES",
    "AdaPT",
    "Budget",
    "Cost",
    "Decision",
    "Policy",
    "Precision",
    "Schedule",
    "Static",
    "StepTime",
    "Variance",
    "at_gradient_bits",
    "at_precision",
    "at_word_length",
    "build_policy",
    "gradient_diversity",
    "push_down",
    "push_up",
    "register_policy",
    "training_cost",
]
