"""A mistake in what is asked for: one paragraph with the key, the value and the remedy, before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

import fqt
from train import config
from train.main import main

ROOT = Path(config.__file__).resolve().parent.parent
GOOD = "model: {name: mlp_small}\ndata: {name: digits}\n"

# what is wrong: (text of the file, further arguments, what the message must hold)
MALFORMED = {
    "unknown key": (GOOD + "epochs: 3", [], ["epochs = 3", "no such key", "did you mean training.epochs?"]),
    "unknown key below": (GOOD + "optimizer: {lrate: 1}", [], ["optimizer.lrate = 1", "did you mean optimizer.lr?"]),
    "unknown section": (GOOD + "optimiser: {lr: 1}", [], ['optimiser = {"lr": 1}', "did you mean optimizer.lr?"]),
    "unknown key set": (GOOD, ["--set", "trainig.epochs=2"], ["trainig", "no such key", "training.epochs"]),
    "no model": ("data: {name: digits}", [], ["model is missing", "model.name"]),
    "no model name": ("model: {}\ndata: {name: digits}", [], ["model.name is missing", "list of models"]),
    "unknown model": (GOOD, ["--set", "model.name=vgg_smal"], ['model.name = "vgg_smal"', "did you mean vgg_small?"]),
    "unknown family": (GOOD, ["--set", "model.name=tim:resnet18"], ['"tim:resnet18"', "did you mean timm:<name>?"]),
    "family alone": (GOOD, ["--set", "model.name='timm:'"], ['model.name = "timm:"', "timm:<name>"]),
    "unknown data": (GOOD, ["--set", "data.name=fashon_mnist"], ['data.name = "fashon_mnist"', "fashion_mnist?"]),
    "unknown recipe": (GOOD, ["--set", "recipe=fqt_1bt"], ['recipe = "fqt_1bt"', "did you mean fqt_1bit?"]),
    "no recipe file": (GOOD, ["--set", "recipe=my/own.yaml"], ['recipe = "my/own.yaml"', "no such recipe file"]),
    "unknown optimizer": (GOOD, ["--set", "optimizer.name=adamx"], ['optimizer.name = "adamx"', "did you mean adam"]),
    "unknown schedule": (GOOD, ["--set", "schedule.name=cos"], ['schedule.name = "cos"', "did you mean cosine?"]),
    "text for number": (GOOD, ["--set", "optimizer.lr=fast"], ['optimizer.lr = "fast"', "valid number", "0.001"]),
    "quoted number": (GOOD, ["--set", "training.epochs='3'"], ['training.epochs = "3"', "valid integer"]),
    "fraction for count": (GOOD, ["--set", "training.epochs=1.5"], ["training.epochs = 1.5", "integer"]),
    "bool for count": (GOOD, ["--set", "data.limit=true"], ["data.limit = true", "integer"]),
    "number for bool": (GOOD, ["--set", "training.autocast=1"], ["training.autocast = 1", "boolean"]),
    "null for number": (GOOD, ["--set", "optimizer.lr=null"], ["optimizer.lr = null", "number"]),
    "zero epochs": (GOOD, ["--set", "training.epochs=0"], ["training.epochs = 0", "greater than or equal to 1"]),
    "negative rate": (GOOD, ["--set", "optimizer.lr=-0.1"], ["optimizer.lr = -0.1", "greater than 0"]),
    "infinite rate": (GOOD, ["--set", "optimizer.lr=.inf"], ["optimizer.lr = Infinity", "finite"]),
    "all held out": (GOOD, ["--set", "data.validation=1"], ["data.validation = 1", "less than 1"]),
    "negative seed": (GOOD, ["--set", "seed=-1"], ["seed = -1", "greater than or equal to 0"]),
    "no path": (GOOD, ["--set", 'output="a\\0b"'], ['output = "a\\u0000b"', "null character"]),
    "bad name": (GOOD, ["--set", "name=a/b"], ['name = "a/b"', "pattern"]),
    "value for section": (GOOD, ["--set", "optimizer=adam"], ['optimizer = "adam"', "section", "optimizer.lr"]),
    "section for value": (GOOD, ["--set", "recipe={name: xnor}"], ["recipe = ", "string"]),
    "key below a value": (GOOD + "recipe: xnor", ["--set", "recipe.bits=1"], ["recipe is a value", '"xnor"']),
    "text for list": (GOOD, ["--set", "recipe=xnor", "--set", "skip=0"], ["skip = 0", "it should be a list"]),
    "number in names": (GOOD + "recipe: xnor\nskip: [1]", [], ["skip.0 = 1", "string"]),
    "one beta": (GOOD, ["--set", "optimizer.betas=[0.9]"], ["optimizer.betas = [0.9]", "[0.9, 0.999]"]),
    "momentum of adam": (GOOD, ["--set", "optimizer.momentum=0.5"], ["optimizer.momentum = 0.5", "no effect", "adam"]),
    "betas of sgd": (GOOD + "optimizer: {name: sgd, betas: [0.5, 0.9]}", [], ["optimizer.betas", "no effect", "sgd"]),
    "gamma of cosine": (GOOD + "schedule: {name: cosine, gamma: 0.5}", [], ["schedule.gamma = 0.5", "no effect"]),
    "no milestones": (GOOD + "schedule: {name: step}", [], ["schedule.milestones = []", "[10, 15]"]),
    "falling milestones": (GOOD + "schedule: {name: step, milestones: [9, 5]}", [], ["[9.0, 5.0]", "rising epochs"]),
    "onecycle flat": (GOOD + "schedule: {warmup: 0}", [], ["schedule.warmup = 0", "above 0"]),
    "skip of fp32": (GOOD + "skip: [a]", [], ['skip = ["a"]', "no effect", "fp32"]),
    "workers of digits": (GOOD, ["--set", "data.workers=0"], ["data.workers = 0", "no effect", "digits"]),
    "path of digits": (GOOD, ["--set", "data.path=x"], ['data.path = "x"', "no effect", "digits"]),
    "uneven parts": (GOOD, ["--set", "training.accumulate=3"], ["training.accumulate = 3", "data.batch_size", "128"]),
    "odd bits": (GOOD, ["--set", "distributed.gradient_bits=3"], ["distributed.gradient_bits = 3", "1, 2, 4 or 8"]),
    "bits of fsdp2": (
        GOOD + "distributed: {engine: fsdp2, gradient_bits: 4}",
        [],
        ["distributed.gradient_bits = 4", "no effect", "fsdp2"],
    ),
    "feedback of floats": (GOOD + "distributed: {error_feedback: true}", [], ["distributed.error_feedback", "no effect"]),
    "policy of fsdp2": (
        GOOD + "recipe: int8\ndistributed: {engine: fsdp2}\nprecision: {policy: static}",
        [],
        ["precision.policy = static", "fsdp2"],
    ),
    "compiled fsdp2": (GOOD + "distributed: {engine: fsdp2}\ntraining: {compile: true}", [], ["training.compile", "fsdp2"]),
    "two mistakes": (GOOD + "seed: x\nquiet: 2", [], ['seed = "x"', "quiet = 2"]),
    "key twice": (GOOD + "seed: 1\nseed: 2", [], ["'seed' stands twice", "line 4"]),
    "not YAML": (GOOD + "seed: [1", [], ["is not YAML", "line"]),
    "a list": ("- 1", [], ["holds [1]", "keys and values"]),
    "binary": (GOOD + "name: \x01", [], ["is not YAML", "unacceptable character"]),
    "empty": ("", [], ["holds null", "keys and values"]),
    "set without value": (GOOD, ["--set", "seed"], ["--set seed", "key=value"]),
    "set of no YAML": (GOOD, ["--set", "seed=[1"], ["--set seed=[1 is not YAML"]),
    "unknown option": (GOOD, ["--epochs", "3"], ["--epochs 3", "--set key=value", "--help"]),
    "resume from nothing": (GOOD, ["--resume"], ["--resume runs/bad", "last.pt"]),
}


@pytest.mark.parametrize("mistake", MALFORMED)
def test_mistake_is_one_paragraph(mistake, tmp_path, capsys):
    text, arguments, wanted = MALFORMED[mistake]
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["--config", "bad.yaml", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    for part in wanted:
        assert part in printed.err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], ["--config", "--help"]),
        (["--config"], ["--config", "--help"]),
        (["--config", "fqt_1bt.yaml"], ["--config fqt_1bt.yaml", "did you mean fqt_1bit.yaml?"]),
    ],
)
def test_mistake_in_the_file_name(arguments, wanted, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(part in message for part in wanted)


def test_a_mistake_costs_no_import_of_torch(tmp_path):
    program = (
        "import sys; from train.main import main; status = main(['--config', 'fp32', '--set', 'training.epoch=1']);"
        "print('torch' in sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert "training.epoch = 1: there is no such key; did you mean training.epochs?" in done.stderr


def test_a_mistake_from_the_script(tmp_path):
    script = [sys.executable, str(ROOT / "train" / "main.py"), "--config", "fp32", "--set", "model.name=mpl"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train: ")
    assert "did you mean mlp?" in done.stderr
    assert "Traceback" not in done.stderr


def test_overrides_apply_in_order_and_keep_types():
    loaded = config.load("fp32", ["optimizer.lr=8e-3", "seed=1", "seed=2", "data.limit=null", "optimizer.betas=[0.5, 0.9]"])
    assert (loaded.optimizer.lr, loaded.seed, loaded.data.limit) == (8e-3, 2, None)
    assert loaded.optimizer.betas == (0.5, 0.9)
    assert loaded.name == "fp32"


def test_dump_is_read_back_as_the_same(tmp_path):
    loaded = config.load(
        "fqt_1bit", ["data.validation=0.1", "schedule.name=step", "schedule.milestones=[1]", "schedule.warmup=0"]
    )
    (tmp_path / "copy.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "copy.yaml") == loaded


def test_configuration_is_frozen(make):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        make().seed = 3


@pytest.mark.parametrize("name", ["fqt_1bit", "fqt_1bit.yaml", str(ROOT / "configs" / "fqt_1bit.yaml")])
def test_file_is_found_by_name_or_path(name):
    assert config.load(name).recipe == "fqt_1bit"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    loaded = config.load(path)
    assert fqt.load_recipe(loaded.recipe)
    assert path.read_text().startswith("# "), "the first line is what --help says of it"


@pytest.mark.parametrize("recipe", fqt.recipes())
def test_every_recipe_of_fqt_is_a_valid_name(recipe, make):
    assert make(recipe=recipe).recipe == recipe


def test_every_key_is_described():
    undescribed = [path for path, _, description in config.key_table() if not description]
    assert undescribed == []
