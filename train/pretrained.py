"""Models of the package transformers: untrained ones of a kind, or from a folder or the cache. Nothing is downloaded."""

from pathlib import Path
from typing import Any

from torch import nn

from train.wording import ConfigError, nearest

HEADS = {"language_model": "AutoModelForCausalLM", "classify_text": "AutoModelForSequenceClassification"}
"""Task -> the class that gives a model its head."""
FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)
"""What transformers raises for configurations and files that it cannot use."""


def build(name: str, options: dict[str, Any], *, task: str, tokens: int, classes: int) -> nn.Module:
    """The model of `transformers:<name>`. Raises ConfigError where there is none, or where it does not know all tokens.

    options: values of its configuration that are others than its own. A kind of model gets as many tokens as the text has.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(name)
    untrained = not folder.is_dir() and name in transformers.CONFIG_MAPPING
    labels = {"num_labels": classes} if task == "classify_text" else {}
    try:
        if untrained:
            config = transformers.AutoConfig.for_model(name, **{"vocab_size": tokens, **options}, **labels)
        else:
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, **options, **labels)
    except FAULTS as error:
        raise ConfigError(_not_there(name, error, list(transformers.CONFIG_MAPPING))) from None
    if unknown := [option for option in options if not hasattr(type(config)(), option)]:
        known = sorted(key for key in type(config)().to_dict() if not key.startswith("_"))
        said = nearest(unknown[0], known, "option")
        raise ConfigError(f"model.options.{unknown[0]}: the configuration of {name} has no such value; {said}.")
    if config.vocab_size < tokens:
        raise ConfigError(
            f"model.name = transformers:{name}: it knows {config.vocab_size} tokens, and the text has {tokens}; set "
            "data.tokenizer=model, or model.options.vocab_size of an untrained one."
        )
    config.use_cache = False  # of generating texts
    if config.pad_token_id is None:
        config.pad_token_id = 0  # a decoder finds the end of a text by it
    head = getattr(transformers, HEADS[task])
    try:
        weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        if untrained or (folder.is_dir() and not weights):
            return head.from_config(config)
        return head.from_pretrained(name, config=config, local_files_only=True)
    except FAULTS as error:
        raise ConfigError(f"model.name = transformers:{name}: {' '.join(str(error).split())}.") from None


def tokenizer_file(name: str) -> str:
    """The tokenizer.json of a model in a folder or in the cache. Raises ConfigError where it has none there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    inside = Path(name) / "tokenizer.json"
    try:
        found = str(inside) if Path(name).is_dir() else try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str) or not Path(found).is_file():
        raise ConfigError(
            f"data.tokenizer = model: {name} has no tokenizer.json in its folder or in the cache of Hugging Face here; give "
            "the path of one, or use characters or bytes."
        )
    return found


def _not_there(name: str, error: Exception, kinds: list[str]) -> str:
    if Path(name).is_dir():
        return f"model.name = transformers:{name}: the folder holds no model ({' '.join(str(error).split())})."
    return (
        f"model.name = transformers:{name}: it is no folder, no kind of model, and not in the cache of Hugging Face here "
        f"({nearest(name, kinds, 'kind')}). Nothing is downloaded by itself: `hf download {name}` does, then start again."
    )
