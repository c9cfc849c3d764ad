"""Settings of supervised fine-tuning, and of evaluation."""

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from megatron_rl.config.section import Section


class SupervisedSettings(Section):
    """What `megatron-rl sft` learns from: prompts of `data.sources` with the responses that shall follow them."""

    response: str = Field(
        "{answer}",
        description="The response that is learned, in your words, the prompt's fields in braces; a brace itself is written "
        "twice. Sources name their fields with answer and fields.",
    )
    batch: PositiveInt = Field(64, description="Sequences an optimizer step learns from.")
    held_out: PositiveInt = Field(
        256, description="Most held-out sequences of each validation source (data.validation_share) whose loss is measured."
    )


class EvaluationSettings(Section):
    """How well the policy answers validation prompts, measured while it trains and by `megatron-rl eval`."""

    every: NonNegativeInt = Field(
        0, description="Steps between evaluations, the first before the first step, one after the last; 0: none."
    )
    prompts: PositiveInt | None = Field(
        None, description="At most so many prompts of each source, evenly spread; default: all."
    )
    samples: PositiveInt = Field(4, description="Responses to each prompt: the n of avg@n, pass@k and maj@n.")
    temperature: NonNegativeFloat = Field(1.0, description="Temperature of these responses; 0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens of this much probability; 1 is all.")
    top_k: PositiveInt | None = Field(None, description="Draw from so many likeliest tokens; default: all.")
    max_new_tokens: PositiveInt | None = Field(
        None, description="Most tokens of a response; default: sampling.max_new_tokens. A prompt may ask for less."
    )
    correct_at: float = Field(1.0, description="A response counts as right when its reward is at least this.")

    def due(self, step: int, steps: int) -> bool:
        """Is it time to evaluate, `step` steps after the beginning of a run of `steps`?"""
        return self.every > 0 and (step % self.every == 0 or step == steps)
