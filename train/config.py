"""What a run is: a tree of frozen, strictly typed values, read from a YAML file and `--set key.sub=value`.

Everything is checked here, before torch is imported, so that a typing mistake costs a second and not a minute. Every
error is one paragraph that names the key's full path, the value, and the nearest valid name. Nothing is converted
silently: `epochs: "3"` is a mistake, and so is a key that would have no effect (`momentum` for adam).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from train.catalogue import DATA_OF, is_text_model, known_recipe
from train.sections import (
    Checkpoint,
    Data,
    Distributed,
    Model,
    Names,
    Optimizer,
    PathText,
    Precision,
    Schedule,
    Section,
    Start,
    Tracking,
    Training,
    expanded,
    home,
    refuse_unused,
)
from train.wording import ConfigError, nearest, sentence, show

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Config(Section):
    task: Literal["classify", "language_model", "classify_text"] = "classify"
    """what is learned: images by class, the next token of a text, or texts by class"""
    model: Model
    data: Data
    recipe: str = "fp32"
    """name of a recipe or path of a recipe's YAML file; fp32: do not convert the model"""
    skip: Names | None = None
    """patterns of layer names to leave in float; null: as the recipe says"""
    start: Start = Start()
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
            refuse_unused(self, "recipe fp32", ("skip",), "")
            refuse_unused(self.precision, "recipe fp32", ("policy",), "precision.")
            refuse_unused(self.start, "recipe fp32", ("calibrate", "reconstruct"), "start.")
        task, wanted = f"task {self.task}", DATA_OF.get(self.task, "")
        if not self.data.name.startswith(wanted) or (not wanted and self.data.name.startswith(tuple(DATA_OF.values()))):
            fits = next((name for name, begin in DATA_OF.items() if self.data.name.startswith(begin)), "classify")
            data = f"texts ({wanted}<path>)" if wanted else "images"
            raise ValueError(f"data.name = {show(self.data.name)}: {task} learns from {data}; set task={fits}, or other data")
        if is_text_model(self.model.name) != bool(wanted):
            reads = "texts" if wanted else "images"
            raise ValueError(f"model.name = {show(self.model.name)}: {task} needs a model of {reads}; see the list of models")
        if self.data.tokenizer == "model" and not self.model.name.startswith("transformers:"):
            raise ValueError(f"data.tokenizer = model: {self.model.name} has none of its own; use characters or bytes")
        if self.distributed.engine == "fsdp2":
            because = "distributed.engine fsdp2"
            if self.precision.policy is not None:
                raise ValueError(
                    f"precision.policy = {self.precision.policy}: a policy reads whole weights, not with {because}"
                )
            for name in ("calibrate", "reconstruct"):
                if (method := getattr(self.start, name)) != "none":
                    raise ValueError(f"start.{name} = {method}: it does not go with {because}; leave one of them out")
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
