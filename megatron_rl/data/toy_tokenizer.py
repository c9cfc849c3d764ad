"""A tokenizer made on the spot, for toy models: a token for each byte, and one for each role of a conversation.

Any text survives it. Nothing is learned and nothing is downloaded: the files follow from this page, in the form that
transformers and SGLang read. A small vocabulary and prompts of few tokens are what lets a toy model learn in seconds.
"""

import json
from pathlib import Path
from typing import Any

PAD, END = 0, 5
SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|reserved-1|>", "<|reserved-2|>")
SIZE = len(SPECIAL) + 256
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_token(byte: int) -> int:
    """The token of a byte."""
    return len(SPECIAL) + byte


def write_toy_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a folder that exists."""
    vocabulary = {text: token for token, text in enumerate(SPECIAL)}
    vocabulary |= {character: byte_token(byte) for byte, character in enumerate(_byte_characters())}
    bytes_to_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(token, text) for token, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": bytes_to_text,
        "post_processor": None,
        "decoder": bytes_to_text,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _special(token: int, text: str) -> dict[str, Any]:
    same = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": text, **same}


def _byte_characters() -> list[str]:
    """[256] the printable characters by which byte-level tokenizers (GPT-2's and since) write bytes in their vocabulary."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]
