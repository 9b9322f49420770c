"""A transformers tokenizer as GGUF's metadata: byte-level BPE (llama.cpp's "gpt2") and BPE with byte fallback ("llama").

llama.cpp splits text before it merges by one of the rules that it knows by name; a tokenizer whose rule is none of these is
refused, because it would be read as something else.
"""

from __future__ import annotations

import json
import re
from typing import Any

import gguf

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS: "gpt-2", _MODERN % "{1,3}": "llama-bpe", _MODERN % "": "qwen2"}
"""Pattern by which text is split -> llama.cpp's word for it."""


def describe_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Write vocabulary, merges, special tokens and chat template.

    Args:
        tokenizer: a fast tokenizer of transformers, or None for a file without one.
        config: the model's, whose vocabulary may be larger than the tokenizer's.

    Raises:
        TypeError: the tokenizer is not a fast one.
        ValueError: it is of a kind that llama.cpp does not know, or has more tokens than the model.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}, not a fast tokenizer of transformers")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = parts["model"]
    if bpe["type"] != "BPE":
        raise ValueError(f"the tokenizer is a {bpe['type']}, and a GGUF file is written here of BPE ones: give tokenizer=None")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in bpe["merges"]]
    tokens, kinds = _tokens(tokenizer, config.vocab_size)
    if bpe.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        # llama.cpp merges the pair whose token scores most: the one that was merged first in training
        scores = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(merges)))}
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(_prefixed(parts))
        kinds = [6 if kind == 1 and re.fullmatch("<0x[0-9A-F]{2}>", t) else kind for t, kind in zip(tokens, kinds, strict=True)]
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_of(parts))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _describe_special(writer, tokenizer)


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """The model's `size` tokens, and llama.cpp's kind of each: 1 normal, 2 unknown, 3 control, 4 added by a user, 5 unused."""
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(vocabulary) >= size:
        raise ValueError(
            f"the tokenizer has a token {max(vocabulary)}, the model {size} tokens: give the model's own tokenizer"
        )
    added = {number: 3 if token.special else 4 for number, token in tokenizer.added_tokens_decoder.items()}
    if tokenizer.unk_token_id is not None:
        added[tokenizer.unk_token_id] = 2
    tokens = [vocabulary.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [added.get(number, 1) if number in vocabulary else 5 for number in range(size)]


def _prefixed(parts: dict[str, Any]) -> bool:
    """Whether a space is put before a text; of BPE with byte fallback."""
    normalizers = (parts["normalizer"] or {}).get("normalizers", [parts["normalizer"]])
    if any(part and part["type"] == "Prepend" for part in normalizers):
        return True
    before = parts["pre_tokenizer"] or {}
    return before.get("type") == "Metaspace" and before.get("prepend_scheme", "always") != "never"


def _split_of(parts: dict[str, Any]) -> str:
    """llama.cpp's word for how a byte-level tokenizer splits text."""
    before = parts["pre_tokenizer"] or {}
    chain = before.get("pretokenizers", [before])
    last = chain[-1]
    pattern = None
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(chain) == 1 and last.get("use_regex", True):
            pattern = _WORDS
        elif len(chain) == 2 and chain[0]["type"] == "Split" and not last.get("use_regex", True):
            pattern = chain[0]["pattern"].get("Regex")
    if pattern not in SPLITS:
        raise ValueError(
            f"the tokenizer splits text by {json.dumps(before)}, which is none of llama.cpp's rules that are known here "
            f"({', '.join(SPLITS.values())}): give tokenizer=None and speak to the file in numbers of tokens"
        )
    return SPLITS[pattern]


def _describe_special(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    for word in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{word}_token_id")
        if number is not None:
            getattr(writer, f"add_{word}_token_id")(number)
    around = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and around[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
