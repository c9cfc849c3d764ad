"""Every setting of a run: typed, frozen, documented where it is declared.

A run is described by one `Settings` tree. It is read by `config.load`, checked as a whole by `config.checks`, printed by
`config.show`, saved with the run, and never mutated. Field descriptions are the documentation: `--help` and docs print them.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_rl.config.cluster_settings import ClusterSettings
from megatron_rl.config.data_settings import BankSettings, DataSettings
from megatron_rl.config.launch_settings import LaunchSettings
from megatron_rl.config.learning_settings import EvaluationSettings, SupervisedSettings
from megatron_rl.config.observe_settings import ObserveSettings
from megatron_rl.config.publish_settings import PublishSettings
from megatron_rl.config.reward_settings import RewardPart, ScoringSettings
from megatron_rl.config.rollout_settings import SamplingSettings, ServerSettings
from megatron_rl.config.section import Section


class PolicySettings(Section):
    """Which model is trained, and how its log-probabilities are taken."""

    config: Path = Field(description="A Hugging Face config.json, or the folder that holds it; default: policy.init's.")
    init: Literal["random"] | Path = Field(
        "random",
        description="Where the first weights come from: random, or a folder: of a Hugging Face checkpoint (safetensors), or of "
        "one of megatron-rl's (step_...).",
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

    world_size: PositiveInt | None = Field(
        None, description="Number of ranks; when not given, cluster.nodes x cluster.gpus_per_node, or as many as are launched."
    )
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
    decay_steps: PositiveInt | None = Field(None, description="Optimizer step that reaches min_lr; default: the run's last.")
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
    routing_replay: Literal["off", "policy", "rollout"] = Field(
        "off",
        description="Whose choice of experts an update repeats, so that old and new log-probabilities come from the same "
        "experts. off: each pass chooses anew. policy: the trainer's own choice, written down when `old` is computed (R2). "
        "rollout: the servers' choice, for `old` too (R3); they return it, and the bank keeps it.",
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
    export_every: NonNegativeInt = Field(
        0, description="Steps between exports of the weights as Hugging Face checkpoints, and one at the end; 0: none."
    )
    export_dtype: Literal["bfloat16", "float32", "fp8"] = Field(
        "bfloat16", description="Number format of exports; fp8 is e4m3 in blocks of 128 x 128 with scales, as DeepSeek-V3's."
    )
    grace_seconds: PositiveFloat = Field(
        300.0, description="How long a rank may take to end its step, save and end its servers when the run is told to stop."
    )
    allow_changes: tuple[str, ...] = Field(
        (),
        description="Settings (optimizer.lr) or sections (optimizer) that may differ from those of a loaded checkpoint.",
    )


class RunSettings(Section):
    """The run itself."""

    directory: Path = Field(Path("runs/default"), description="Where checkpoints, metrics and the saved settings go.")
    steps: PositiveInt = Field(100, description="Training steps; each takes batch.minibatches x batch.epochs optimizer steps.")
    seed: NonNegativeInt = Field(0, description="Seed of everything random but the first weights.")


class DeviceSettings(Section):
    """The machine."""

    kind: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when this process sees a GPU, else CPU.")
    threads: PositiveInt | None = Field(
        None, description="CPU threads a rank, or a server on a CPU; default: cores divided by ranks, or by servers."
    )
    tflops: PositiveFloat | None = Field(
        None,
        description="10^12 bf16 operations a second that one device could do at most, for the metric rate/mfu; "
        "default: what NVIDIA states for its data-centre GPUs, and no such metric elsewhere.",
    )


class Settings(Section):
    """One run, whole."""

    policy: PolicySettings
    layout: LayoutSettings = LayoutSettings()
    cluster: ClusterSettings = ClusterSettings()
    launch: LaunchSettings = LaunchSettings()
    moe: MoeSettings = MoeSettings()
    precision: PrecisionSettings = PrecisionSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    rewards: tuple[RewardPart, ...] = Field(
        (), description="Components whose weighted sum is the reward. `megatron-rl rewards` lists what there is."
    )
    scoring: ScoringSettings = ScoringSettings()
    recompute: RecomputeSettings = RecomputeSettings()
    batch: BatchSettings = BatchSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    publish: PublishSettings = PublishSettings()
    data: DataSettings = DataSettings()
    bank: BankSettings = BankSettings()
    supervised: SupervisedSettings = SupervisedSettings()
    sampling: SamplingSettings = SamplingSettings()
    servers: ServerSettings = ServerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    sglang: dict[str, Any] = Field({}, description="Arguments of own servers, by SGLang's names: {tp_size: 4}.")
    observe: ObserveSettings = ObserveSettings()
    run: RunSettings = RunSettings()
    device: DeviceSettings = DeviceSettings()

    @property
    def world_size(self) -> int | None:
        """Ranks that the settings ask for; None: as many as are started."""
        return self.layout.world_size or self.cluster.ranks

    @property
    def optimizer_steps(self) -> int:
        """Of the whole run."""
        return self.run.steps * self.batch.minibatches * self.batch.epochs

    @property
    def keeps_routing(self) -> bool:
        """Do servers return which experts they chose?"""
        asked = self.sampling.routing
        return self.objective.routing_replay == "rollout" if asked is None else asked

    @property
    def bank_directory(self) -> Path:
        return self.bank.directory or self.run.directory / "bank"
