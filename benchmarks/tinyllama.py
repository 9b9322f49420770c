"""Does llama.cpp compute what fqt trained? A small Llama, trained in low bits here, as transformers and as llama.cpp run it.

    python -m benchmarks.tinyllama TEXT [--steps 300] [--json F] [--folder runs/tinyllama]
    python -m benchmarks.tinyllama TEXT --quick      a few steps of a tiny model; a smoke test, not evidence

For each recipe a LlamaForCausalLM over a byte-level BPE of the text is trained, every layer of its blocks converted, then
exported to GGUF, and the same held-out text is read by both: perplexity, the share of positions at which both would go on with
the same token, and for how many tokens greedy continuations of the same prompts agree. "bitnet" has ternary weights (TQ2_0),
"signs" those of signs with a scale for each output channel (Q1_0); both take 8-bit activations by token.

Where `llama_cpp` cannot be imported, or cannot read a file, the file's dequantized weights are run in a float model instead,
which rounds no activation; the table says which. llama.cpp itself rounds activations to 8 bits in blocks of 256 (TQ2_0) or 32
(Q1_0) channels where the model has one scale a token, and keeps its cache of keys and values in half precision: differences of
that size are the runtime's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, rms_norm, scaled_dot_product_attention, silu

import fqt
from benchmarks.common import table, write_json
from benchmarks.step_models import recipe_of

LENGTH = 128
Logits = Callable[[Tensor], Tensor]
"""Of a runtime: numbers of tokens (T,) to logits (T, tokens)."""


@dataclass(frozen=True)
class Size:
    """Of a model and of its training."""

    tokens: int
    width: int
    blocks: int
    steps: int
    batch: int


def tokenizer_of(text: str, tokens: int) -> Any:
    """A byte-level BPE of a text, as a fast tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"], show_progress=False
    )
    made.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>")


def model_of(size: Size) -> Any:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.tokens, hidden_size=size.width, intermediate_size=3 * size.width, num_hidden_layers=size.blocks,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2 * LENGTH, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: Any, text: Tensor, size: Size) -> float:
    """AdamW with one-cycle rates over random stretches; the last steps' mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=size.steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(size.steps):
        starts = torch.randint(len(text) - LENGTH - 1, (size.batch,), generator=generator)
        stretches = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        logits = model(input_ids=stretches[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print(f"  step {step + 1}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    return sum(losses[-20:]) / len(losses[-20:])


# --- runtimes ----------------------------------------------------------------------------------------------------------------


def by_transformers(model: Any) -> Logits:
    """transformers, with the converted layers."""

    @torch.no_grad()
    def logits(tokens_T: Tensor) -> Tensor:
        return model(input_ids=tokens_T.unsqueeze(0), use_cache=False).logits[0]

    return logits


def by_llama_cpp(path: Path) -> Logits:
    """llama.cpp. ValueError where it cannot read the file."""
    from llama_cpp import Llama

    runtime = Llama(str(path), n_ctx=2 * LENGTH, n_batch=2 * LENGTH, logits_all=True, n_threads=1, verbose=False)

    def logits(tokens_T: Tensor) -> Tensor:
        runtime.reset()
        runtime.eval(tokens_T.tolist())
        return torch.from_numpy(np.array(runtime.scores[: len(tokens_T)]))

    return logits


class FloatLlama:
    """A GGUF file of architecture "llama" in float32, computed as llama.cpp's graph does: no activation is rounded.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.weights = {tensor.name: torch.from_numpy(np.array(dequantized(tensor), np.float32)) for tensor in reader.tensors}
        self.known: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.heads, self.groups = self.known["llama.attention.head_count"], self.known["llama.attention.head_count_kv"]
        self.eps = self.known["llama.attention.layer_norm_rms_epsilon"]

    def __call__(self, tokens_T: Tensor) -> Tensor:
        x_TC = self.weights["token_embd.weight"][tokens_T]
        for block in range(self.known["llama.block_count"]):
            x_TC = x_TC + self._attention(self._normal(x_TC, f"blk.{block}.attn_norm"), f"blk.{block}.attn")
            y_TC = self._normal(x_TC, f"blk.{block}.ffn_norm")
            up, gate = (self._linear(y_TC, f"blk.{block}.ffn_{name}") for name in ("up", "gate"))
            x_TC = x_TC + self._linear(silu(gate) * up, f"blk.{block}.ffn_down")
        head = "output" if "output.weight" in self.weights else "token_embd"
        return self._linear(self._normal(x_TC, "output_norm"), head)

    def _linear(self, x_TC: Tensor, name: str) -> Tensor:
        return linear(x_TC, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _normal(self, x_TC: Tensor, name: str) -> Tensor:
        return rms_norm(x_TC, x_TC.shape[-1:], self.weights[f"{name}.weight"], self.eps)

    def _attention(self, x_TC: Tensor, name: str) -> Tensor:
        q, k, v = (
            self._linear(x_TC, f"{name}_{letter}").unflatten(1, (heads, -1)).transpose(0, 1)
            for letter, heads in (("q", self.heads), ("k", self.groups), ("v", self.groups))
        )
        y_HTD = scaled_dot_product_attention(
            self._turned(q).unsqueeze(0), self._turned(k).unsqueeze(0), v.unsqueeze(0), is_causal=True, enable_gqa=True
        )[0]
        return self._linear(y_HTD.transpose(0, 1).flatten(1), f"{name}_output")

    def _turned(self, x_HTD: Tensor) -> Tensor:
        """Rotary embedding of neighbouring channels."""
        steps = torch.arange(0, x_HTD.shape[2], 2) / x_HTD.shape[2]
        slower = self.weights.get("rope_freqs.weight", torch.ones(len(steps)))
        angles_TP = torch.arange(x_HTD.shape[1]).unsqueeze(1) / (self.known["llama.rope.freq_base"] ** steps * slower)
        pairs = torch.view_as_complex(x_HTD.unflatten(2, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles_TP), angles_TP)).flatten(2)


def dequantized(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor's values; of Q1_0 by its description, since the package gguf 0.19 knows its size alone."""
    if tensor.tensor_type.name != "Q1_0":
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    blocks = tensor.data.reshape(-1, 18)
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return (signs * scales).reshape(tensor.data.shape[0], -1)


# --- comparing ---------------------------------------------------------------------------------------------------------------


def compare(ours: Logits, theirs: Logits, windows: Sequence[Tensor], *, prompt: int, more: int) -> dict[str, float]:
    """Perplexities, agreements and the largest difference of logits over held-out windows of LENGTH + 1 tokens.

    Args:
        prompt, more: tokens of each prompt, and of its greedy continuation.
    """
    losses, same, largest, agreed = [0.0, 0.0], 0, 0.0, []
    for window in windows:
        both = [runtime(window[:-1]) for runtime in (ours, theirs)]
        for side, logits in enumerate(both):
            losses[side] += float(cross_entropy(logits, window[1:], reduction="sum"))
        same += int((both[0].argmax(1) == both[1].argmax(1)).sum())
        largest = max(largest, float((both[0] - both[1]).abs().max()))
        ends = [continued(runtime, window[:prompt], more) for runtime in (ours, theirs)]
        equal = (ends[0] == ends[1]).int()
        agreed.append(int(equal.cumprod(0).sum()))
    count = len(windows) * LENGTH
    perplexity, their_perplexity = (math.exp(loss / count) for loss in losses)
    return {
        "perplexity": perplexity, "their_perplexity": their_perplexity, "difference": their_perplexity / perplexity - 1,
        "same_token": same / count, "same_continuation": sum(agreed) / len(agreed), "of": more,
        "largest_logit_difference": largest,
    }  # fmt: skip


def continued(runtime: Logits, prompt: Tensor, more: int) -> Tensor:
    """The greedy continuation of a prompt, (more,)."""
    tokens = prompt
    for _ in range(more):
        tokens = torch.cat([tokens, runtime(tokens)[-1].argmax().view(1)])
    return tokens[len(prompt) :]


def measure(text: Path, name: str, size: Size, folder: Path, *, windows: int, prompt: int, more: int) -> dict[str, object]:
    """Train, export and compare one recipe: a row."""
    torch.manual_seed(0)
    whole = text.read_text()
    cut = int(0.9 * len(whole))
    tokenizer = tokenizer_of(whole[:cut], size.tokens)
    learned, held_out = (torch.tensor(tokenizer(part)["input_ids"]) for part in (whole[:cut], whole[cut:]))
    model = model_of(size)
    fqt.convert(model, recipe_of(name), skip="lm_head")
    loss = train(model.train(), learned, size)
    model.eval()
    result = fqt.export(model, folder / f"{name}.gguf", tokenizer=tokenizer)
    print(result)
    starts = torch.linspace(0, len(held_out) - LENGTH - 2, windows).long()
    stretches = [held_out[start : start + LENGTH + 1] for start in starts]
    runtime, theirs = "float model of the dequantized weights", None
    if importlib.util.find_spec("llama_cpp") is not None:
        try:
            theirs, runtime = by_llama_cpp(result.path), "llama.cpp"
        except ValueError as error:
            print(f"llama.cpp does not read {result.path}: {error}")
    found = compare(by_transformers(model), theirs or FloatLlama(result.path), stretches, prompt=prompt, more=more)
    parameters = sum(p.numel() for p in model.parameters())
    return {"recipe": name, "runtime": runtime, **found, "loss": loss, "bytes": result.nbytes, "parameters": parameters,
            "steps": size.steps, "types": result.measured["tensors"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="any text file, of a million characters or so")
    parser.add_argument("--recipes", nargs="+", default=["bitnet", "signs"], help='built-in recipes, or "signs"')
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="three steps of a tiny model: no evidence")
    parser.add_argument("--folder", type=Path, default=Path("runs/tinyllama"), help="where the GGUF files are written")
    parser.add_argument("--json", type=Path, help="write the table's rows here")
    args = parser.parse_args()
    logging.getLogger("fqt").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    size = Size(tokens=512, width=256, blocks=3, steps=args.steps, batch=8)
    windows, prompt, more = 32, 32, 32
    if args.quick:
        size, windows, prompt, more = Size(tokens=300, width=256, blocks=1, steps=3, batch=2), 2, 4, 4
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = [measure(args.text, name, size, args.folder, windows=windows, prompt=prompt, more=more) for name in args.recipes]
    print(
        table(
            ["recipe", "other runtime", "perplexity", "there", "difference", "same token", "same continuation", "MB",
             "float32, MB"],
            [
                [row["recipe"], row["runtime"], f"{row['perplexity']:.3f}", f"{row['their_perplexity']:.3f}",
                 f"{row['difference']:+.2%}", f"{row['same_token']:.1%}", f"{row['same_continuation']:.1f} of {row['of']}",
                 f"{row['bytes'] / 1e6:.2f}", f"{4 * row['parameters'] / 1e6:.2f}"]
                for row in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
