"""The settings of rewards. What rewards and options there are is known by `rewards.registry`, which checks them."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt

from megatron_rl.config.section import Section


class RewardPart(Section):
    """One component of the reward."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    name: str = Field(description="A reward's name, or your function as my_package.my_module:function.")
    weight: float = Field(1.0, description="Its factor in the sum; 0 measures without rewarding.")
    options: dict[str, Any] = Field({}, description="Its options.")
    component: str | None = Field(None, alias="as", description="The component's name; default: the reward's.")


class ScoringSettings(Section):
    """How rewards are computed, whichever they are."""

    text: Literal["last_turn", "all_turns"] = Field(
        "last_turn", description="What rewards read of an episode: the policy's last turn, or all that it wrote."
    )
    failure_reward: float = Field(
        0.0, description="Reward of a sample that a component could not score; its `failure` says why."
    )
    workers: PositiveInt | None = Field(
        None, description="Processes for rewards that compute; default: as many as cores, 16 at most."
    )
    worker_memory: PositiveFloat | None = Field(8.0, description="GiB of address space of a worker; null for no limit.")
