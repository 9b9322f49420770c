"""`python -m fqt`: what fqt does with files, from a shell.

    doctor     what works on this machine
    inspect    what a file of fqt.save holds: levels, bits, scales and bytes of each layer
    summary    the table of fqt.summary for such a file
    freeze     a state dict of a converted model -> such a file
    bench      such a file's speed here, against its architecture in float32
    export     such a file -> one of another runtime: GGUF, ONNX, a folder of transformers
    generate   text from such a file of a language model

A command is a function of its options that returns the exit status, and a row of `COMMANDS`. Exit status: 0; 1 where something
is wrong, told in one paragraph; 2 for a command line that is not understood.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fqt import container, factories
from fqt.container import Reader
from fqt.convert import convert
from fqt.export import export
from fqt.formats import Format
from fqt.inspect.bench import Timing, time_forwards
from fqt.inspect.doctor import examine
from fqt.inspect.summary import summary
from fqt.inspect.table import aligned
from fqt.layers import quantized_layers
from fqt.precision.formats import from_plain
from fqt.saving import load, save


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        run: from the parsed options to the exit status; its docstring is the help.
        options: (names, keyword arguments of argparse's add_argument) of each.
    """

    run: Callable[[argparse.Namespace], int]
    options: Sequence[tuple[tuple[str, ...], Mapping[str, Any]]] = field(default=())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fqt", description="Fully quantized training: what it does with files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.run.__doc__ or ""
        one = commands.add_parser(name, help=text.splitlines()[0], description=text)
        for names, options in command.options:
            one.add_argument(*names, **options)
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (ValueError, OSError) as error:
        print(f"fqt {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def doctor(options: argparse.Namespace) -> int:
    """What works on this machine, what does not, why, and the remedy."""
    findings = examine()
    print(*findings, sep="\n")
    return int(any(finding.state == "broken" for finding in findings))


# --- inspect ----------------------------------------------------------------------------------------------------------


def inspect(options: argparse.Namespace) -> int:
    """What a file holds, without its architecture: levels, bits, scales, bytes of each layer, which add up to the file's."""
    with container.reading(options.file) as reader:
        rows = [["tensor", "format", "levels", "bits", "shape", "scales", "bytes", "bits a weight"], *_rows(reader)]
        contents = reader.contents
    size = options.file.stat().st_size
    lines = aligned([*rows, ["total", "", "", "", "", "", f"{size:,}", ""]], right=(2, 3, 5, 6, 7))
    rule = "-" * max(map(len, lines))
    recipes = ", ".join(dict.fromkeys(str(recipe.get("name")) for recipe in contents.recipes))
    print(f"{options.file}: {contents.model}, {len(contents.layers)} frozen layers by {recipes}")
    if contents.factory:
        print(f"factory: {contents.factory['name']} {json.dumps(contents.factory['arguments'])}")
    print(lines[0], rule, *lines[1:-1], rule, lines[-1], sep="\n")
    return 0


def _rows(reader: Reader) -> Iterator[list[str]]:
    """A line for each packed weight, for each other tensor, and for the header."""
    left = dict(reader.tensors)
    for name, layer in reader.contents.layers.items():
        for number, weight in enumerate(layer.weights):
            prefix = f"{name}.packed.{number}.".lstrip(".")
            parts = [left.pop(f"{prefix}{part}", None) for part in ("codes", "scale", "offset")]
            nbytes, format = sum(part.nbytes for part in parts if part is not None), Format.parse(weight.format)
            scales, weights = 0 if parts[1] is None else parts[1].shape[0], torch.Size(weight.shape).numel()
            levels = f"{_levels(format):,}"
            shape, each = " x ".join(map(str, weight.shape)), f"{8 * nbytes / weights:.2f}" if nbytes else "tied"
            yield [prefix[:-1], weight.format, levels, str(format.bits), shape, f"{scales:,}", f"{nbytes:,}", each]
    for name, tensor in left.items():
        yield [name, tensor.dtype.lower(), "", "", " x ".join(map(str, tensor.shape)), "", f"{tensor.nbytes:,}", ""]
    yield ["header", "json", "", "", "", "", f"{reader.header_bytes:,}", ""]


def _levels(format: Format) -> int:
    """How many values a code can have."""
    low, high = format.code_range
    return 2 if format.grid == "sign" else 2**format.bits if format.is_float else int(high - low) + 1


# --- with an architecture ---------------------------------------------------------------------------------------------


def summarize(options: argparse.Namespace) -> int:
    """Formats, bytes and serving kernels of each layer. The architecture is what the file records, or what --factory names."""
    print(summary(load(options.file, _architecture(options), factory=options.factory is None)))
    return 0


def freeze(options: argparse.Namespace) -> int:
    """From a state dict of a converted model to a file: .safetensors, or .pt of torch.save or of the training program."""
    model = factories.build({"name": options.factory, "arguments": options.arguments})
    print(f"{options.factory}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters", file=sys.stderr)
    convert(model, options.recipe)
    checkpoint = _checkpoint(options.file)
    decided = checkpoint.get("precision", {}).get("policy", {}).get("recipes", {})  # by a precision policy, while it trained
    for name, layer in quantized_layers(model):
        if name in decided:
            layer.recipe = from_plain(decided[name])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(f"{options.file} does not fit {options.factory} by {options.recipe}: {str(error)[:500]}") from error
    save(model, options.output, factory=options.factory, arguments=options.arguments)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes, of {options.file.stat().st_size:,}")
    return 0


def bench(options: argparse.Namespace) -> int:
    """A frozen model's forward here, against the same architecture in float32 by torch: median milliseconds, in turns."""
    frozen = load(options.file, _architecture(options), factory=options.factory is None)
    with container.reading(options.file) as reader:
        recorded = reader.contents.factory
    plain = (_architecture(options) or factories.build(recorded)).eval()
    torch.set_num_threads(options.threads)
    rows = [["batch", "threads", "float32, ms", "frozen, ms", "speed-up"]]
    for batch in options.batch:
        print(f"batch of {batch} ...", file=sys.stderr, flush=True)
        x = torch.randint(options.tokens, (batch, *options.shape)) if options.tokens else torch.randn(batch, *options.shape)
        timings: list[Timing] = time_forwards([plain, frozen], x, options.seconds)
        one, other = (timing.milliseconds for timing in timings)
        rows.append([str(batch), str(options.threads), f"{one:.3g}", f"{other:.3g}", f"{one / other:.2f}"])
    print(*aligned(rows, right=range(5)), sep="\n")
    return 0


def _export(options: argparse.Namespace) -> int:
    """From a file to one of another runtime, .gguf or .onnx, or with --format to a folder of transformers."""
    frozen = load(options.file, _architecture(options), factory=options.factory is None)
    print(f"{options.file}: {sum(1 for _ in quantized_layers(frozen))} frozen layers", file=sys.stderr, flush=True)
    given = {name: getattr(options, name) for name in ("format", "multiply", "opset", "tolerance")}
    example = None if options.example is None else torch.load(options.example, map_location="cpu", weights_only=True)
    tokenizer = None if options.tokenizer is None else _tokenizer(options.tokenizer)
    print(export(frozen, options.output, example, tokenizer=tokenizer, **given))
    return 0


def generate(options: argparse.Namespace) -> int:
    """Text from a frozen language model of transformers, behind a prompt: the likeliest tokens, or drawn ones."""
    frozen: Any = load(options.file, _architecture(options), factory=options.factory is None)
    if not hasattr(frozen, "generate"):
        raise ValueError(f"{options.file} is a {type(frozen).__name__}, which generates no text: give a language model")
    tokenizer = _tokenizer(options.tokenizer)
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": options.temperature} if options.temperature else {}
    streamer = _transformers().TextStreamer(tokenizer)  # prints each word when it is there
    given = tokenizer(options.prompt, return_tensors="pt")
    ends = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        frozen.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=options.tokens,
            streamer=streamer, pad_token_id=ends, **{"do_sample": False, **drawn},
        )  # fmt: skip
    return 0


def _tokenizer(folder: str) -> Any:
    """That of a folder of transformers; nothing is downloaded."""
    return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _transformers() -> Any:
    """The package. ValueError where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("a tokenizer is read by transformers, which is not installed: pip install 'fqt[text]'")
    return importlib.import_module("transformers")


def _architecture(options: argparse.Namespace) -> nn.Module | None:
    """What --factory names, None where it is not given."""
    if options.factory is None:
        return None
    return factories.build({"name": options.factory, "arguments": options.arguments})


def _checkpoint(path: Path) -> dict[str, Any]:
    """What a file of tensors holds; a state dict stands under "model". No code of it is run. ValueError where it holds none."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        why = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} cannot be read ({why[:200]}): give a state dict of torch.save or safetensors") from error
    held: dict[str, Any] = state if isinstance(state, dict) else {}
    key = next((key for key in ("model", "state_dict") if isinstance(held.get(key), dict)), None)
    state = held if key is None else held[key]
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: names and tensors")
    return {**(held if key else {}), "model": {name.removeprefix("module."): value for name, value in state.items()}}


def _mapping(text: str) -> dict[str, Any]:
    """JSON of an object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object such as '{{\"num_classes\": 10}}'")
    return value


_FILE = (("file",), {"type": Path, "metavar": "FILE", "help": "a file that fqt.save wrote"})
_FACTORY = (("--factory",), {"help": "torchvision:MODEL, timm:MODEL or transformers:CLASS, in place of the recorded one"})
_TOKENIZER = "a folder of transformers that has the language model's tokenizer"
_ARGUMENTS = (("--arguments",), {"type": _mapping, "default": {}, "metavar": "JSON", "help": "of the factory"})

COMMANDS: dict[str, Command] = {
    "doctor": Command(doctor),
    "inspect": Command(inspect, [_FILE]),
    "summary": Command(summarize, [_FILE, _FACTORY, _ARGUMENTS]),
    "freeze": Command(
        freeze,
        [
            (("file",), {"type": Path, "metavar": "FILE", "help": "the state dict"}),
            (("output",), {"type": Path, "metavar": "OUTPUT", "help": "where the frozen model goes"}),
            (("--recipe",), {"required": True, "help": "by which the model was converted: a name, or the path of a YAML file"}),
            (("--factory",), {"required": True, "help": "torchvision:MODEL, timm:MODEL or transformers:CLASS"}),
            _ARGUMENTS,
        ],
    ),
    "bench": Command(
        bench,
        [
            _FILE,
            (("--shape",), {"type": int, "nargs": "+", "required": True, "help": "of one sample, such as 3 224 224"}),
            (("--tokens",), {"type": int, "default": 0, "help": "draw integers below this instead of floats"}),
            (("--batch",), {"type": int, "nargs": "+", "default": [1, 64], "help": "samples a forward (default 1 and 64)"}),
            (("--threads",), {"type": int, "default": 1, "help": "of torch (default 1)"}),
            (("--seconds",), {"type": float, "default": 3.0, "help": "of measuring for each batch (default 3)"}),
            _FACTORY,
            _ARGUMENTS,
        ],
    ),
    "export": Command(
        _export,
        [
            _FILE,
            (("output",), {"type": Path, "metavar": "OUTPUT", "help": ".gguf, .onnx, or with --format a folder to be made"}),
            (("--format",), {"choices": ["transformers", "bitnet"], "help": "of a folder"}),
            (("--tokenizer",), {"metavar": "FOLDER", "help": _TOKENIZER}),
            (("--example",), {"type": Path, "help": "an input of the model, by torch.save; .onnx needs one"}),
            (("--multiply",), {"choices": ["float", "integer", "nbits"], "help": "of .onnx: how a product is made (float)"}),
            (("--opset",), {"type": int, "help": "of .onnx (21)"}),
            (("--tolerance",), {"type": float, "help": "of .onnx: the largest relative difference (0.01)"}),
            _FACTORY,
            _ARGUMENTS,
        ],
    ),
    "generate": Command(
        generate,
        [
            _FILE,
            (("--tokenizer",), {"required": True, "metavar": "FOLDER", "help": _TOKENIZER}),
            (("--prompt",), {"required": True, "help": "what the text begins with"}),
            (("--tokens",), {"type": int, "default": 64, "help": "at most so many more (default 64)"}),
            (("--temperature",), {"type": float, "default": 0.0, "help": "draw tokens; 0 takes the likeliest (default)"}),
            (("--seed",), {"type": int, "default": 0, "help": "of the draws"}),
            (("--threads",), {"type": int, "default": 1, "help": "of torch (default 1)"}),
            _FACTORY,
            _ARGUMENTS,
        ],
    ),
}
"""Name -> command."""
