"""save and load: what comes back computes the same bits, and a file that is not what it says is refused by name."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import resource
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import fqt
from fqt import container, files
from tests.fqt.frozen_cases import FORWARDS, RECIPES, Convolutions, Linears, Mixed, chain, everywhere, same, trained
from tests.fqt.helpers import case_seeds, fits_convolutions, random_case

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def saved(model: nn.Module, path: Path, x: Tensor) -> Tensor:
    """Save; the model's output in evaluation."""
    fqt.save(model, path)
    with torch.no_grad():
        return model.eval()(x)


# --- there and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.every(3)
def test_what_comes_back_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    cases: list[tuple[type[nn.Module], Tensor]] = [(Linears, torch.randint(11, (3, 5)))]
    if fits_convolutions(fqt.load_recipe(name)):
        cases.append((Convolutions, torch.randn(3, 4, 9, 8)))
    for make, x in cases:
        model = trained(fqt.convert(make(), everywhere(name), example=x), x)
        y = saved(model, tmp_path / "m.safetensors", x)
        given = make()
        before = {key: value.clone() for key, value in given.state_dict().items()}
        loaded = fqt.load(tmp_path / "m.safetensors", given)
        assert same(loaded(x), y)
        assert all(torch.equal(value, before[key]) for key, value in given.state_dict().items()), "it is left as it is"
        assert same(fqt.load(tmp_path / "m.safetensors", make().to("meta"))(x), y)
        frozen = fqt.freeze(model)
        assert loaded.state_dict().keys() == frozen.state_dict().keys() and str(loaded) == str(frozen)


@pytest.mark.parametrize("recipe", FORWARDS.values(), ids=FORWARDS)
def test_stages_come_back_and_training_goes_on_from_their_codes(recipe: Callable[[], fqt.Recipe], tmp_path: Path) -> None:
    x = torch.randn(3, 4, 5, 5)
    model = trained(fqt.convert(Mixed(), recipe()), x)
    y = saved(model, tmp_path / "m.safetensors", x)
    assert same(fqt.load(tmp_path / "m.safetensors", Mixed())(x), y)
    if model.conv.recipe.output.transform:
        with pytest.raises(
            ValueError, match=r"layer 'conv' was packed after hadamard\(size=4\), from which no weight comes back"
        ):
            fqt.load(tmp_path / "m.safetensors", Mixed(), trainable=True)
        return
    again = fqt.load(tmp_path / "m.safetensors", Mixed(), trainable=True)
    assert again.state_dict().keys() == model.state_dict().keys() and again.training
    torch.testing.assert_close(again.eval()(x), y, rtol=1e-4, atol=1e-5)
    again.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    assert type(fqt.revert(again).linear) is nn.Linear


@pytest.mark.parametrize("name", ["fqt_1bit", "int8", "dorefa_w1a2g6", "dorefa_w8a8g8", "bitnet", "psq_b4"])
def test_training_goes_on_from_codes_and_says_what_it_lost(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randint(11, (3, 5))
    model = trained(fqt.convert(Linears(), everywhere(name), example=x), x)
    y = saved(model, tmp_path / "m.safetensors", x)
    again = fqt.load(tmp_path / "m.safetensors", Linears(), trainable=True)
    assert "(0 of 600 codes would be others now). Lost: what their weights were between the codes" in caplog.text
    torch.testing.assert_close(again.eval()(x), y, rtol=1e-3, atol=1e-4)
    assert again.flat.weight is again.twin.weight and again.head.weight is again.embed.weight
    assert torch.equal(again.head.weight, model.head.weight), "a float weight that the file holds, under another name"
    assert [layer.recipe.grad_input for _, layer in fqt.quantized_layers(again)] == [everywhere(name).grad_input] * 7
    trained(again.train(), x)


def test_a_factory_builds_where_asked(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=30,
        tie_word_embeddings=True,
    )
    model, x = transformers.LlamaForCausalLM(config), torch.randint(30, (2, 6))
    fqt.convert(model, "bitnet")
    path = tmp_path / "m.safetensors"
    fqt.save(model, path, factory="transformers:LlamaForCausalLM", arguments=config.to_diff_dict())
    with pytest.raises(ValueError, match=r"load takes the architecture, fqt.load\(path, model\), or factory=True"):
        fqt.load(path)
    with torch.no_grad():
        assert same(fqt.load(path, factory=True)(x).logits, model.eval()(x).logits)
    fqt.save(model, path)
    with pytest.raises(ValueError, match="records no factory: give an instance of LlamaForCausalLM"):
        fqt.load(path, factory=True)


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("os:system", {}, "the factory 'os:system' is none of torchvision:MODEL"),
        (
            "torchvision:resnet18",
            {"weights": "DEFAULT"},
            "argument 'weights' of factory 'torchvision:resnet18' would read a file",
        ),
        ("timm:resnet18", {"checkpoint_path": "x"}, "argument 'checkpoint_path' of factory"),
        ("torchvision:resnet18", {"num_classes": {1}}, "not plain values that JSON holds"),
        (None, {"num_classes": 3}, "the factory 'None' is none of"),
    ],
)
def test_what_is_no_factory_is_refused(factory: str, arguments: dict, message: str, tmp_path: Path) -> None:
    model = fqt.convert(nn.Linear(3, 2), everywhere("int8"))
    with pytest.raises(ValueError, match=message):
        fqt.save(model, tmp_path / "m", factory=factory, arguments=arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["torchvision:resnet19", "timm:resnet19x", "transformers:Trainer"])
def test_a_factory_that_a_package_has_not(name: str) -> None:
    from fqt import factories

    with pytest.raises(ValueError, match=f"has no model.* '{name.partition(':')[2]}'"):
        factories.build({"name": name, "arguments": {}})


# --- writing --------------------------------------------------------------------------------------------------------------


def test_a_full_disk_or_a_folder_that_may_not_be_written_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = fqt.convert(nn.Linear(3, 2), everywhere("int8")), tmp_path / "m.safetensors"
    fqt.save(model, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"m.safetensors could not be written \(No space left on device\); what stood there is whole"
    ):
        fqt.save(model, path)
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(PermissionError, match="Permission denied"):
        fqt.save(model, path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.safetensors"]


def test_readers_find_one_file_or_the_other_while_it_is_written(tmp_path: Path) -> None:
    path, x = tmp_path / "m.safetensors", torch.randn(2, 6)
    models = [fqt.convert(nn.Linear(6, 4), everywhere("int8")) for _ in range(2)]
    expected = [saved(model, path, x) for model in models]
    with ThreadPoolExecutor(4) as pool:
        writing = pool.submit(lambda: [fqt.save(models[i % 2], path) for i in range(8)])
        outputs = list(pool.map(lambda _: fqt.load(path, nn.Linear(6, 4))(x), range(16)))
        writing.result()
    assert all(any(same(y, other) for other in expected) for y in outputs)


def test_a_state_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    model = fqt.convert(nn.Sequential(nn.Linear(3, 3), Extra(3, 3)), everywhere("int8"))
    with pytest.raises(ValueError, match="'1._extra_state' of the model's state is a dict, no tensor"):
        fqt.save(model, tmp_path / "m")


def test_strides_and_ties_and_a_compiled_model(tmp_path: Path) -> None:
    model = fqt.convert(chain(), "fqt_1bit").to(memory_format=torch.channels_last)
    model[10].weight = nn.Parameter(torch.randn(9, 5).t())
    x = torch.randn(2, 3, 12, 12)
    fqt.save(torch.compile(model), tmp_path / "m")
    # torch sums a float convolution in another order if the strides of its weight differ, so this compares the strides too.
    with torch.no_grad():
        torch.testing.assert_close(fqt.load(tmp_path / "m", chain())(x), model.eval()(x))
    model = fqt.convert(Linears(), everywhere("xnor"))
    fqt.save(model, tmp_path / "m")
    with safe_open(tmp_path / "m", "pt") as file:
        assert "flat.packed.0.codes" in file.keys() and "twin.packed.0.codes" not in file.keys()  # noqa: SIM118
    loaded = fqt.load(tmp_path / "m", Linears())
    assert loaded.flat.packed[0].codes.data_ptr() == loaded.twin.packed[0].codes.data_ptr()


# --- what does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)),
            "its layer '1' has weights int8:O of \\(4, 5\\), this one needs",
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 5), nn.Conv2d(5, 4, 1)),
            "its layer '1' is a torch.nn.modules.linear.Linear, this one a",
        ),
        (lambda: nn.Sequential(nn.Linear(6, 5)), "it has a module '1', this one has not"),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.LayerNorm(4)), "tensor '2.bias' is in this one alone"),
        (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)), "tensor '1.bias' is in the file alone"),
        (
            lambda: fqt.convert(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), everywhere("int8")),
            "this Sequential is converted: give the",
        ),
    ],
)
def test_another_architecture_is_refused(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    fqt.save(fqt.convert(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), everywhere("int8")), tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        fqt.load(tmp_path / "m", make())


def test_a_backend_is_named_or_refused(tmp_path: Path) -> None:
    fqt.save(fqt.convert(nn.Linear(6, 5), everywhere("int8")), tmp_path / "m")
    assert fqt.load(tmp_path / "m", nn.Linear(6, 5), backend="reference").backend == "reference"
    with pytest.raises(ValueError, match="backend 'triton' does not serve"):
        fqt.load(tmp_path / "m", nn.Linear(6, 5), backend="triton")


def test_a_buffer_that_no_file_holds_needs_a_real_architecture(tmp_path: Path) -> None:
    class Shifted(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 2))
            self.register_buffer("shift", torch.ones(2), persistent=False)

    fqt.save(fqt.convert(Shifted(), everywhere("int8")), tmp_path / "m")
    assert torch.equal(fqt.load(tmp_path / "m", Shifted()).shift, torch.ones(2))
    with pytest.raises(ValueError, match="buffer 'shift' is in no state dict"):
        fqt.load(tmp_path / "m", Shifted().to("meta"))


# --- damaged and lying files ----------------------------------------------------------------------------------------------


def architecture() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Tensor]]:
    """A small file, and what it holds."""
    torch.manual_seed(0)
    model = fqt.convert(architecture(), everywhere("fqt_1bit"))
    path = tmp_path_factory.mktemp("whole") / "m"
    fqt.save(model, path)
    return path.read_bytes(), fqt.load(path, architecture()).state_dict()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes exchanged or cut, numbers and words of the header changed, all without new checksums."""
    changed = bytearray(data)
    header = int.from_bytes(data[:8], "little")
    kind = rng.randrange(6)
    if kind == 0:
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        changed[rng.randrange(8 + header)] = rng.randrange(256)
    elif kind == 2:
        del changed[rng.randrange(len(data)) :]
    elif kind == 3:
        start = rng.randrange(len(data))
        changed[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
    elif kind == 4:
        changed[:8] = rng.choice([0, 1, header - 1, header + 1, len(data), 1 << 40, (1 << 64) - 1]).to_bytes(8, "little")
    else:
        digits = [i for i in range(8, 8 + header) if 48 <= data[i] < 58]
        for place in rng.sample(digits, rng.randrange(1, 4)):
            changed[place] = rng.randrange(48, 58)
    return bytes(changed)


def lying(data: bytes, rng: random.Random) -> bytes:
    """The JSON changed at one place, and its checksum made anew: it says what cannot be, or something else."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    contents = json.loads(header["__metadata__"]["fqt"])
    places: list[tuple[object, object]] = []

    def walk(node: object) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])  # type: ignore[index]

    walk(contents)
    node, key = rng.choice(places)
    values = [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        10**30,
        0.5,
        float("nan"),
        "",
        "x",
        "sign",
        "uint8+:N",
        "float64",
        "Softmax",
        [],
        {},
    ]
    values += [
        [[]],
        [1, 2, 3, 4],
        {"a": 1},
        [2**40, 2**40],
        "Module",
        "Linear",
        "hadamard",
        {"hadamard": {}},
        "int4:O",
        "sign:O/8",
    ]
    if rng.randrange(4):
        node[key] = rng.choice(values)  # type: ignore[index]
    else:
        del node[key]  # type: ignore[attr-defined]
    text = json.dumps(contents)
    header["__metadata__"] = {"fqt": text, "fqt_crc32": str(zlib.crc32(text.encode()))}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(("change", "count"), [(damaged, 1400), (lying, 600)])
def test_2000_damaged_and_lying_files_are_refused(
    change: Callable[[bytes, random.Random], bytes],
    count: int,
    whole: tuple[bytes, dict[str, Tensor]],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    data, state = whole
    path, refused, empty = tmp_path / "m", 0, architecture().to("meta")
    before = _memory()
    seeds = case_seeds(rng, count)
    for seed in seeds:
        with random_case(seed) as (draw, _):
            path.write_bytes(change(data, draw))
            try:
                loaded = fqt.load(path, empty)
            except ValueError:
                refused += 1
                continue
            for name, tensor in loaded.state_dict().items():
                assert torch.equal(tensor, state[name]), f"{name} is another"
    assert refused > 0.8 * len(seeds) and _memory() - before < 100 << 20


def rewritten(data: bytes, change: Callable[[dict, dict], None]) -> bytes:
    """The file with other tensors and JSON, well-formed, the checksums made anew."""
    length = int.from_bytes(data[:8], "little")
    contents = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fqt"])
    from safetensors.torch import load

    tensors = load(data)
    change(contents, tensors)
    contents["checksums"] = {name: container.checksum(name, tensor) for name, tensor in tensors.items()}
    text = json.dumps(contents)
    return to_bytes(tensors, {"fqt": text, "fqt_crc32": str(zlib.crc32(text.encode()))})


def _set(*path: object) -> Callable[[dict, dict], None]:
    *keys, last, value = path

    def change(contents: dict, _: dict) -> None:
        node = contents
        for key in keys:
            node = node[key]
        node[last] = value

    return change


def _tensor(name: str, tensor: Tensor) -> Callable[[dict, dict], None]:
    return lambda _, tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("version", 2), "its format has version 2, and this fqt reads version 1"),
        (_set("layers", "3", 3, 0, 0, "sing:O"), "layer '3': 'sing:O' is not a format name"),
        (_set("layers", "3", 3, 0, 0, "int4:O"), "tensor '3.packed.0.codes' is U8 of shape .*int4:O of .* needs U8 of shape"),
        (_set("layers", "3", 3, 0, 1, [5, 1 << 39, 3, 3]), "tensor '3.packed.0.codes' is U8"),
        (_set("layers", "3", 3, 0, 1, [5, -4, 3, 3]), "a weight of layer '3' has sizes"),
        (_set("layers", "3", 1, 7), "layer '3' follows recipe 7 of 1"),
        (_set("layers", "3", 0, "os.system"), "its layer '3' is a os.system, this one a torch.nn.modules.conv.Conv2d"),
        (_set("recipes", 0, "output", 1, "bits", 9), r"recipes\[0\] is no recipe"),
        (_set("recipes", 0, "output", 1, "grid", []), r"recipes\[0\] is no recipe"),
        (_set("exchanged", "2", "Module"), "does not fit this Sequential: 'Module' is no module of torch.nn"),
        (_set("exchanged", "2", "Bilinear"), "cannot make a Bilinear"),
        (_set("tied", "5.bias", "nothing"), "tensor '5.bias' is tied to 'nothing', which is not stored"),
        (
            _tensor("0.bias", torch.zeros(1 << 10)),
            r"its tensor '0.bias' is F32 of \(1024,\), this one's torch.float32 of \(4,\)",
        ),
        (_tensor("0.bias", torch.zeros(4, dtype=torch.int64)), "its tensor '0.bias' is I64"),
        (_tensor("3.packed.0.scale", torch.zeros(5).half()), "tensor '3.packed.0.scale' is F16"),
        (_tensor("more", torch.zeros(1)), "tensor 'more' is in the file alone"),
        (lambda contents, tensors: tensors.pop("0.bias"), "tensor '0.bias' is in this one alone"),
    ],
)
def test_what_a_file_cannot_mean_is_named(
    change: Callable[[dict, dict], None], message: str, whole: tuple[bytes, dict[str, Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "m").write_bytes(rewritten(whole[0], change))
    with pytest.raises(ValueError, match=message):
        fqt.load(tmp_path / "m", architecture())


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with pytest.raises(FileNotFoundError, match="is not there, or is no file: give one that fqt.save wrote"):
        fqt.load(path, nn.Linear(2, 2))
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        fqt.load(path, nn.Linear(2, 2))
    path.unlink()
    path.write_bytes(to_bytes({"weight": torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match="it is a safetensors file, but none of fqt.save"):
        fqt.load(path, nn.Linear(2, 2))
    torch.save(copy.deepcopy(nn.Linear(2, 2)).state_dict(), path)
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        fqt.load(path, nn.Linear(2, 2))
