"""What a run is: a tree of frozen, strictly typed values, read from a YAML file and `--set key.sub=value`.

Everything is checked here, before torch is imported, so that a typing mistake costs a second and not a minute. Every
error is one paragraph that names the key's full path, the value, and the nearest valid name. Nothing is converted
silently: `epochs: "3"` is a mistake, and so is a key that would have no effect (`momentum` for adam).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from train.catalogue import DATASETS, POLICIES, known_model, known_recipe
from train.wording import ConfigError, known_name, nearest, sentence, show

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def _as_tuple(value: Any) -> Any:
    """YAML knows lists only; strict pydantic wants the tuple that a frozen value needs."""
    return tuple(value) if isinstance(value, list) else value


def _refuse_unused(section: BaseModel, because: str, unused: Sequence[str], prefix: str) -> None:
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


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


FILES = ("image_size", "workers", "check", "on_error")
"""Keys of `data` that only image files have."""


class Model(_Section):
    name: str
    """which model; see the list of models"""
    weights: PathText | None = None
    """checkpoint or state dict to start from (a warm start), e.g. of a float run"""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return known_model(name)


class Data(_Section):
    name: str
    """which images; see the list of data sets"""
    path: PathText | None = None
    """folder of fashion_mnist or cifar10, instead of searching for it"""
    batch_size: int = Field(default=128, ge=1)
    """images an optimizer step, all ranks and accumulated parts together"""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """fraction of the training images held out (always the same ones) to choose settings on"""
    limit: int | None = Field(default=None, ge=1)
    """train on this many of the training images (always the same ones); null: all"""
    augment: Literal["none", "flip", "crop_flip", "randaugment"] = "none"
    """random changes of the training images; randaugment: crop_flip, then torchvision's RandAugment"""
    mixup: float = Field(default=0.0, ge=0)
    """alpha of mixup, which blends pairs of training images and their labels; 0: off"""
    cutmix: float = Field(default=0.0, ge=0)
    """alpha of cutmix, which pastes a part of one training image into another; 0: off"""
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

    @model_validator(mode="after")
    def _used(self) -> "Data":
        folder = self.name.startswith("imagefolder:")
        _refuse_unused(self, f"data.name {self.name}", () if folder else FILES, "data.")
        _refuse_unused(self, f"data.name {self.name}", () if self.name in ("fashion_mnist", "cifar10") else ("path",), "data.")
        return self


class Optimizer(_Section):
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
        _refuse_unused(self, f"optimizer.name {self.name}", ("betas",) if "sgd" in self.name else ("momentum",), "optimizer.")
        return self


class Schedule(_Section):
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
        _refuse_unused(self, f"schedule.name {self.name}", () if self.name == "step" else ("milestones", "gamma"), "schedule.")
        if self.name == "step" and (not self.milestones or list(self.milestones) != sorted(set(self.milestones))):
            raise ValueError(
                f"schedule.milestones = {list(self.milestones)}: schedule.name step needs rising epochs, e.g. [10, 15]"
            )
        if self.name == "onecycle" and self.warmup == 0:
            raise ValueError("schedule.warmup = 0: onecycle rises first; give a fraction above 0, or use cosine")
        return self


class Training(_Section):
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
        _refuse_unused(
            self, f"training.nonfinite {self.nonfinite}", ("nonfinite_limit",) if self.nonfinite == "stop" else (), "training."
        )
        return self


class Precision(_Section):
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


class Tracking(_Section):
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
        unused = () if self.enabled else ("profile",)
        _refuse_unused(self, "tracking.enabled false", unused, "tracking.")
        unused = () if self.baseline_steps else ("baseline_every",)
        _refuse_unused(self, "tracking.baseline_steps 0", unused, "tracking.")
        return self


class Distributed(_Section):
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
        _refuse_unused(
            self, f"distributed.engine {self.engine}", ("gradient_bits",) if self.engine == "fsdp2" else (), "distributed."
        )
        unused = () if self.gradient_bits else ("error_feedback",)
        _refuse_unused(self, "distributed.gradient_bits null", unused, "distributed.")
        return self


class Checkpoint(_Section):
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
        _refuse_unused(self, "checkpoint.enabled false", unused, "checkpoint.")
        return self


class Config(_Section):
    model: Model
    data: Data
    recipe: str = "fp32"
    """name of a recipe or path of a recipe's YAML file; fp32: do not convert the model"""
    skip: Names | None = None
    """patterns of layer names to leave in float; null: as the recipe says"""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    precision: Precision = Precision()
    distributed: Distributed = Distributed()
    tracking: Tracking = Tracking()
    checkpoint: Checkpoint = Checkpoint()
    seed: int = Field(default=0, ge=0, lt=2**62)
    """seed of initial weights, order of images, augmentation and quantization noise (plus the rank, there)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one"""
    output: PathText = "runs"
    """folder of all runs; a run writes to <output>/<name>/<date-time>"""
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9._-]+$")
    """name of the run; from a file: the file's name"""
    quiet: bool = False
    """print nothing and show no progress bar"""

    @field_validator("recipe")
    @classmethod
    def _known_recipe(cls, recipe: str) -> str:
        if "/" not in recipe and not recipe.endswith((".yaml", ".yml")):
            return known_recipe(recipe)
        path = expanded(recipe)
        if not Path(path).is_file():
            raise ValueError("there is no such recipe file")
        return path

    @model_validator(mode="after")
    def _effective(self) -> "Config":
        if self.recipe == "fp32":
            _refuse_unused(self, "recipe fp32", ("skip",), "")
            _refuse_unused(self.precision, "recipe fp32", ("policy",), "precision.")
        if self.distributed.engine == "fsdp2":
            because = "distributed.engine fsdp2"
            if self.precision.policy is not None:
                raise ValueError(
                    f"precision.policy = {self.precision.policy}: a policy reads whole weights, not with {because}"
                )
            if self.training.ema is not None:
                raise ValueError(f"training.ema = {self.training.ema}: it does not go with {because}; leave one of them out")
            if self.training.compile:
                raise ValueError(f"training.compile = true: it does not go with {because}; leave one of them out")
        if self.data.batch_size % self.training.accumulate:
            raise ValueError(
                f"training.accumulate = {self.training.accumulate}: it should divide data.batch_size, which is "
                f"{self.data.batch_size}"
            )
        return self


def load(config: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration: a path, or a bare name that is looked up in configs/, with or without `.yaml`.

    overrides: `key.sub=value`, the value in YAML, applied in order. Raises ConfigError.
    """
    path = find(config)
    tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {show(tree)}: it should hold keys and values, such as `recipe: fqt_1bit`.")
    tree.setdefault("name", path.stem)
    for override in overrides:
        _apply(tree, override)
    return parse(tree, str(path))


def find(config: str | Path) -> Path:
    """The file that `--config` means. Raises ConfigError with the nearest name."""
    for path in (Path(home("--config", str(config))), CONFIGS / config, CONFIGS / f"{config}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    raise ConfigError(f"--config {config}: there is no such file, here or in configs/; {nearest(str(config), names, 'file')}.")


def parse(tree: Mapping[str, Any], origin: str = "configuration") -> Config:
    """Checks a tree of plain values. Raises ConfigError, which says all that is wrong with it in one paragraph."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        known = {path: (default, description) for path, default, description in key_table()}
        sentences = [sentence(item, known) for item in error.errors()]
        raise ConfigError(f"{origin}: {' '.join(sentences)}") from None


def dump(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def key_table(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key as (path, default, description), sections flattened: for --help and for the nearest name."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from key_table(field.annotation, f"{prefix}{name}.")
            continue
        choices = getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
        description = (field.description or "") + (f" ({' | '.join(choices)})" if choices else "")
        yield f"{prefix}{name}", "required" if field.is_required() else show(field.default), description


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (PyYAML reads `8e-3` as a string) and no key given twice (PyYAML drops the first)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise ConfigError(f"{origin} is not YAML: {error.problem}{line}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not YAML: {' '.join(str(error).split())}.") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets one `key.sub=value` in place."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override}: it should be key=value, such as --set optimizer.lr=0.003.")
    *sections, last = path.strip().split(".")
    for depth, section in enumerate(sections):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            parent = ".".join(sections[: depth + 1])
            raise ConfigError(f"--set {override}: {parent} is a value, {show(tree)}, and has no keys below it.")
    tree[last] = _parse_yaml(text, f"--set {override}")
