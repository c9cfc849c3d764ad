"""What stands between two turns of a conversation, as tokens, without touching what the policy wrote.

A chat template turns a whole conversation into text. Rendering the policy's answers again would tokenise them again, and
differently. So the template is asked once with a marker for the answer, and only what follows the marker is made into tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.config.errors import SettingsError
from megatron_rl.data.tokenizer import Tokenizer

_MARKER = "ANSWER-OF-THE-POLICY"


@dataclass(frozen=True)
class Chat:
    """Continues conversations in the words of a model's template."""

    tokenizer: Tokenizer
    switches: Mapping[str, Any] = field(default_factory=dict)  # of the template: thinking and the like

    def text(self, tokens: Sequence[int]) -> str:
        """What an environment reads: without the tokens that end turns."""
        return self.tokenizer.text(tokens)

    def continuation(self, messages: Sequence[Mapping[str, str]], after: Sequence[int]) -> list[int]:
        """Tokens from the end of the policy's answer `after` to the beginning of its next one, `messages` between them."""
        ending = self.after_answer(messages)
        last = self.tokenizer.decode([after[-1]]) if after else ""
        if last and ending.startswith(last):
            ending = ending[len(last) :]  # the policy ended its turn itself
        return self.tokenizer.encode([ending], special=False)[0]

    def after_answer(self, messages: Sequence[Mapping[str, str]]) -> str:
        """What the template says from the end of an answer on."""
        self.tokenizer.require_template(self.switches)
        conversation = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARKER}, *messages]
        before, found, ending = self.tokenizer.render(conversation, self.switches).rpartition(_MARKER)
        if not found or _MARKER in before:
            raise SettingsError("the chat template does not show an assistant's message once: no turn can be continued with it")
        return ending
