"""Every setting of a run: typed, frozen, documented where it is declared.

A run is described by one `Settings` tree. It is read by `config.load`, checked as a whole by `config.checks`, printed by
`config.show`, saved with the run, and never mutated. Field descriptions are the documentation: `--help` and docs print them.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class PolicySettings(Section):
    """Which model is trained, and how its log-probabilities are taken."""

    config: Path = Field(description="A Hugging Face config.json, or the folder that holds it; default: policy.init's.")
    init: Literal["random"] | Path = Field(
        "random", description="Where the first weights come from: random, or a Hugging Face checkpoint folder (safetensors)."
    )
    seed: NonNegativeInt = Field(
        0, description="Seed of random weights. The same seed gives the same weights under every layout."
    )
    temperature: PositiveFloat = Field(
        1.0, description="Log-probabilities are those of softmax(logits / temperature); use the sampling temperature."
    )
    log_prob_chunk: PositiveInt = Field(
        512, description="Tokens per chunk of the fused output layer: the largest logits ever held are [chunk, vocab/tensor]."
    )

    @model_validator(mode="before")
    @classmethod
    def _config_of_the_checkpoint(cls, values: Any) -> Any:
        """A checkpoint folder holds its own config."""
        if isinstance(values, dict) and "config" not in values and values.get("init", "random") != "random":
            return {**values, "config": values["init"]}
        return values


class LayoutSettings(Section):
    """How the model is spread over ranks. Sizes multiply: world = tensor x pipeline x context x data."""

    world_size: PositiveInt | None = Field(None, description="Number of ranks; taken from the launcher when not given.")
    tensor: PositiveInt = Field(1, description="Tensor-parallel size: each matrix is cut this many ways.")
    sequence_parallel: bool | None = Field(
        None, description="Split activations along the sequence between tensor ranks. Default: on when tensor > 1."
    )
    pipeline: PositiveInt = Field(1, description="Pipeline-parallel size: layers are dealt to this many stages.")
    virtual_pipeline: PositiveInt = Field(1, description="Model chunks per pipeline stage (interleaved schedule when > 1).")
    pipeline_layers: tuple[NonNegativeInt, ...] | None = Field(
        None,
        description="Decoder layers of each of the pipeline x virtual_pipeline chunks in model order; "
        "needed when layers do not divide evenly.",
    )
    expert: PositiveInt = Field(1, description="Expert-parallel size: experts are dealt to this many ranks.")
    expert_tensor: PositiveInt = Field(1, description="Tensor-parallel size inside each expert.")
    context: PositiveInt = Field(1, description="Context-parallel size: each sequence is cut zig-zag over this many ranks.")
    distributed_optimizer: bool = Field(True, description="Shard optimizer state over data-parallel ranks.")
    overlap_grad_reduce: bool = Field(False, description="Reduce gradients while the backward pass still runs.")
    overlap_param_gather: bool = Field(
        False,
        description="Gather updated weights while the forward pass runs (with distributed_optimizer and overlap_grad_reduce).",
    )

    @property
    def sequence_parallel_on(self) -> bool:
        return self.tensor > 1 if self.sequence_parallel is None else self.sequence_parallel


class MoeSettings(Section):
    """Training-time choices of the mixture of experts; its shape comes from the model's config."""

    dispatcher: Literal["alltoall", "allgather", "flex"] = Field(
        "alltoall", description="How tokens travel to experts; flex is DeepEP and needs a GPU."
    )
    aux_loss_coefficient: NonNegativeFloat = Field(
        0.0,
        description="Weight of the load-balancing auxiliary loss. Megatron takes it pack by pack: "
        "it makes results depend on how sequences are packed.",
    )
    z_loss_coefficient: NonNegativeFloat = Field(0.0, description="Weight of the router z-loss.")
    expert_bias_update_rate: NonNegativeFloat = Field(
        0.0, description="Step of the auxiliary-loss-free expert bias after each update (models that have the bias)."
    )


class PrecisionSettings(Section):
    """Number formats. Router, log-probabilities, ratios and the loss are float32 whatever is chosen here."""

    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Format of weights and activations.")
    fp8: Literal["off", "transformer_engine", "simulated"] = Field(
        "off", description="FP8 matrix products: by Transformer Engine on a GPU, or simulated by rounding anywhere."
    )
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = Field(
        "blockwise",
        description="One scale a tensor (tensorwise; simulated, it depends on layout and packing) or a block: 128 (blockwise), "
        "32 (mxfp8). delayed is refused: its ratios are not 1 on policy.",
    )
    fp8_skip_first_layers: NonNegativeInt = Field(0, description="First decoder layers that stay in bfloat16.")
    fp8_skip_last_layers: NonNegativeInt = Field(0, description="Last decoder layers that stay in bfloat16.")


class OptimizerSettings(Section):
    """AdamW with schedules for learning rate and weight decay."""

    lr: NonNegativeFloat = Field(1e-6, description="Peak learning rate.")
    min_lr: NonNegativeFloat = Field(0.0, description="Learning rate at the end of the decay.")
    lr_schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = Field("constant", description="Shape of the decay.")
    warmup_steps: NonNegativeInt = Field(0, description="Steps of linear warm-up from zero.")
    decay_steps: PositiveInt | None = Field(None, description="Step at which min_lr is reached; default: the run's steps.")
    weight_decay: NonNegativeFloat = Field(0.01, description="Decoupled weight decay at the start.")
    weight_decay_end: NonNegativeFloat | None = Field(None, description="Weight decay at the end; default: as at the start.")
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape of its change.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the mean of squared gradients.")
    eps: PositiveFloat = Field(1e-8, description="Added to the root of the mean square before dividing by it.")
    clip_grad: NonNegativeFloat = Field(1.0, description="Largest gradient norm; 0 turns clipping off.")


class ObjectivePart(Section):
    """A weight or penalty of the objective."""

    name: str = Field(description="Its name, or a dotted path.")
    options: dict[str, Any] = Field({}, description="Its options.")


class ObjectiveSettings(Section):
    """What the policy shall become. Parts and options are checked by `train.objective.build`, which knows them.

    `megatron-rl objectives` lists every part with its formula, options and defaults.
    """

    advantage: str | None = Field("grpo", description="How rewards become advantages; null for surrogates that take none.")
    advantage_options: dict[str, Any] = Field({}, description="Options of the advantage, by name.")
    surrogate: str = Field("gspo", description="What is maximised: a name, or your own as my_package.my_module:Class.")
    options: dict[str, Any] = Field({}, description="Options of the surrogate, by name.")
    weights: tuple[ObjectivePart, ...] = Field(
        (), description="Factors and masks, such as {name: tis, options: {cap: 2}}; they multiply."
    )
    penalties: tuple[ObjectivePart, ...] = Field((), description="What is added to the loss or taken from the reward.")
    on_policy: bool = Field(False, description="One optimizer step a rollout: ratios are exactly 1, `old` is not computed.")
    old_log_probs: Literal["recompute", "rollout"] = Field(
        "recompute",
        description="The denominator of ratios: by the trainer in its own precision, or the rollout engine's as reported. "
        "The mismatch of the two is wider than GSPO's clip band, with FP8 rollouts by far.",
    )
    reference: Literal["none", "initial"] = Field(
        "none", description="The frozen model that KL penalties and some surrogates compare with: none, or the first weights."
    )


class RecomputeSettings(Section):
    """Activations recomputed in the backward pass instead of kept."""

    mode: Literal["none", "selective", "full"] = Field("none", description="selective: named modules; full: whole layers.")
    modules: tuple[Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"], ...] = Field(
        ("core_attn",), description="Modules recomputed by mode selective."
    )
    method: Literal["uniform", "block"] = Field(
        "uniform", description="full: every unit of layers, or only the first of a stage."
    )
    layers: PositiveInt = Field(1, description="full: layers in a recomputed unit (uniform) or recomputed a stage (block).")


class BatchSettings(Section):
    """How sequences become packs. Work is balanced by cost over data-parallel ranks and micro-batches."""

    max_tokens: PositiveInt = Field(8192, description="Most tokens of one pack (micro-batch), padding included.")
    max_sequence: PositiveInt | None = Field(None, description="Longest sequence accepted; default: max_tokens.")
    minibatches: PositiveInt = Field(1, description="Optimizer steps that a training step's groups are split into.")
    epochs: PositiveInt = Field(1, description="How often a training step goes through its minibatches.")


class CheckpointSettings(Section):
    """When training state is saved, and how much of it is kept."""

    every: NonNegativeInt = Field(0, description="Steps between checkpoints; 0 saves only at the end.")
    keep_last: PositiveInt = Field(2, description="Complete checkpoints kept; older ones are removed.")
    asynchronous: bool = Field(False, description="Write in the background while training goes on.")
    allow_changes: tuple[str, ...] = Field(
        (),
        description="Settings (optimizer.lr) or sections (optimizer) that may differ from those of a loaded checkpoint.",
    )


class SourceSettings(Section):
    """Where prompts come from, and which columns make one."""

    path: str = Field(
        description="A file or pattern (.jsonl, .json, .parquet, .csv, .tsv), a folder that datasets wrote, a hub name, "
        "my_package.my_module:rows, or a built-in task: task:arithmetic, task:sorting, task:countdown."
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


class RunSettings(Section):
    """The run itself."""

    directory: Path = Field(Path("runs/default"), description="Where checkpoints, metrics and the saved settings go.")
    steps: PositiveInt = Field(100, description="Optimizer steps.")
    seed: NonNegativeInt = Field(0, description="Seed of everything random but the first weights.")


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
        None, description="Servers to start on this machine; default: one, or none where urls or urls_file name others."
    )
    model: str | None = Field(
        None, description="What own servers load: a checkpoint folder or a hub name; default: policy.init, else policy.config."
    )
    urls: tuple[str, ...] = Field((), description="Servers that somebody else runs, such as http://node7:30000.")
    urls_file: Path | None = Field(
        None, description="A file of such URLs, one a line; it is watched: servers that appear in it join, others leave."
    )
    router: str | None = Field(
        None, description="URL of an sglang-router: generation goes through it, everything else to the servers themselves."
    )
    api_key_file: Path | None = Field(None, description="A file that holds the servers' API key.")
    host: str = Field("127.0.0.1", description="Where own servers listen; anything but this machine needs an API key.")
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
    restarts: NonNegativeInt = Field(3, description="Times that an own server which died is started again.")
    outage_seconds: PositiveFloat = Field(900.0, description="How long there may be no working server before the run gives up.")
    update: Literal["abort", "retract", "in_place"] = Field(
        "abort",
        description="What happens to responses under way when weights change. abort: they end and go on under the new weights, "
        "computed anew; retract and in_place: servers keep them, and the new weights read keys and values of the old.",
    )
    piece: PositiveInt = Field(
        32, description="Tokens of a response that arrive at a time; a server that dies costs fewer. 1 halves the speed."
    )


class DeviceSettings(Section):
    """The machine."""

    kind: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when this process sees a GPU, else CPU.")
    threads: PositiveInt | None = Field(
        None, description="CPU threads a rank, or a server on a CPU; default: cores divided by ranks, or by servers."
    )


class Settings(Section):
    """One run, whole."""

    policy: PolicySettings
    layout: LayoutSettings = LayoutSettings()
    moe: MoeSettings = MoeSettings()
    precision: PrecisionSettings = PrecisionSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    recompute: RecomputeSettings = RecomputeSettings()
    batch: BatchSettings = BatchSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    data: DataSettings = DataSettings()
    bank: BankSettings = BankSettings()
    sampling: SamplingSettings = SamplingSettings()
    servers: ServerSettings = ServerSettings()
    sglang: dict[str, Any] = Field({}, description="Arguments of own servers, by SGLang's names: {tp_size: 4}.")
    run: RunSettings = RunSettings()
    device: DeviceSettings = DeviceSettings()

    @property
    def bank_directory(self) -> Path:
        return self.bank.directory or self.run.directory / "bank"
