"""The sections of a configuration: frozen, strictly typed values, each key with its default and what it means.

A key that is given and would have no effect is a mistake.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from train.catalogue import DATA_OF, DATASETS, DECODERS, POLICIES, TOKENIZERS, installed, known_model
from train.wording import ConfigError, known_name, nearest, show


def _as_tuple(value: Any) -> Any:
    """YAML knows lists only; strict pydantic wants the tuple that a frozen value needs."""
    return tuple(value) if isinstance(value, list) else value


def refuse_unused(section: BaseModel, because: str, unused: Sequence[str], prefix: str) -> None:
    """A key that is given, differs from its default and would have no effect is a mistake."""
    for name in unused:
        value = getattr(section, name)
        if value != type(section).model_fields[name].default:
            raise ValueError(f"{prefix}{name} = {show(value)}: it has no effect with {because}; leave it out")


Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Steps = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


def expanded(path: str) -> str:
    """A path with `~` and `~user` as the home folder. Raises ValueError for a user that there is not, or for no path at all."""
    if "\0" in path:
        raise ValueError("a path cannot hold a null character")
    if (full := os.path.expanduser(path)).startswith("~"):
        raise ValueError(f"there is no home folder {path.split('/')[0]}; write ./{path} if the name does begin with ~")
    return full


def home(option: str, path: str) -> str:
    """`expanded` for what is no key. Raises ConfigError that names the option or variable."""
    try:
        return expanded(path)
    except ValueError as error:
        raise ConfigError(f"{option} {path}: {error}.") from None


PathText = Annotated[str, AfterValidator(expanded)]


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


FILES = ("image_size", "workers", "check", "on_error")
"""Keys of `data` that only image files have."""
TEXTS = ("tokenizer", "length")
"""Keys of `data` that only texts have."""


class Model(Section):
    name: str
    """which model; see the list of models"""
    weights: PathText | None = None
    """checkpoint or state dict to start from (a warm start), e.g. of a float run"""
    blocks: int = Field(default=4, ge=1)
    """gpt_small and llama_small only: blocks of attention and feed-forward layers"""
    width: int = Field(default=128, ge=1)
    """gpt_small and llama_small only: channels between the blocks"""
    heads: int = Field(default=4, ge=1)
    """gpt_small and llama_small only: heads of attention, which divide the width"""
    options: dict[str, Any] = {}
    """transformers only: values of the model's configuration, e.g. {hidden_size: 128}"""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known_model(name)
        kind, _, path = name.partition(":")
        return f"{kind}:{expanded(path)}" if kind == "transformers" else name

    @model_validator(mode="after")
    def _used(self) -> "Model":
        sizes = () if self.name in DECODERS else ("blocks", "width", "heads")
        options = () if self.name.startswith("transformers:") else ("options",)
        refuse_unused(self, f"model.name {self.name}", (*sizes, *options), "model.")
        if self.width % (2 * self.heads):
            raise ValueError(f"model.heads = {self.heads}: twice the heads should divide model.width, which is {self.width}")
        return self


class Data(Section):
    name: str
    """which images or texts; see the list of data sets"""
    path: PathText | None = None
    """folder of fashion_mnist or cifar10, instead of searching for it"""
    batch_size: int = Field(default=128, ge=1)
    """images or texts an optimizer step, all ranks and accumulated parts together"""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """fraction of the training images or texts held out (always the same ones) to choose settings on"""
    limit: int | None = Field(default=None, ge=1)
    """train on this many of the training images or texts (always the same ones); null: all"""
    augment: Literal["none", "flip", "crop_flip", "randaugment"] = "none"
    """random changes of the training images; randaugment: crop_flip, then torchvision's RandAugment"""
    mixup: float = Field(default=0.0, ge=0)
    """alpha of mixup, which blends pairs of training images and their labels; 0: off"""
    cutmix: float = Field(default=0.0, ge=0)
    """alpha of cutmix, which pastes a part of one training image into another; 0: off"""
    tokenizer: str = "characters"
    """text and tsv only: characters, bytes, the path of a tokenizer.json (package tokenizers), or model: transformers' own"""
    length: int = Field(default=128, ge=2)
    """text and tsv only: tokens of a stretch that a language model reads; of a text, whose further tokens are left out"""
    image_size: int = Field(default=224, ge=8)
    """imagefolder only: height and width after resizing, in pixels"""
    workers: int = Field(default=2, ge=0)
    """imagefolder only: processes that decode images"""
    check: bool = False
    """imagefolder only: decode every image once before the training, and name those that cannot be read"""
    on_error: Literal["stop", "skip"] = "stop"
    """imagefolder only: at an image that cannot be read, end with its path, or go on without it, counted and listed"""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        kind, _, path = known_name(name, DATASETS).partition(":")
        return f"{kind}:{expanded(path)}" if path else name

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, tokenizer: str) -> str:
        if tokenizer in TOKENIZERS[:2]:
            return tokenizer
        installed("tokenizers", "'fqt[text]'")
        path = expanded(tokenizer)
        if tokenizer != "model" and not Path(path).is_file():
            raise ValueError(nearest(tokenizer, (*TOKENIZERS, "the path of a tokenizer.json that exists"), "value"))
        return path

    @model_validator(mode="after")
    def _used(self) -> "Data":
        texts = self.name.startswith(tuple(DATA_OF.values()))
        unused = [
            *(() if self.name.startswith("imagefolder:") else FILES),
            *(() if self.name in ("fashion_mnist", "cifar10") else ("path",)),
            *(("augment", "mixup", "cutmix") if texts else TEXTS),
        ]
        refuse_unused(self, f"data.name {self.name}", unused, "data.")
        return self


class Optimizer(Section):
    name: Literal["sgd", "adam", "adamw", "apex_adam", "apex_sgd"] = "adam"
    """torch's, fused where torch can; apex_*: NVIDIA apex's fused ones, which need a GPU"""
    lr: float = Field(default=1e-3, gt=0)
    """learning rate, the highest of the schedule"""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd and apex_sgd only"""
    betas: Floats = (0.9, 0.999)
    """adam, adamw and apex_adam only: decay of the two running means"""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty (adamw: decoupled decay)"""

    @model_validator(mode="after")
    def _used(self) -> "Optimizer":
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas = {list(self.betas)}: it should be two numbers in [0, 1), e.g. [0.9, 0.999]")
        refuse_unused(self, f"optimizer.name {self.name}", ("betas",) if "sgd" in self.name else ("momentum",), "optimizer.")
        return self


class Schedule(Section):
    name: Literal["constant", "step", "cosine", "onecycle"] = "onecycle"
    """how the learning rate moves: flat; times gamma at each milestone; cosine to zero; up and down again"""
    warmup: float | None = Field(default=None, ge=0, lt=1)
    """fraction of all steps in which the rate rises to its highest; null: 0.3 for onecycle, else 0"""
    milestones: Floats = ()
    """step only: epochs after which the rate falls"""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    """step only: factor of each fall"""

    @model_validator(mode="after")
    def _used(self) -> "Schedule":
        refuse_unused(self, f"schedule.name {self.name}", () if self.name == "step" else ("milestones", "gamma"), "schedule.")
        if self.name == "step" and (not self.milestones or list(self.milestones) != sorted(set(self.milestones))):
            raise ValueError(
                f"schedule.milestones = {list(self.milestones)}: schedule.name step needs rising epochs, e.g. [10, 15]"
            )
        if self.name == "onecycle" and self.warmup == 0:
            raise ValueError("schedule.warmup = 0: onecycle rises first; give a fraction above 0, or use cosine")
        return self


class Training(Section):
    epochs: int = Field(default=1, ge=1)
    """passes over the training images"""
    accumulate: int = Field(default=1, ge=1)
    """parts a batch is cut into, one forward and backward each, before the optimizer steps"""
    clip_norm: float | None = Field(default=None, gt=0)
    """largest norm of all gradients together; null: no clipping"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """share of each training label that is spread over all classes"""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """evaluate a moving average of the weights, with this decay a step, such as 0.999; null: the weights themselves"""
    nonfinite: Literal["skip", "stop"] = "skip"
    """at a loss or gradients that are not finite: leave the weights and go on with the next batch, or end the run"""
    nonfinite_limit: int = Field(default=10, ge=1)
    """skipped steps in a row that end the run, with a diagnosis"""
    autocast: bool = False
    """run the float layers in bfloat16"""
    compile: bool = False
    """torch.compile the model"""
    channels_last: bool = True
    """keep images and convolution weights in channels_last memory format"""

    @model_validator(mode="after")
    def _used(self) -> "Training":
        refuse_unused(
            self, f"training.nonfinite {self.nonfinite}", ("nonfinite_limit",) if self.nonfinite == "stop" else (), "training."
        )
        return self


class Start(Section):
    calibrate: Literal["none", "max", "percentile", "mse"] = "none"
    """static ranges of activations before the first step: of all values, a percentile, or the least error"""
    percent: float = Field(default=99.99, gt=0, le=100)
    """percentile only: values that the range holds"""
    weights: bool = True
    """with calibrate only: static ranges of weights too, those of the least squared error"""
    batches: int = Field(default=8, ge=0)
    """training batches that are looked at; 0: none, ranges are those behind BatchNorms"""
    reconstruct: Literal["none", "adaround", "adaquant"] = "none"
    """move weights so that each layer puts out what the float layer does, by learned rounding or through the quantizers"""
    steps: int = Field(default=200, ge=1)
    """with reconstruct only: steps for each layer"""

    @model_validator(mode="after")
    def _used(self) -> "Start":
        ranges, moves = self.calibrate != "none", self.reconstruct != "none"
        refuse_unused(self, "start.calibrate none", () if ranges else ("weights",), "start.")
        others = () if self.calibrate == "percentile" else ("percent",)
        refuse_unused(self, f"start.calibrate {self.calibrate}", others, "start.")
        refuse_unused(self, "start.reconstruct none", () if moves else ("steps",), "start.")
        refuse_unused(
            self, "start.calibrate none and start.reconstruct none", () if ranges or moves else ("batches",), "start."
        )
        if moves and self.batches < 2:
            raise ValueError(
                f"start.batches = {self.batches}: start.reconstruct {self.reconstruct} needs at least 2, one of which judges"
            )
        return self


class Precision(Section):
    model_config = ConfigDict(extra="allow")

    policy: str | None = None
    """what changes the layers' bits while the model trains, its options beside it; see the list of policies; null: nothing"""

    @property
    def options(self) -> dict[str, Any]:
        """The policy's own options."""
        return dict(self.model_extra or {})

    @field_validator("policy")
    @classmethod
    def _known(cls, policy: str | None) -> str | None:
        if policy is None or re.fullmatch(r"[\w.]+:\w+", policy):
            return policy
        return known_name(policy, POLICIES)

    @model_validator(mode="after")
    def _used(self) -> "Precision":
        if self.policy is None:
            for name, value in self.options.items():
                raise ValueError(f"precision.{name} = {show(value)}: it is an option of a policy; set precision.policy")
        return self


class Tracking(Section):
    enabled: bool = True
    """write TensorBoard scalars and metrics.jsonl, and measure the speed-up"""
    every: int = Field(default=10, ge=1)
    """steps between two points of the step curves"""
    baseline_steps: int = Field(default=5, ge=0)
    """steps of the unconverted model and of this one timed for speedup/measured, after 2 of warm-up; 0: do not"""
    baseline_every: int = Field(default=500, ge=0)
    """steps between two timings of the unconverted model, each of baseline_steps + 1 of its steps; 0: at the start only"""
    variance_every: int = Field(default=100, ge=0)
    """steps between two measurements of each layer's gradient quantization error; 0: never"""
    monitor_every: int = Field(default=100, ge=0)
    """steps between two looks at the quantized weights: flipped signs, saturation, underflow, scales; 0: never"""
    profile: Steps | None = None
    """[first, last] step of a trace of torch's profiler, trace_<first>_<last>.json in the run's folder; null: none"""

    @model_validator(mode="after")
    def _used(self) -> "Tracking":
        if self.profile is not None and not (len(self.profile) == 2 and 0 < self.profile[0] <= self.profile[1]):
            raise ValueError(f"tracking.profile = {list(self.profile)}: it should be two rising steps, e.g. [20, 24]")
        refuse_unused(self, "tracking.enabled false", () if self.enabled else ("profile",), "tracking.")
        unused = () if self.baseline_steps else ("baseline_every",)
        refuse_unused(self, "tracking.baseline_steps 0", unused, "tracking.")
        return self


class Distributed(Section):
    engine: Literal["ddp", "fsdp2"] = "ddp"
    """with torchrun: each process holds the whole model, or a part of every weight (torch's fully_shard)"""
    gradient_bits: int | None = None
    """ddp only: bits (1, 2, 4 or 8) in which gradients travel between the processes; null: in float32"""
    error_feedback: bool = False
    """with gradient_bits only: add what the encoding lost to the next step's gradients"""
    compare_every: int = Field(default=100, ge=0)
    """steps between two comparisons of the processes' weights and scales, which should be the same; 0: never"""

    @model_validator(mode="after")
    def _used(self) -> "Distributed":
        if self.gradient_bits not in (None, 1, 2, 4, 8):
            raise ValueError(f"distributed.gradient_bits = {self.gradient_bits}: it should be 1, 2, 4 or 8, or null")
        sharded = ("gradient_bits",) if self.engine == "fsdp2" else ()
        refuse_unused(self, f"distributed.engine {self.engine}", sharded, "distributed.")
        refuse_unused(self, "distributed.gradient_bits null", () if self.gradient_bits else ("error_feedback",), "distributed.")
        return self


class Checkpoint(Section):
    enabled: bool = True
    """write last.pt after every epoch, when the run is stopped, and as the next keys say; best.pt where images are held out"""
    every_steps: int | None = Field(default=None, ge=1)
    """steps between two checkpoints; null: only those that the other keys ask for"""
    every_minutes: float | None = Field(default=15.0, gt=0)
    """minutes between two checkpoints within an epoch; null: only those that the other keys ask for"""
    keep: int = Field(default=2, ge=1)
    """how many of the newest checkpoints stay: last.pt, and step_<steps>.pt of those before it"""

    @model_validator(mode="after")
    def _used(self) -> "Checkpoint":
        unused = () if self.enabled else ("every_steps", "every_minutes", "keep")
        refuse_unused(self, "checkpoint.enabled false", unused, "checkpoint.")
        return self
