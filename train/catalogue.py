"""The names that a configuration can hold: models, data sets, policies, recipes.

All of it is known without importing torch, timm or torchvision, which take seconds: a misspelt name is answered at once.
"""

import importlib.util
import re
from functools import cache
from pathlib import Path

from train.wording import known_name, nearest

MODELS = {
    "vgg_small": "five 3x3 convolutions of 16-32-32-64-64 channels and three max-pools; the main job's model",
    "vgg16": "VGG-16 for small images: thirteen 3x3 convolutions with BatchNorm, one linear classifier",
    "resnet18": "ResNet-18 with the CIFAR stem: a 3x3 convolution and no max-pool",
    "resnet20": "ResNet-20 of the CIFAR family, 16-32-64 channels, option-A shortcuts",
    "resnet56": "ResNet-56 of the CIFAR family, 16-32-64 channels, option-A shortcuts",
    "alexnet": "AlexNet for small images: five convolutions and three linear layers, all with BatchNorm",
    "lenet5": "LeNet-5: two 5x5 convolutions and three linear layers, with BatchNorm and max-pools",
    "mlp": "four hidden layers of 4096 units with BatchNorm",
    "mlp_small": "two hidden layers of 256 units with BatchNorm",
    "torchvision:<name>": "any classifier of torchvision.models, untrained",
    "timm:<name>": "any model of timm, untrained",
    "gpt_small": "a GPT of model.blocks, model.width and model.heads; texts",
    "llama_small": "a Llama (RMSNorm, rotary places, gated units) of the same sizes; texts",
    "transformers:<name or folder>": "a kind of model (bert, gpt2, llama ...) untrained, of sizes by model.options; or a model "
    "in a folder, or in the cache of Hugging Face, with its weights; texts",
}
DECODERS = ("gpt_small", "llama_small")
"""Models of texts that are written here."""
POLICIES = {
    "adapt": "AdaPT: every layer's <WL, FL> by its weights' distribution and its gradients' diversity",
    "static": "the recipe as it is",
    "schedule": "another recipe from a given epoch on",
    "budget": "the fewest bits a layer that keep the model under a budget of bit operations",
    "variance": "the fewest gradient bits whose variance stays a small part of the minibatch's own",
    "<module>:<class>": "a policy of your own: any importable subclass of fqt.Policy",
}
DATASETS = {
    "fashion_mnist": "60,000 + 10,000 grey 28x28 images; searched in data.path, $FQT_DATA, ./data, Debian's package",
    "cifar10": "50,000 + 10,000 colour 32x32 images: torchvision's files, or an image folder with train/ and test/",
    "imagefolder:<path>": "<path>/train/<class>/*.jpg and <path>/val (or test), decoded by worker processes",
    "digits": "1,797 grey 8x8 digits that scikit-learn ships; nothing to download",
    "synthetic": "2,048 + 512 colour 32x32 images of ten noisy patterns, made on the spot",
    "text:<file or folder>": "plain text in UTF-8, the files of a folder one after another; the last tenth is the test set",
    "tsv:<file>": "a line a text: the text, a tabulator, its label; every tenth line, always the same ones, is in the test set",
}
TASKS = {
    "classify": "images by class; accuracy",
    "language_model": "the next token of a text; perplexity",
    "classify_text": "texts by class; accuracy",
}
DATA_OF = {"language_model": "text:", "classify_text": "tsv:"}
"""How the names of a task's data sets begin; those of classify are all others."""
TOKENIZERS = ("characters", "bytes", "model")
"""What data.tokenizer takes beside the path of a file of the package tokenizers."""


def is_text_model(name: str) -> bool:
    """Whether a model reads tokens, not images."""
    return name in DECODERS or name.startswith("transformers:")


def installed(package: str, extra: str = "") -> None:
    """Raises ValueError, with the command that installs it, where a package is not there. It is not imported."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed here; pip install {extra or package}")


def known_model(name: str) -> str:
    """Accepts a model's name; else raises ValueError with the nearest one."""
    family, _, rest = known_name(name, MODELS).partition(":")
    if not rest:
        return name
    if family == "transformers":
        installed(family, "'fqt[text]'")
        return name
    names = library_models(family)
    if rest.partition(".")[0] not in names:  # timm writes a model's pretrained weights behind a point
        raise ValueError(f"{family} has no such model; {nearest(rest, sorted(names), 'name')}")
    return name


@cache
def library_models(package: str) -> frozenset[str]:
    """The models of timm, or torchvision's classifiers, read from the source. Raises ValueError where that is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is not installed here; pip install {package}")
    registered = re.compile(r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    files = (Path(spec.submodule_search_locations[0]) / "models").glob("*.py")
    return frozenset(name for file in files for name in registered.findall(file.read_text(encoding="utf-8")))


def known_recipe(name: str) -> str:
    """Accepts a recipe's name; else raises ValueError with the nearest one."""
    if not any(re.fullmatch(_family(known), name) for known in recipe_names()):
        raise ValueError(nearest(name, recipe_names(), "recipe"))
    return name


def recipe_names() -> list[str]:
    """Names of the recipe files inside fqt, found without importing it, which would import torch.

    `psq_b{b}` stands for a family: any number in place of the braces (fqt itself says which numbers it takes).
    """
    spec = importlib.util.find_spec("fqt")
    folders = spec.submodule_search_locations if spec else None
    return sorted(path.stem for folder in folders or () for path in (Path(folder) / "recipes").glob("*.yaml"))


def _family(name: str) -> str:
    """A recipe's name as a regular expression."""
    return re.sub(r"\\{\w+\\}", r"\\d+", re.escape(name))
