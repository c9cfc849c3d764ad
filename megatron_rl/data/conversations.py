"""From rows to conversations, and from conversations to what the model sees."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_rl.config.data_settings import DataSettings, SourceSettings
from megatron_rl.config.errors import DataError
from megatron_rl.data.sources import Source, digest
from megatron_rl.data.tokenizer import Tokenizer

type Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Renderer:
    """How conversations become tokens, by the settings."""

    tokenizer: Tokenizer
    settings: DataSettings

    def conversation_of(self, source: Source) -> Callable[[Mapping[str, Any]], Conversation]:
        """What makes a conversation of a row of this source; an empty one of a row that asks nothing."""
        own = source.settings
        system = self.settings.system if own.system is None else own.system
        if self.settings.template == "none" and (own.messages or system):
            raise DataError(
                f"data source {own.path}: messages and system prompts need a chat template, and data.template = none. Set it "
                "to chat, or name a column of text with prompt."
            )
        return partial(_conversation, own, source.prompt_column, system)

    def tokens_of_rows(
        self,
        rows: Mapping[str, Sequence[Any]],
        indices: Sequence[int],
        source: str,
        messages: Callable[[Mapping[str, Any]], Conversation],
    ) -> dict[str, list[Any]]:
        """Columns of tokenised rows, for `datasets`: a row without a question has no tokens."""
        texts = []
        for place, row in enumerate(indices):
            try:
                conversation = messages({name: cells[place] for name, cells in rows.items()})
                texts.append(self._text(conversation) if conversation else "")
            except Exception as error:  # templates throw what their authors chose
                raise DataError(f"data source {source}, row {row}: {error}") from error
        asked = [place for place, text in enumerate(texts) if text]
        ids = (
            self.tokenizer.encode([texts[place] for place in asked], special=self.settings.template == "none") if asked else []
        )
        tokens: list[list[int]] = [[] for _ in texts]
        for place, own in zip(asked, ids, strict=True):
            tokens[place] = own
        return {"tokens": tokens, "length": [len(own) for own in tokens]}

    def fingerprint(self) -> str:
        """Changes when the tokens of a conversation would."""
        data = self.settings.model_dump(include={"template", "chat_template_kwargs", "system"})
        return digest(self.tokenizer.fingerprint(), data)

    def _text(self, conversation: Conversation) -> str:
        if self.settings.template == "none":
            return conversation[-1]["content"]
        return self.tokenizer.render(conversation, self.settings.chat_template_kwargs)


def _conversation(own: SourceSettings, column: str | None, system: str | None, cells: Mapping[str, Any]) -> Conversation:
    if own.messages:
        messages = _checked(cells[own.messages] or [], own.messages)
    else:
        question = own.wording.format_map(cells) if own.wording else cells[str(column)]
        if question is not None and not isinstance(question, str):
            raise DataError(f"the column {column} holds {type(question).__name__} where text is expected")
        messages = [{"role": "user", "content": question}] if question and question.strip() else []
    if not messages or not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _checked(messages: Any, column: str) -> Conversation:
    """Messages as templates expect them: text with a role, the last not the model's own."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"the column {column} must hold a list of {{role, content}}")
    found = [{name: value for name, value in message.items() if value is not None} for message in messages]
    for message in found:
        if not {"role", "content"} <= message.keys() or not all(isinstance(value, str) for value in message.values()):
            raise DataError(f"a message in the column {column} needs role and content as text, and has {message}")
    if found and found[-1]["role"] == "assistant":
        raise DataError(f"the conversation in the column {column} ends with the assistant's answer: there is nothing to ask")
    return found
