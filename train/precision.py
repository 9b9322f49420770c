"""A precision policy within a run: made from the configuration, followed step by step, shown.

`Timeline` is what a run shows of it: every layer's bits at every decision, as scalars, as one heat map and in precision.csv.
"""

import importlib
from collections.abc import Sequence

import numpy as np
from torch import nn

import fqt
from fqt.precision import Cost, Policy, StepTime, build_policy, training_cost
from fqt.precision.policy import POLICIES
from train import pictures
from train.sections import Precision
from train.step import Parts
from train.tasks import Task
from train.wording import ConfigError

PANELS = ("bits of the weights", "bits of the gradients")


def build(config: Precision, model: nn.Module) -> Policy | None:
    """The configuration's policy for a converted model; None where it names none. Raises ConfigError with fqt's own words."""
    if config.policy is None:
        return None
    try:
        return build_policy(_registered(config.policy), model, **config.options)
    except ValueError as error:
        raise ConfigError(f"precision.policy = {config.policy}: {error}.") from error


def _registered(name: str) -> str:
    """The name under which the policy stands in fqt's table; `module:Class` is imported, and registered if it did not do so."""
    module, colon, attribute = name.partition(":")
    if not colon:
        return name
    try:
        policy = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"precision.policy = {name}: {error}; give <module>:<class> of a class that can be imported."
        ) from error
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigError(f"precision.policy = {name}: it is no subclass of fqt.Policy.")
    if policy not in POLICIES.values():
        fqt.register_policy(name)(policy)
    return policy.name


class Timeline:
    """The bits of every layer from step to step.

    points: (step, bits of each layer's output product's weight, bits of each layer's gradient), one at the start and one after
    every step that changed something: plain values, which a checkpoint keeps.
    """

    def __init__(self, policy: Policy, batch: int) -> None:
        self.policy, self._batch = policy, batch
        self.points: list[tuple[int, list[int], list[int]]] = []
        self._modelled: tuple[Cost, dict[str, float]] | None = None
        self._step_time: StepTime | None = None
        self.float_ms: float | None = None
        self.note(0)

    def note(self, step: int) -> None:
        """After a step with decisions: remember the layers' bits, where they are not as before."""
        self._modelled = None
        words, gradients = bits_of([(name, layer.recipe) for name, layer in self.policy.layers.items()]).values()
        if not self.points or self.points[-1][1:] != (words, gradients):
            self.points.append((step, words, gradients))

    def calibrate(self, task: Task, parts: Parts, float_ms: float) -> None:
        """Have the performance model know this machine. float_ms: a step of the unconverted model, measured in this run."""
        self.float_ms = float_ms
        self._step_time = StepTime(self.policy.model, task.inputs(parts[0][0]), float_ms, forwards=len(parts))

    def scalars(self, step_ms: float, policy_ms: float) -> dict[str, float]:
        """What the policy shows, what the performance model says, and how far it is from what was measured.

        step_ms, policy_ms: of a recent step, measured, and of the policy in it.
        """
        cost, shares = self.cost(), self.shares()
        shown = dict(self._formats())
        shown |= {f"precision/{name}": value for name, value in self.policy.scalars().items()}
        shown |= {f"precision/runs_on/{backend}": share for backend, share in shares.items()}
        modelled = {
            "training_speedup_modelled": cost.training_speedup,
            "training_speedup_papers_model": cost.paper_training_speedup,
            "inference_speedup_modelled": cost.inference_speedup,
            "model_size": cost.size,
            "switching_share_modelled": cost.switching_share,
            "switching_share_measured": policy_ms / step_ms,
        }
        predicted = self.predicted_ms()
        if predicted is not None and self.float_ms is not None:
            modelled["training_speedup_measured"] = self.float_ms / step_ms
            modelled["training_speedup_predicted"] = self.float_ms / predicted
            modelled["model_error"] = cost.training_speedup * step_ms / self.float_ms - 1
            modelled["prediction_error"] = step_ms / predicted - 1
        return shown | {f"precision/{name}": value for name, value in modelled.items()}

    def _formats(self) -> dict[str, float]:
        shown: dict[str, float] = {}
        for name, layer in self.policy.layers.items():
            shown[f"precision/word_length/{name}"] = float(word_length(layer.recipe, "output", "w"))
            quantizer = layer.recipe.quantizer("output", "w")
            if quantizer is not None and quantizer.fraction_length is not None:
                shown[f"precision/fraction_length/{name}"] = float(quantizer.fraction_length)
        return shown

    def cost(self) -> Cost:
        """The performance model at the formats as they are."""
        return self._model()[0]

    def shares(self) -> dict[str, float]:
        """Backend -> share of a step's multiply-adds that run on it; "float32" is torch's own."""
        return self._model()[1]

    def predicted_ms(self) -> float | None:
        """Milliseconds of a step at the formats as they are, by the calibrated model; None if it was not calibrated."""
        return None if self._step_time is None else self._step_time(self.policy.model)

    def _model(self) -> tuple[Cost, dict[str, float]]:
        """The performance model, and the share of the multiply-adds on each backend, since the last decisions."""
        if self._modelled is None:
            policy = self.policy
            sparsity, switching = policy.sparsity(), policy.switching_cost()
            cost = training_cost(policy.model, batch=self._batch, sparsity=sparsity, switching=switching)
            self._modelled = cost, backend_shares(policy.model)
        return self._modelled

    def image(self) -> np.ndarray:
        """The heat map: layers x time, bits of the weights above, bits of the gradients below; (H, W, 3) uint8."""
        panels = {PANELS[0]: [point[1] for point in self.points], PANELS[1]: [point[2] for point in self.points]}
        steps = [point[0] for point in self.points]
        return pictures.heat_map(list(self.policy.layers), steps, panels, last=max(steps[-1], self.policy.steps, 1))


def bits_of(layers: Sequence[tuple[str, fqt.Recipe]]) -> dict[str, list[int]]:
    """The bits of each layer's weights and of its gradients, as the heat map shows them."""
    words = [word_length(recipe, "output", "w") for _, recipe in layers]
    return {PANELS[0]: words, PANELS[1]: [word_length(recipe, "grad_input", "g") for _, recipe in layers]}


def word_length(recipe: fqt.Recipe, product: str, letter: str) -> int:
    """Bits of an operand's codes, 32 if it is float."""
    format = recipe.format(product, letter)
    return 32 if format is None else format.bits


def backend_shares(model: nn.Module) -> dict[str, float]:
    """See `Timeline.shares`."""
    work: dict[str, float] = {}
    for row in fqt.summary(model).rows:
        for product in row.bits:
            backend = row.served.get(product, "float32").replace(" ", "_")
            work[backend] = work.get(backend, 0.0) + (row.madds or 0)
    total = sum(work.values())
    return {backend: amount / total for backend, amount in work.items()}
