"""The model's tokenizer: loaded when first needed, checked against the model, and asked how the model sees a conversation."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.errors import DataError
from megatron_rl.data.sources import digest

type Messages = Sequence[Mapping[str, str]]


class Tokenizer:
    """Text to token ids and back, through transformers."""

    def __init__(self, path: str, *, chat_template: str | None = None) -> None:
        """`path` is a folder or a hub name; `chat_template` a text that takes the place of the tokenizer's own."""
        from transformers import AutoTokenizer  # seconds to import: not before it is needed

        self.path = path
        try:
            self._inner: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # else it asks, on a terminal
        except Exception as error:  # transformers throws what its many readers throw
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"data.tokenizer = {path}: no tokenizer can be loaded from it: {what} Give the folder of a model that has "
                "tokenizer.json, or a hub name that can be reached."
            ) from error
        if chat_template is not None:
            self._inner.chat_template = chat_template

    def require_fits(self, vocab: int) -> None:
        """Every token has a row in the model's embedding."""
        largest = max(self._inner.get_vocab().values())
        if largest >= vocab:
            raise DataError(
                f"data.tokenizer = {self.path}: its token ids go up to {largest:,}, and the model has {vocab:,} (vocab_size of "
                "policy.config): it is another model's tokenizer. Give the one that belongs to the model."
            )

    @property
    def end(self) -> int:
        """The token that ends a response."""
        token: int | None = self._inner.eos_token_id
        if token is None:
            raise DataError(
                f"data.tokenizer = {self.path} names no token that ends a response (eos_token in tokenizer_config.json): a "
                "model that learns from it would never stop. Name one there."
            )
        return token

    def require_template(self, switches: Mapping[str, Any]) -> None:
        """There is a chat template, and it knows the switches; one that it does not know it would silently ignore."""
        if not self._inner.chat_template:
            raise DataError(
                f"data.tokenizer = {self.path} has no chat template. Name a file that holds one with data.chat_template, or "
                "set data.template=none for prompts as they are."
            )
        words = sorted(set(re.findall(r"[A-Za-z_]\w*", self._inner.get_chat_template())))
        for switch in switches:
            if switch not in words:
                nearest = difflib.get_close_matches(switch, words, 1)
                meant = f" Did you mean {nearest[0]}?" if nearest else ""
                raise DataError(f"data.chat_template_kwargs.{switch}: the chat template of {self.path} does not use it.{meant}")

    def render(self, messages: Messages, switches: Mapping[str, Any]) -> str:
        """A conversation as the model sees it, up to where its answer begins."""
        text: str = self._inner.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **switches
        )
        return text

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids. `special` adds what the tokenizer puts around plain text; a rendered conversation has it already."""
        ids: list[list[int]] = self._inner(list(texts), add_special_tokens=special)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text, special tokens visible."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=False)
        return text

    def text(self, ids: Sequence[int]) -> str:
        """Text as people and tools read it: without special tokens."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=True)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it. A character of several tokens comes with the last of them."""
        texts = []
        before, read = 0, 0  # tokens from `before` to `read` are the context in which the next are decoded
        for stop in range(1, len(ids) + 1):
            known, text = self.decode(ids[before:read]), self.decode(ids[before:stop])
            if text.endswith("\ufffd") and stop < len(ids):
                texts.append("")
                continue
            texts.append(text[len(known) :])
            before, read = read, stop
        return texts

    def save(self, folder: Path) -> None:
        """Its files, chat template included, as transformers and SGLang read them."""
        self._inner.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        """Changes when the tokens of a text would."""
        inner = self._inner
        model = inner.backend_tokenizer.to_str() if inner.is_fast else json.dumps(inner.get_vocab(), sort_keys=True)
        return digest(type(inner).__name__, model, inner.special_tokens_map, inner.chat_template)


def read_chat_template(path: Path) -> str:
    """The text of a chat template."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template = {path} cannot be read: {error}. Name a file with a Jinja template.") from error
