"""Language models and classifiers of texts: what they read, what they learn, and that their runs resume like any other."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.helpers import assert_same, interrupt, trained
from train import pretrained, text
from train.config import Data, parse
from train.decoders import Decoder
from train.loop import run
from train.tasks import TASKS
from train.wording import ConfigError

ROWS = [(f"{word} number {number}", label) for number in range(30) for word, label in (("apple", "fruit"), ("oak", "tree"))]


@pytest.fixture
def files():
    Path("poem.txt").write_text("the cat sat on the mat. " * 60, encoding="utf-8")
    Path("rows.tsv").write_text("".join(f"{line}\t{label}\n" for line, label in ROWS), encoding="utf-8")


@pytest.fixture
def make_text(make, files):
    """A quick language model, with keys overridden; task="classify_text" gives a classifier."""

    def build(task="language_model", **overrides):
        name = "text:poem.txt" if task == "language_model" else "tsv:rows.tsv"
        tree = {
            "task": task,
            "model": {"name": "gpt_small", "blocks": 1, "width": 32, "heads": 2},
            "data": {"name": name, "batch_size": 8, "length": 16, "limit": None},
            "optimizer": {"lr": 1e-2},
        }
        for key, value in overrides.items():
            tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
        return make(**tree)

    return build


def test_stretches_hold_the_text_and_labels_are_the_next_tokens(files):
    data = text.load_text(Data(name="text:poem.txt", length=16), "characters")
    poem = Path("poem.txt").read_text()
    assert (data.classes, data.vocabulary) == (len(set(poem)), "".join(sorted(set(poem))))
    split = data.train
    assert sorted(split.starts.tolist()) == list(range(0, len(poem) * 9 // 10 - 16, 16))
    first = split.starts.tolist().index(16)
    ((x, y),) = split.batches([[first]])
    assert (data.tokens.decode(x[0]), data.tokens.decode(y[0])) == (poem[16:32], poem[17:33])
    assert data.test.starts.min() == 0 and data.tokens.decode(data.test.tokens_T) == poem[len(poem) * 9 // 10 :]


def test_labelled_texts_are_cut_and_padded(files):
    data = text.load_labelled(Data(name="tsv:rows.tsv", length=12), "characters")
    assert (len(data.test), len(data.train), data.classes) == (6, 54, 2)
    ((x, y),) = data.test.batches([[0, 1]])
    assert [data.tokens.decode(row[row != text.PADDING]) for row in x] == ["apple number", "apple number"]
    assert y.tolist() == [0, 0]
    short = text.load_labelled(Data(name="tsv:rows.tsv", length=50), "bytes")
    ((x, _),) = short.train.batches([list(range(54))])
    ends = (x != text.PADDING).sum(1)
    assert ends.min() < ends.max() == x.shape[1]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_tokens_come_back_as_the_text(kind):
    written = "naïve — 12 €\n"
    tokens = text.Characters(written) if kind == "characters" else text.Bytes()
    assert tokens.decode(tokens.encode(written)) == written
    assert int(tokens.encode(written).max()) < tokens.size


def test_a_tokenizers_file_is_read(files):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save("tokenizer.json")
    tokens = text.Pieces("tokenizer.json")
    assert (tokens.size, tokens.encode("the cat the").tolist()) == (3, [0, 1, 0])
    with pytest.raises(ConfigError, match=r"data.tokenizer = rows.tsv: it is no file of the package tokenizers \(expected"):
        text.Pieces("rows.tsv")


@pytest.mark.parametrize("llama", [False, True])
def test_a_decoder_never_sees_what_comes_after(llama):
    torch.manual_seed(0)
    model = Decoder(11, 11, 12, blocks=2, width=32, heads=2, llama=llama)
    x = torch.randint(11, (2, 12))
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 11
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])
    mask = (torch.arange(12) < torch.tensor([[7], [4]])).long()
    torch.testing.assert_close(model(x, mask), model(x)[torch.arange(2), torch.tensor([6, 3])])
    torch.testing.assert_close(model(x, mask), model(torch.where(mask == 1, x, 0), mask), rtol=1e-5, atol=1e-5)


def test_perplexity_is_the_exponential_of_the_mean_loss():
    task, uniform = TASKS["language_model"], torch.nn.Embedding(5, 5)
    torch.nn.init.zeros_(uniform.weight)
    score = task.forward(uniform, torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), autocast=False)
    assert score.items == 6 and task.quality(score.loss.item(), 0, 6) == pytest.approx(5)
    assert task.goodness(3.0) > task.goodness(4.0)
    assert math.isnan(task.quality(0.0, 0, 0))


def test_a_llama_learns(make_text):
    result = run(make_text(model={"name": "llama_small"}, recipe="bitnet", training={"epochs": 2}))
    assert result.test < result.history[0]["test_perplexity"] < len(set("the cat sat on the mat."))
    assert result.modelled_speedup > 1


def test_a_language_model_learns_and_resumes_bit_for_bit(make_text, monkeypatch):
    monkeypatch.setattr("train.tasks.text.SAMPLE", 40)
    tracked = {"tracking": {"enabled": True, "every": 5, "baseline_steps": 1}, "checkpoint": {"enabled": True}}
    config = make_text(recipe="int8", training={"epochs": 2}, data={"validation": 0.2}, **tracked)
    whole = run(config)
    assert whole.test == whole.history[-1]["test_perplexity"] < 9 < len(set("the cat sat on the mat."))
    assert whole.history[-1]["test_perplexity"] < whole.history[0]["test_perplexity"]
    assert math.exp(whole.history[-1]["loss"]) == pytest.approx(whole.history[-1]["train_perplexity"])
    assert whole.modelled_speedup > 1

    interrupt(monkeypatch, config.model_copy(update={"name": "stopped"}), 1)
    resumed = run(config.model_copy(update={"name": "stopped"}), resume=Path("runs/stopped"))
    assert_same(trained(resumed), trained(whole))

    events = EventAccumulator(str(whole.folder), size_guidance={"tensors": 0})
    events.Reload()
    samples = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("text/generated/text_summary")]
    assert len(samples) == 2 and all(len(sample) > 40 for sample in samples)
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"tokens_per_second", "perplexity/valid"} <= {name for line in lines for name in line}
    Path("poem.txt").write_text("the dog sat on the mat. " * 60, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"does not fit this run: vocabulary is .*adeghmnost"):
        run(config, resume=whole.folder)


@pytest.mark.parametrize("model", [{}, {"name": "transformers:bert"}])
def test_a_classifier_of_texts_learns(make_text, model, capsys):
    if model:
        pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        model = {**model, "options": sizes, "blocks": 4, "width": 128, "heads": 4}
    result = run(make_text("classify_text", model=model, recipe="int8", training={"epochs": 4}, quiet=False))
    assert result.test == 1.0
    assert "texts/s" in (out := capsys.readouterr().out) and out.splitlines()[-1] == "test accuracy 100.00 %"


def test_a_pretrained_model_comes_from_its_folder_and_nothing_is_downloaded(make_text, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_CACHE", str(Path("empty").absolute()))
    config = transformers.GPT2Config(vocab_size=20, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained("model")
    made = {"task": "language_model", "tokens": 15, "classes": 15}
    loaded = pretrained.build("model", {}, **made)
    assert torch.equal(loaded.transformer.wte.weight, saved.transformer.wte.weight)
    for name, options, wanted in (
        ("no/such-model", {}, "it is no folder, no kind of model, .*`hf download no/such-model` does"),
        ("bertt", {}, "did you mean bert"),
        ("gpt2", {"n_layers": 1}, "model.options.n_layers: the configuration of gpt2 has no such value; did you mean n_layer"),
        ("model", {"vocab_size": 3}, "it knows 3 tokens, and the text has 15"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            pretrained.build(name, options, **made)
    with pytest.raises(ConfigError, match="model has no tokenizer.json"):
        pretrained.tokenizer_file("model")
    keys = {"name": "transformers:model", "blocks": 4, "width": 128, "heads": 4}
    with pytest.raises(ConfigError, match=r"does not take texts of data.length = 17 tokens .*; lower that"):
        run(make_text(model=keys, data={"length": 17}))


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for model, data, wanted in (
        ({"name": "transformers:bert"}, {}, "model.name = .*transformers is not installed here; pip install 'fqt.text.'"),
        ({"name": "gpt_small"}, {"tokenizer": "own.json"}, "data.tokenizer = .*tokenizers is not installed here; pip install"),
    ):
        with pytest.raises(ConfigError, match=wanted) as error:
            parse({"task": "language_model", "model": model, "data": {"name": "text:poem.txt", **data}})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"data": {"length": 200}}, "data.length = 200: the text of text:poem.txt has 1440 tokens.*more than 2010"),
        ({"data": {"name": "text:nowhere"}}, 'data.name = "text:nowhere": there is no text there'),
        ({"task": "classify_text", "data": {"name": "tsv:poem.txt"}}, "poem.txt, line 1: it should be a text, a tabulator"),
        ({"task": "classify_text", "data": {"name": "tsv:no.tsv"}}, "no.tsv cannot be read .No such file"),
        ({"data": {"name": "text:latin.txt"}}, "latin.txt is no text in UTF-8 .invalid continuation byte at byte 3"),
        ({"data": {"name": "tsv:rows.tsv"}}, "task language_model learns from texts .text:.path..; set task=classify_text"),
        ({"data": {"name": "digits", "length": 128}}, "task language_model learns from texts .*set task=classify,"),
        ({"task": "classify"}, "task classify learns from images; set task=classify_text"),
        ({"model": {"name": "mlp_small", "width": 128, "heads": 4, "blocks": 4}}, "task language_model needs a model of texts"),
        ({"model": {"heads": 3}}, "model.heads = 3: twice the heads should divide model.width, which is 32"),
        ({"data": {"tokenizer": "model"}}, "data.tokenizer = model: gpt_small has none of its own"),
        ({"data": {"augment": "flip"}}, "data.augment = .flip.: it has no effect with data.name text:poem.txt"),
    ],
)
def test_mistakes_are_told(make_text, keys, wanted):
    Path("latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 99)
    with pytest.raises(ConfigError, match=wanted) as error:
        run(make_text(**keys))
    assert "\n" not in str(error.value)
