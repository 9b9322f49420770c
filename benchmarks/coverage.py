"""Which models can be converted, and how much of them is?

    python -m benchmarks.coverage [--only timm resnet18 ...] [--recipes int8 fqt_1bit] [--limit 600] [--json F] [--quick]

Takes the smallest model of many families: of timm, of torchvision (classification, segmentation, detection, video), and of
transformers from tiny configurations, with random weights. Each is converted with `example=`, trained for one step, reverted.
A row is ok if every parameter that had a gradient in float has a finite one, the state dict of the converted model has the
names of the plain one and loads back into it, and the reverted model has its classes and gives its output bit for bit. The
share is that of a float forward's multiply-adds which no float product computes in a forward of the converted model; "of
layers" leaves out the products of two activations (attention), which no layer holds and which weigh much in tiny models.

Rows are written as they come; models that the file has already are not tried again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import signal
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fqt
from benchmarks.common import table, write_json
from fqt.inspect.flow import float_multiply_adds, flow_of
from fqt.inspect.trial import feed

RECIPES = ("int8", "fqt_1bit")
QUICK = ("resnet10t", "mobilenetv3_small_050", "test_vit", "resnet18", "r3d_18", "bert", "gpt2", "llama")

TIMM = """
    beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny convnext_atto
    convnextv2_atto crossvit_9_240 cs3darknet_focus_s davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla46_c
    dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_slim eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 fbnetc_100 focalnet_tiny_srf
    gcvit_xxtiny gernet_s ghostnet_050 ghostnetv2_100 gmlp_ti16_224 halonet26t hardcorenas_a hgnetv2_b0
    hrnet_w18_small inception_next_atto lambda_resnet26t lcnet_035 legacy_seresnet18 levit_128s lowformer_b0
    mambaout_femto maxvit_pico_rw_256 mixer_s32_224 mnasnet_small mobilenetv2_035 mobilenetv3_small_050
    mobilenetv4_conv_small_035 mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nf_regnet_b0
    pit_ti_224 poolformer_s12 pvt_v2_b0 regnetx_002 regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s
    resmlp_12_224 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 sequencer2d_s shvit_s1 skresnet18
    starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 swinv2_tiny_window8_256
    test_byobnet test_nfnet test_vit tf_efficientnet_b0 tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 tresnet_m
    twins_svt_small vgg11 visformer_tiny vit_tiny_patch16_224 xception41 xcit_nano_12_p16_224
"""

CLASSIFY = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5
    squeezenet1_0 swin_t swin_v2_t vgg11 vit_b_32 wide_resnet50_2
"""
SEGMENT = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECT = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
VIDEO = ("mc3_18", "mvit_v1_b", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
}  # fmt: skip
_WORDS = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_IMAGES = {key: value for key, value in _SIZES.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
_EXPERTS = _SIZES | {"num_key_value_heads": 1, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 64}
# name -> class of the model, options of its configuration, kind of input
TRANSFORMERS: dict[str, tuple[str, dict, str]] = {
    "bart": ("BartForConditionalGeneration", _BART, "seq2seq"),
    "bert": ("BertForSequenceClassification", _SIZES, "text"),
    "clip": ("CLIPModel", {"text_config": _SIZES, "vision_config": _IMAGES, "projection_dim": 16}, "text and image"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 99},
        "text",
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99}, "text"),
    "gpt_neox": ("GPTNeoXForCausalLM", _SIZES, "text"),
    "llama": ("LlamaForCausalLM", _SIZES, "text"),
    "mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 99}, "text"),
    "mistral": ("MistralForCausalLM", _SIZES | {"num_key_value_heads": 1}, "text"),
    "mixtral": ("MixtralForCausalLM", _EXPERTS, "text"),
    "qwen2": ("Qwen2ForCausalLM", _SIZES | {"num_key_value_heads": 1}, "text"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _EXPERTS | {"shared_expert_intermediate_size": 64}, "text"),
    "roberta": ("RobertaForSequenceClassification", _SIZES | {"pad_token_id": 1}, "text"),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        "image",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 99},
        "seq2seq",
    ),
    "vit": ("ViTForImageClassification", _IMAGES, "image"),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        _SIZES | {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0},
        "sound",
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        _BART | _WORDS | {"num_mel_bins": 8, "max_source_positions": 30},
        "spectrum",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model: `make` gives it and an input for `fqt.convert(example=)`."""

    group: str
    name: str
    make: Callable[[], tuple[nn.Module, object]]


def cases() -> Iterator[Case]:
    """Of all packages that are installed here."""
    try:
        import timm

        for name in filter(timm.is_model, TIMM.split()):
            yield Case("timm", name, lambda name=name: _timm(name))
    except ImportError:
        print("timm is not installed: its families are left out")
    try:
        import torchvision  # noqa: F401

        for group, names in (("classify", CLASSIFY.split()), ("segment", SEGMENT), ("detect", DETECT), ("video", VIDEO)):
            for name in names:
                yield Case(f"torchvision {group}", name, lambda name=name, group=group: _torchvision(name, group))
    except ImportError:
        print("torchvision is not installed: its models are left out")
    try:
        import transformers  # noqa: F401

        for name in TRANSFORMERS:
            yield Case("transformers", name, lambda name=name: _transformers(name))
    except ImportError:
        print("transformers is not installed: its models are left out")


def _timm(name: str) -> tuple[nn.Module, object]:
    import timm

    model = timm.create_model(name, num_classes=10)
    config = model.pretrained_cfg
    size = config["input_size"][-1] if config.get("fixed_input_size") else max(128, (config.get("min_input_size") or (0,))[-1])
    return model, torch.randn(2, 3, size, size)


def _torchvision(name: str, group: str) -> tuple[nn.Module, object]:
    import torchvision

    options = {"weights": None}
    if group in ("segment", "detect"):
        options["weights_backbone"] = None
    if group == "video":
        size = 224 if name.startswith(("mvit", "s3d")) else 64
        frames = 16 if name.startswith(("mvit", "s3d")) else 4
        return torchvision.models.get_model(name, num_classes=10, **options), torch.randn(2, 3, frames, size, size)
    model = torchvision.models.get_model(name, num_classes=10, **options)
    if group == "detect":
        target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 80.0]]), "labels": torch.tensor([3])}
        if "mask" in name:
            target["masks"] = torch.ones(1, 96, 96, dtype=torch.uint8)
        return model, ([torch.rand(3, 96, 96) for _ in range(2)], [copy.deepcopy(target) for _ in range(2)])
    fixed = 224 if name in ("maxvit_t", "vit_b_32") else 299 if name == "inception_v3" else 96
    return model, torch.randn(2, 3, fixed, fixed)


def _transformers(name: str) -> tuple[nn.Module, object]:
    import transformers

    kind, options, inputs = TRANSFORMERS[name]
    made = getattr(transformers, kind)
    model = made(made.config_class(**options))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    words, pixels = torch.randint(3, 90, (2, 12)), torch.randn(2, 3, 32, 32)
    return model, {
        "text": {"input_ids": words},
        "seq2seq": {"input_ids": words, "decoder_input_ids": words},
        "image": {"pixel_values": pixels},
        "text and image": {"input_ids": words, "pixel_values": pixels},
        "sound": {"input_values": torch.randn(2, 400)},
        "spectrum": {"input_features": torch.randn(2, 8, 60), "decoder_input_ids": words},
    }[inputs]


def loss_of(output: object) -> Tensor:
    """A number that every float output has a part in."""
    floats = [
        leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
    ]
    return torch.stack([leaf.float().square().mean() for leaf in floats]).sum()


def evaluated(model: nn.Module, example: object) -> list[Tensor]:
    """The float tensors of an evaluation, as far as an evaluation takes the example's arguments."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        found = [leaf for leaf in tree_leaves(feed(model, example)) if isinstance(leaf, Tensor)]
    for name, module in model.named_modules():
        module.training = training[name]
    return found


def check(model: nn.Module, example: object, recipe: str) -> tuple[float, float]:
    """The share that is converted, of all multiply-adds and of the layers'. AssertionError, or whatever the model raises, where
    something is not as it should be."""
    kinds, keys = [type(module) for module in model.modules()], list(model.state_dict())
    plain, before = copy.deepcopy(model), evaluated(copy.deepcopy(model), example)
    flow = flow_of(model, example)
    torch.manual_seed(0)
    loss_of(feed(plain, example)).backward()
    fqt.convert(model, recipe, example=example)
    torch.manual_seed(0)
    loss_of(feed(model, example)).backward()
    for (name, wanted), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        if wanted.grad is not None and bool(wanted.grad.isfinite().all()):
            assert found.grad is not None, f"no gradient for {name}"
            assert bool(found.grad.isfinite().all()), f"a gradient for {name} that is not finite"
    left = flow.total - float_multiply_adds(model, example)
    shares = left / max(flow.total, 1), min(1.0, left / max(sum(flow.madds.values()), 1))
    assert list(model.state_dict()) == keys, "other names in the state dict"
    trained = model.state_dict()
    plain.load_state_dict(trained, strict=True)
    fqt.revert(model)
    assert [type(module) for module in model.modules()] == kinds, "other classes after revert"
    model.load_state_dict(plain.state_dict(), strict=True)
    again = evaluated(model, example)
    expected = evaluated(plain, example)
    assert len(again) == len(before) and all(map(torch.equal, again, expected)), "another output after revert"
    return shares


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError in the block once it has taken so long, between two operations; 0: as long as it takes."""
    if not seconds:
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(chosen: Iterable[Case], recipes: Iterable[str], path: Path | None = None, limit: float = 0) -> list[dict[str, Any]]:
    """A row for each model and recipe, of `limit` seconds at most; those of the file `path` first."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path and path.exists() else []
    tried = {(row["group"], row["model"], row["recipe"]) for row in rows}
    for case in chosen:
        for recipe in recipes:
            if (case.group, case.name, recipe) in tried:
                continue
            torch.manual_seed(0)
            start, share, of_layers, reason = time.perf_counter(), None, None, ""
            try:
                with warnings.catch_warnings(action="ignore"), within(limit):
                    share, of_layers = check(*case.make(), recipe)
            except Exception as error:  # noqa: BLE001  a miss is a row
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} ({where.name})"[:200]
            rows.append(
                {
                    "group": case.group, "model": case.name, "recipe": recipe, "ok": not reason, "share": share,
                    "of_layers": of_layers, "reason": reason, "seconds": round(time.perf_counter() - start, 1),
                }
            )  # fmt: skip
            print(f"{case.group:22} {case.name:34} {recipe:10} {'ok' if not reason else 'MISS'}", end=" ", flush=True)
            print(f"{share:.0%}, of layers {of_layers:.0%}" if share is not None else reason, flush=True)
            if path:
                write_json(path, rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], help="names of models, or groups: timm, transformers, 'torchvision video'"
    )
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--limit", type=float, default=600, help="seconds that a row may take (600)")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} alone, and the first recipe")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    only = QUICK if args.quick else args.only
    chosen = [case for case in cases() if not only or case.name in only or case.group in only]
    rows = run(chosen, args.recipes[:1] if args.quick else args.recipes, args.json, args.limit)
    summary = []
    for group in dict.fromkeys(row["group"] for row in rows):
        for recipe in dict.fromkeys(row["recipe"] for row in rows):
            those = [row for row in rows if (row["group"], row["recipe"]) == (group, recipe)]
            known = [[row[share] for row in those if row[share] is not None] for share in ("share", "of_layers")]
            middle = [f"{statistics.median(shares):.0%}" if shares else "" for shares in known]
            summary.append([group, recipe, f"{sum(row['ok'] for row in those)} of {len(those)}", *middle])
    print()
    print(table(["group", "recipe", "ok", "median share of multiply-adds", "of layers"], summary))


if __name__ == "__main__":
    main()
