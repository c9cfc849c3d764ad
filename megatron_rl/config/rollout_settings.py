"""Settings of sampling, and of the servers that do it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_rl.config.section import Section


class SamplingSettings(Section):
    """How prompts become groups of responses. Tokens are drawn at `policy.temperature`."""

    strategy: Literal["grouped", "igrpo", "episodes", "turn_groups"] = Field(
        "grouped",
        description="grouped: responses on their own; igrpo: drafts first, then responses that improve on the best; "
        "episodes: several turns with an environment; turn_groups: a group for each turn of an episode.",
    )
    groups: PositiveInt = Field(32, description="Groups (prompts) a training step learns from.")
    group_size: PositiveInt = Field(8, description="Responses of a group.")
    max_new_tokens: PositiveInt = Field(1024, description="Most tokens of a response, or of a turn; a prompt may ask for less.")
    min_new_tokens: NonNegativeInt = Field(0, description="Fewest tokens of a response.")
    max_tokens: PositiveInt | None = Field(
        None, description="Most tokens of a sample, prompt and environment included; default: batch.max_sequence."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens of this much probability; 1 is all.")
    top_k: PositiveInt | None = Field(None, description="Draw from so many likeliest tokens; default: all.")
    min_p: float = Field(0.0, ge=0, lt=1, description="Leave out tokens less likely than this share of the likeliest.")
    stop: tuple[str, ...] = Field((), description="Texts that end a response; they stay in it.")
    stop_token_ids: tuple[NonNegativeInt, ...] = Field((), description="Tokens that end a response, besides the model's own.")
    routing: bool | None = Field(
        None,
        description="Keep in the bank which experts the servers chose for each token. Own servers then return them; others "
        "must be started with --enable-return-routed-experts. Default: where objective.routing_replay = rollout needs it.",
    )
    dynamic: bool = Field(False, description="Throw away groups whose rewards are all equal, and draw others (DAPO).")
    tries: PositiveInt = Field(4, description="dynamic: at most tries x groups are drawn a step; then equal rewards are taken.")
    ahead: NonNegativeInt = Field(0, description="Steps that sampling may run ahead of learning; 0: they take turns.")
    partial: bool = Field(
        False, description="A step is full when enough groups are whole; responses under way go on in the next step."
    )
    over_sampling: float = Field(1.5, ge=1, description="partial: prompts in flight, as a multiple of the groups still wanted.")
    drafts: PositiveInt = Field(4, description="igrpo: drafts a prompt.")
    improve: str = Field(
        "Here is my best attempt so far. Improve on it, and answer again in full.",
        description="igrpo: what is said between the draft and the response.",
    )
    environment: str | None = Field(
        None, description="episodes, turn_groups: the environment's class, as my_package.my_module:Class."
    )
    environment_options: dict[str, Any] = Field({}, description="Arguments that the environment is made with.")
    environment_weight: float = Field(1.0, description="episodes: weight of the environment's own rewards, summed over turns.")
    max_turns: PositiveInt = Field(8, description="Most turns of an episode.")
    go_on_with: Literal["first", "best"] = Field("first", description="turn_groups: the action that the next turn follows.")


class ServerSettings(Section):
    """The SGLang servers that sample: started here, or run by somebody else. Their own arguments are the section `sglang`."""

    count: NonNegativeInt | None = Field(
        None,
        description="Servers to start on this machine; default: none where urls or urls_file name others, else one, or with "
        "placement = colocated as many as there are GPUs for.",
    )
    model: str | None = Field(
        None, description="What own servers load: a checkpoint folder or a hub name; default: policy.init, else policy.config."
    )
    urls: tuple[str, ...] = Field((), description="Servers that somebody else runs, such as http://node7:30000.")
    urls_file: Path | None = Field(
        None, description="A file of such URLs, one a line; it is watched: servers that appear in it join, others leave."
    )
    placement: Literal["separate", "colocated"] = Field(
        "separate",
        description="Whose GPUs servers use. separate: their own. colocated: the trainer's, in turns: while the policy learns, "
        "servers sleep, that is, they have given their memory back. See docs/servers.md.",
    )
    router: str | None = Field(
        None, description="URL of an sglang-router: generation goes through it, everything else to the servers themselves."
    )
    api_key_file: Path | None = Field(
        None,
        description="A file that holds the servers' API key. Default: the one beside urls_file, FILE.key, if there is one; "
        "else own servers that listen beyond this machine are given one, in the folder of their logs.",
    )
    host: str = Field(
        "127.0.0.1", description="Where own servers listen. Beyond this machine they answer nobody without their API key."
    )
    port: PositiveInt | None = Field(None, description="Port of the first own server, the others follow; default: free ones.")
    gpus: tuple[NonNegativeInt, ...] | None = Field(
        None, description="GPUs for own servers, dealt to them in order, tp_size x pp_size each; default: all there are."
    )
    logs: Path | None = Field(None, description="Folder of the servers' logs; default: servers in run.directory.")
    start_seconds: PositiveFloat = Field(1800.0, description="How long a server may take to load and generate.")
    max_in_flight: PositiveInt | None = Field(
        None, description="Most requests a server works on at once; default: as many as it says it runs at once."
    )
    over_commit: PositiveFloat = Field(
        2.0,
        description="Requests are given to a server up to this multiple of the tokens it can hold, counting prompts and the "
        "longest responses allowed. Above 1 because few responses are that long.",
    )
    answer_seconds: PositiveFloat = Field(30.0, description="How long a server may take to answer a question.")
    silence_seconds: PositiveFloat = Field(300.0, description="How long a response may bring no new tokens.")
    update_seconds: PositiveFloat = Field(3600.0, description="How long a server may take to load new weights.")
    probe_seconds: PositiveFloat = Field(10.0, description="Seconds between looks at a server's health.")
    probes: PositiveInt = Field(3, description="Looks that may fail in a row before a server gets no more work.")
    tries: PositiveInt = Field(8, description="Servers that may fail a response before the run gives up.")
    restarts: NonNegativeInt = Field(3, description="Times in a run that an own server which died is started again.")
    outage_seconds: PositiveFloat = Field(900.0, description="How long there may be no working server before the run gives up.")
    update: Literal["abort", "retract", "in_place"] = Field(
        "abort",
        description="What happens to responses under way when weights change. abort: they end and go on under the new weights, "
        "computed anew; retract and in_place: servers keep them, and the new weights read keys and values of the old.",
    )
    piece: PositiveInt = Field(
        128, description="Tokens of a response that arrive at a time; a server that dies costs fewer. 1 halves the speed."
    )

    @property
    def starts_any(self) -> bool:
        """Does a run start servers of its own?"""
        elsewhere = bool(self.urls) or self.urls_file is not None
        return not elsewhere if self.count is None else self.count > 0

    @property
    def colocated(self) -> bool:
        """Do servers and trainer use the same GPUs, in turns?"""
        return self.placement == "colocated"
