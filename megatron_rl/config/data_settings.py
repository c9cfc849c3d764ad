"""Settings of prompts, and of the bank that keeps what came of them."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_rl.config.section import Section


class SourceSettings(Section):
    """Where prompts come from, and which columns make one."""

    path: str = Field(
        description="A file or pattern (.jsonl, .json, .parquet, .csv, .tsv), a folder that datasets wrote, a hub name, "
        "my_package.my_module:rows, or a built-in task: task:arithmetic, task:sorting, task:countdown, "
        "task:digits."
    )
    name: str | None = Field(None, description="What its prompts are called by; default: from the path.")
    subset: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set or folder.")
    revision: str | None = Field(None, description="Commit or tag of a hub data set.")
    weight: PositiveFloat | None = Field(
        None, description="Its share of prompts beside the others'. Default: its number of rows, so that all last equally long."
    )
    prompt: str | None = Field(None, description="Column with the question as text; default: prompt, unless messages is set.")
    messages: str | None = Field(None, description="Column with the conversation: a list of {role, content}.")
    wording: str | None = Field(
        None, description='The question in your words, columns in braces: "{problem}\nPut the answer in \\boxed{{}}."'
    )
    answer: str | None = Field(None, description="Column that rewards know as answer.")
    fields: dict[str, str] = Field({}, description="Further columns for rewards and environments: {their name: column}.")
    max_new_tokens: str | None = Field(None, description="Column with each prompt's own limit of new tokens.")
    system: str | None = Field(None, description="System prompt of this source; default: data.system.")
    options: dict[str, Any] = Field({}, description="Options of a built-in task, or arguments of your own function.")


class DataSettings(Section):
    """Which prompts are asked, in which order, and how the model sees them."""

    sources: tuple[SourceSettings, ...] = Field((), description="Sources of training prompts.")
    validation_sources: tuple[SourceSettings, ...] = Field((), description="Sources of validation prompts.")
    validation_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each training source's rows set aside for validation; the same rows in every run.",
    )
    tokenizer: str | None = Field(None, description="Folder or hub name; default: the folder of policy.config.")
    template: Literal["chat", "none"] = Field(
        "chat", description="chat: prompts go through the chat template. none: the text as it is, for models that have none."
    )
    chat_template: str | None = Field(None, description="File with a chat template (Jinja) to use for the tokenizer's own.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="Switches of the template, such as enable_thinking: false.")
    system: str | None = Field(None, description="System prompt, put before conversations that have none.")
    max_prompt_tokens: PositiveInt | None = Field(None, description="Longest prompt; default: no limit.")
    too_long: Literal["drop", "error"] = Field("drop", description="What becomes of a longer one.")
    shuffle: bool = Field(True, description="A new order every epoch; else the order of the rows.")
    seed: NonNegativeInt | None = Field(None, description="Seed of the order; default: run.seed.")
    cache: Path | None = Field(None, description="Where Arrow files are kept; default: the cache of datasets.")


class BankSettings(Section):
    """The bank: where finished groups are kept, how safely, and for how long."""

    directory: Path | None = Field(None, description="Its folder; default: bank in run.directory.")
    replay: Path | None = Field(
        None, description="Learn from the sealed steps of this bank, one after the other, and sample nothing."
    )
    durable_against: Literal["power_loss", "kill"] = Field(
        "power_loss",
        description="What a group reported as finished survives: loss of power (the disk is synchronised, once for all groups "
        "that wait), or the end of the process alone.",
    )
    gather_seconds: NonNegativeFloat = Field(
        0.0, description="How long a finished group waits for others to be synchronised with it, on disks slow at that."
    )
    keep_steps: PositiveInt | None = Field(None, description="Sealed steps kept; older ones are removed. Default: all.")
    keep_bytes: PositiveInt | None = Field(
        None, description="Bytes of sealed steps kept; the oldest are removed, never the newest. Default: all."
    )
    texts: bool = Field(True, description="Keep prompts and responses as text also, for those who open the files directly.")
