"""What stands between two turns of a conversation, as tokens, without touching what the policy wrote.

A chat template turns a whole conversation into text. Rendering the policy's answers again would tokenise them again, and
differently. So the template is asked once with a marker for the answer, and only what follows the marker is made into tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_rl.config.errors import SettingsError

_MARKER = "ANSWER-OF-THE-POLICY"


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True)
class Chat:
    """Continues conversations in the words of a model's template."""

    tokenizer: Tokenizer
    template_options: Mapping[str, Any] = field(default_factory=dict)  # thinking switches and the like

    def text(self, tokens: Sequence[int]) -> str:
        """What an environment and a reward read: without the tokens that end turns."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def continuation(self, messages: Sequence[Mapping[str, str]], after: Sequence[int]) -> list[int]:
        """Tokens from the end of the policy's answer `after` to the beginning of its next one, `messages` between them."""
        ending = self.after_answer(messages)
        last = self.tokenizer.decode([after[-1]], skip_special_tokens=False) if after else ""
        if last and ending.startswith(last):
            ending = ending[len(last) :]  # the policy ended its turn itself
        return self.tokenizer.encode(ending, add_special_tokens=False)

    def after_answer(self, messages: Sequence[Mapping[str, str]]) -> str:
        if self.tokenizer.chat_template is None:
            raise SettingsError(
                "the model's tokenizer has no chat template, which turns of a conversation need. Set data.chat_template, "
                "or use a strategy of single responses."
            )
        conversation = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARKER}, *messages]
        text = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **self.template_options
        )
        before, found, ending = text.rpartition(_MARKER)
        if not found or _MARKER in before:
            raise SettingsError(
                "the chat template does not show an assistant's message once: turns cannot be continued with it"
            )
        return ending
