"""Tiny checkpoints that a real SGLang server loads: with a vocabulary, room to talk, and a tokenizer made on the spot."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_rl.data.tokenizer import Tokenizer as ModelTokenizer
from tests.reference.checkpoint import write_tiny_checkpoint

END = 2  # <|im_end|>
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What a server needs that the comparison with transformers does not: a vocabulary for the tokenizer, and room to talk.
SERVED: dict[str, Any] = {
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "eos_token_id": END,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
}


def write_served_checkpoint(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A tiny checkpoint of `tests.reference.tiny` that can be served; a seed gives the same weights."""
    write_tiny_checkpoint(family, folder, seed=seed, **{**SERVED, **changes})
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_served_model(folder: Path, seed: int = 0) -> Path:
    """The model of the shared server: a Qwen3-MoE of two layers and four experts."""
    return write_served_checkpoint(folder, "qwen3_moe", seed, num_hidden_layers=2, num_experts=4)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 500 tokens with the chat markers of Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the quick brown fox jumps over the lazy dog", "user assistant system", "What is 12 + 45? The answer is 57."]
    tokenizer.train_from_iterator(corpus * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT
    return fast


@cache
def saved_tokenizer() -> ModelTokenizer:
    """The same, read back as a run reads it."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer().save_pretrained(folder)
        return ModelTokenizer(folder)
