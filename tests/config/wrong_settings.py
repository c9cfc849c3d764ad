"""Settings that cannot work: one mistake each, what is said of it and what is advised."""

FP8 = "precision.fp8=transformer_engine"
SIMULATED = "precision.fp8=simulated"

# id: (model, ranks, overrides, words of the message, words of the fix)
WRONG: dict[str, tuple[str, int, str, str, str]] = {
    # layout
    "declared ranks": (
        "dense", 4, "layout.world_size=8",
        "layout.world_size = 8: the launcher started 4 ranks", "Start 8 ranks",
    ),
    "declared machines": (
        "dense", 4, "cluster.nodes=1",
        "cluster.nodes = 1, cluster.gpus_per_node = 8: the launcher started 4 ranks", "Start 8 ranks",
    ),
    "machines and declared ranks": (
        "dense", 4, "cluster.nodes=1 layout.world_size=4",
        "layout.world_size = 4, cluster.nodes = 1, cluster.gpus_per_node = 8: these machines take 8 ranks",
        "Remove layout.world_size",
    ),
    "ranks not the product": (
        "moe", 12, "layout.tensor=2 layout.pipeline=2 layout.context=2",
        "layout.context = 2: one replica of the model takes their product, 8 ranks, and 12 ranks are no multiple",
        "multiple of 8 ranks",
    ),
    "fewer ranks than the product": (
        "dense", 1, "layout.tensor=2",
        "takes their product, 2 ranks", "Start a multiple of 2 ranks",
    ),
    "experts do not fill a stage": (
        "moe", 8, "layout.pipeline=4 layout.expert=4",
        "layout.expert = 4, layout.expert_tensor = 1: the experts of a layer take their product, 4 ranks, and the 2 ranks",
        "among 1 or 2, or start a multiple of 16 ranks",
    ),
    "expert ranks without experts": (
        "dense", 2, "layout.expert=2",
        "layout.expert = 2: the model has no experts", "layout.expert=1",
    ),
    "expert shards without experts": (
        "dense", 2, "layout.expert_tensor=2",
        "layout.expert_tensor = 2: the model has no experts", "layout.expert_tensor=1",
    ),
    "sequence parallel alone": (
        "dense", 1, "layout.sequence_parallel=true",
        "layout.sequence_parallel = true with layout.tensor = 1", "raise layout.tensor",
    ),
    "tensor without sequence parallel on MoE": (
        "moe", 2, "layout.tensor=2 layout.sequence_parallel=false",
        "layout.sequence_parallel = false with layout.tensor = 2: Megatron trains a mixture of experts",
        "Remove layout.sequence_parallel=false",
    ),
    "heads": (
        "latent", 3, "layout.tensor=3 batch.max_tokens=8190",
        "layout.tensor = 3: the model's 32 attention heads", "1, 2, 4, 8, 16 or 32",
    ),
    "fewer key-value heads than tensor ranks": (
        "dense", 8, "layout.tensor=8",
        "layout.tensor = 8: the model's 4 key-value heads", "Set layout.tensor to 1, 2 or 4;",
    ),
    "shared experts": (
        "shared 500", 8, "layout.tensor=8",
        "the shared-expert width 500 does not divide", "Set layout.tensor to a smaller power of two",
    ),
    "feed-forward": (
        "ffn 1001", 2, "layout.tensor=2",
        "the dense feed-forward width 1001 does not divide", "smaller power of two",
    ),
    "vocabulary": (
        "heads 6", 3, "layout.tensor=3 batch.max_tokens=8190",
        "the vocabulary of 32000 tokens, padded to 32000 rows, does not divide", "Set layout.tensor to a power of two",
    ),
    "latent attention": (
        "q_lora 36", 8, "layout.tensor=8",
        "the query bottleneck of the latent attention, 36 wide", "smaller power of two",
    ),
    "experts per rank": ("moe", 3, "layout.expert=3", "layout.expert = 3: the model's 16 experts", "1, 2, 4, 8 or 16"),
    "expert width": (
        "moe", 3, "layout.expert_tensor=3",
        "layout.expert_tensor = 3: the width of one expert, 512,", "layout.expert_tensor=1",
    ),
    "layers per chunk": (
        "moe", 3, "layout.pipeline=3",
        "layout.pipeline = 3, layout.virtual_pipeline = 1: the model's 8 layers", "layout.pipeline_layers=[3,3,2]",
    ),
    "more chunks than layers": (
        "moe", 16, "layout.pipeline=16",
        "do not divide over their product, 16 chunks", "Use fewer chunks",
    ),
    "pipeline_layers of the wrong length": (
        "moe", 2, "layout.pipeline=2 layout.pipeline_layers=[8]",
        "layout.pipeline_layers = [8]: these are 1 numbers for", "one number for each chunk",
    ),
    "pipeline_layers of the wrong sum": (
        "moe", 2, "layout.pipeline=2 layout.pipeline_layers=[4,5]",
        "[4, 5]: they add up to 9, the model has 8", "Make them add up to 8",
    ),
    "an empty chunk in the middle": (
        "moe", 3, "layout.pipeline=3 layout.pipeline_layers=[4,0,4]",
        "[4, 0, 4]: a chunk between the first and the last", "Give each of these",
    ),
    "virtual pipeline alone": (
        "dense", 1, "layout.virtual_pipeline=2",
        "layout.virtual_pipeline = 2 with layout.pipeline = 1", "raise layout.pipeline",
    ),
    "gather overlap without its ground": (
        "dense", 1, "layout.overlap_param_gather=true layout.distributed_optimizer=false",
        "with layout.distributed_optimizer = false and layout.overlap_grad_reduce = false: weights are gathered",
        "Set layout.distributed_optimizer=true and layout.overlap_grad_reduce=true",
    ),
    # experts
    "auxiliary loss of a dense model": (
        "dense", 1, "moe.aux_loss_coefficient=0.1",
        "moe.aux_loss_coefficient = 0.1: the model has no experts for it to act on", "(default 0.0)",
    ),
    "dispatcher of a dense model": (
        "dense", 1, "moe.dispatcher=allgather",
        "moe.dispatcher = allgather: the model has no", "default alltoall",
    ),
    "bias update without a bias": (
        "moe", 1, "moe.expert_bias_update_rate=0.001",
        "the router of a qwen3_moe model has no expert bias", "balance with moe.aux_loss_coefficient",
    ),
    "allgather between stages": (
        "moe", 2, "moe.dispatcher=allgather layout.pipeline=2",
        "moe.dispatcher = allgather with layout.pipeline = 2: packs differ in length", "moe.dispatcher=alltoall",
    ),
    "flex on a CPU": (
        "moe", 2, "moe.dispatcher=flex layout.expert=2 device.kind=cpu",
        "moe.dispatcher = flex with device.kind = cpu", "moe.dispatcher=alltoall",
    ),
    "flex with nothing to dispatch": (
        "moe", 1, "moe.dispatcher=flex",
        "layout.expert = 1, layout.expert_tensor = 1: every rank holds all experts", "Raise layout.expert",
    ),
    "flex in float32": (
        "moe", 2, "moe.dispatcher=flex layout.expert=2 precision.dtype=float32",
        "flex with precision.dtype = float32", "precision.dtype=bfloat16",
    ),
    # packs
    "pack and context": (
        "dense", 2, "layout.context=2 batch.max_tokens=8190",
        "batch.max_tokens = 8190: packs are cut into equal parts by layout.context = 2", "batch.max_tokens=8192 or 8188",
    ),
    "pack and sequence parallel": (
        "dense", 2, "layout.tensor=2 batch.max_tokens=8191",
        "over layout.tensor = 2", "batch.max_tokens=8192 or 8190",
    ),
    "pack and FP8": (
        "dense", 1, f"{SIMULATED} batch.max_tokens=100",
        "for precision.fp8 = simulated: their length is a multiple of 128", "batch.max_tokens=128.",
    ),
    "sequence and context": (
        "dense", 2, "layout.context=2 batch.max_sequence=4094",
        "batch.max_sequence = 4094 with layout.context = 2", "batch.max_sequence=4096",
    ),
    "sequence longer than a pack": (
        "dense", 1, "batch.max_sequence=8192 batch.max_tokens=4096",
        "a sequence is never cut", "batch.max_tokens to at least 8192",
    ),
    "sequence longer than the model's": (
        "dense", 1, "batch.max_sequence=8193 batch.max_tokens=16384",
        "batch.max_sequence = 8193: the model knows 8192 positions", "rope_scaling",
    ),
    # precision
    "Transformer Engine on a CPU": (
        "dense", 1, f"{FP8} device.kind=cpu",
        "precision.fp8 = transformer_engine with device.kind = cpu", SIMULATED,
    ),
    "Transformer Engine in float32": (
        "dense", 1, f"{FP8} precision.dtype=float32",
        "transformer_engine with precision.dtype = float32", "precision.dtype=bfloat16",
    ),
    "delayed scaling": (
        "dense", 1, f"{FP8} precision.fp8_recipe=delayed",
        "precision.fp8_recipe = delayed: scales out of a history", "precision.fp8_recipe to tensorwise, blockwise or mxfp8",
    ),
    "no FP8 layer left": (
        "dense", 1, f"{SIMULATED} precision.fp8_skip_first_layers=4 precision.fp8_skip_last_layers=4",
        "of the model's 8 layers none is left", "precision.fp8=off",
    ),
    "skipped layers over two stages": (
        "dense", 4, f"{FP8} layout.pipeline=4 precision.fp8_skip_first_layers=3",
        "precision.fp8_skip_first_layers = 3 with layout.pipeline = 4", "to at most 2",
    ),
    "FP8 blocks across shards": (
        "moe", 8, f"{SIMULATED} layout.expert_tensor=8",
        "the model's expert width, 64 on each rank, must be a multiple of 128", "Cut it less",
    ),
    "MXFP8 blocks": (
        "hidden 1040", 1, f"{SIMULATED} precision.fp8_recipe=mxfp8",
        "hidden width, 1040 on each rank, must be a multiple of 32", "precision.fp8=off",
    ),
    "FP8 tiles": (
        "ffn 1000", 1, f"{SIMULATED} precision.fp8_recipe=tensorwise",
        "feed-forward width, 1000 on each rank, must be a multiple of 16", "fp8_recipe",
    ),
    # training
    "learning rate that rises": (
        "dense", 1, "optimizer.lr=1e-6 optimizer.min_lr=1e-5",
        "optimizer.min_lr = 1e-05 with optimizer.lr = 1e-06", "at most 1e-06",
    ),
    "warm-up longer than the run": (
        "dense", 1, "optimizer.warmup_steps=10 run.steps=10",
        "optimizer.warmup_steps = 10 with run.steps = 10", "optimizer.warmup_steps below 10",
    ),
    "warm-up longer than the decay": (
        "dense", 1, "optimizer.warmup_steps=10 optimizer.decay_steps=5",
        "with optimizer.decay_steps = 5", "optimizer.warmup_steps below 5",
    ),
    "weight decay without an end": (
        "dense", 1, "optimizer.weight_decay_schedule=linear",
        "optimizer.weight_decay_schedule = linear: no weight decay is given", "Set optimizer.weight_decay_end",
    ),
    "weight decay end without a schedule": (
        "dense", 1, "optimizer.weight_decay_end=0.1",
        "optimizer.weight_decay_end = 0.1 with optimizer.weight_decay_schedule = constant", "to linear or cosine",
    ),
    "nothing to recompute": (
        "dense", 1, "recompute.mode=selective recompute.modules=[]",
        "recompute.modules = [] with recompute.mode = selective", "recompute.mode=none",
    ),
    "recomputed MLA without MLA": (
        "moe", 1, "recompute.mode=selective recompute.modules=[mla_up_proj]",
        "recompute.modules contains mla_up_proj: a qwen3_moe model", "Choose from core_attn, layernorm, moe or moe_act",
    ),
    "recomputed experts of a dense model": (
        "dense", 1, "recompute.mode=selective recompute.modules=[moe_act]",
        "contains moe_act: a llama model", "core_attn, layernorm or mlp",
    ),
    "more recomputed layers than a chunk has": (
        "dense", 4, "layout.pipeline=4 recompute.mode=full recompute.method=block recompute.layers=3",
        "recompute.layers = 3 with recompute.method = block: no rank runs more than 2 layers", "at most 2",
    ),
    # data
    "weights of some sources": (
        "dense", 1, 'data.sources=[{"path":"a.jsonl","weight":1},{"path":"b.jsonl"}]',
        "data.sources: b.jsonl has no weight", "every source, or to none",
    ),
    "template of nobody": (
        "dense", 1, "data.template=none data.chat_template=own.jinja",
        "data.chat_template = own.jinja with data.template = none", "data.template=chat",
    ),
    "two questions": (
        "dense", 1, 'data.sources=[{"path":"a.jsonl","prompt":"p","messages":"m"}]',
        "data source a.jsonl: prompt and messages are set", "Keep one",
    ),
    # sampling
    "episodes of nobody": (
        "dense", 1, "sampling.strategy=episodes",
        "sampling.strategy = episodes with sampling.environment = null", "Name one",
    ),
    "environment of nobody": (
        "dense", 1, "sampling.environment=mine:Game",
        "sampling.environment = mine:Game with sampling.strategy = grouped", "episodes or turn_groups",
    ),
    "partial and ahead": (
        "dense", 1, "sampling.partial=true sampling.ahead=2",
        "sampling.ahead = 2 with sampling.partial = true", "sampling.ahead=0",
    ),
    "samples longer than packs": (
        "dense", 1, "sampling.max_tokens=9000",
        "sampling.max_tokens = 9000 with batch.max_tokens = 8192", "at most 8192",
    ),
    "routing of a dense model": (
        "dense", 1, "sampling.routing=true",
        "sampling.routing = true: a llama model without experts routes nothing", "sampling.routing=false",
    ),
    "routing behind a router": (
        "moe", 1, "sampling.routing=true servers.router=http://127.0.0.1:9",
        "a router drops what servers return of it", "Remove servers.router",
    ),
    "replay behind a router": (
        "moe", 1, "objective.routing_replay=rollout servers.router=http://127.0.0.1:9",
        "objective.routing_replay = rollout with servers.router", "or set objective.routing_replay=policy",
    ),
    "replay of a dense model": (
        "dense", 1, "objective.routing_replay=policy",
        "objective.routing_replay = policy: a llama model without experts routes nothing", "objective.routing_replay=off",
    ),
    "replay of what is not returned": (
        "moe", 1, "objective.routing_replay=rollout sampling.routing=false",
        "objective.routing_replay = rollout with sampling.routing = false", "Set sampling.routing=true",
    ),
    "replay of no pass": (
        "moe", 1, "objective.routing_replay=policy objective.on_policy=true",
        "objective.routing_replay = policy with objective.on_policy = true", "to off or rollout",
    ),
    "replay of somebody else's pass": (
        "moe", 1, "objective.routing_replay=policy objective.old_log_probs=rollout",
        "objective.routing_replay = policy with objective.old_log_probs = rollout", "objective.routing_replay=rollout",
    ),
    "several updates on policy": (
        "dense", 1, "objective.on_policy=true batch.epochs=2",
        "objective.on_policy = true with batch.minibatches = 1 and batch.epochs = 2", "Set both to 1",
    ),
    "replay of nothing": (
        "dense", 1, "bank.replay=nowhere",
        "there is no bank in it (bank.json)", "runs/mine/bank",
    ),
    "evaluation without prompts": (
        "dense", 1, 'evaluation.every=5 rewards=[{"name":"math"}]',
        "evaluation.every = 5: there are no validation prompts", "data.validation_share",
    ),
    "evaluation without rewards": (
        "dense", 1, 'evaluation.every=5 data.validation_sources=[{"path":"test.jsonl"}]',
        "evaluation.every = 5 with rewards = []: no response would be right", "Name rewards",
    ),
    "responses too short to be long enough": (
        "dense", 1, "sampling.min_new_tokens=2000",
        "sampling.min_new_tokens = 2000 with sampling.max_new_tokens = 1024", "at most 1024",
    ),
    "more minibatches than groups": (
        "dense", 1, "batch.minibatches=33",
        "batch.minibatches = 33 with sampling.groups = 32", "at most 32",
    ),
    # first weights
    "first weights from a folder without any": (
        "dense", 1, "policy.init=configs",
        "configs: there is neither model.safetensors.index.json nor model.safetensors nor manifest.json in it",
        "or policy.init=random",
    ),
    # servers
    "an argument that SGLang has not": (
        "dense", 1, "sglang.mem_fraction_statik=0.5",
        "mem_fraction_statik", "mem_fraction_static",
    ),
    "a server that is no URL": (
        "dense", 1, "servers.urls=[node7:30000]",
        "servers.urls[0] = node7:30000: this is no URL", "http://host:port",
    ),
    "nobody samples": (
        "dense", 1, "servers.count=0",
        "servers.count = 0 without servers.urls", "at least 1",
    ),
    "colocated and ahead": (
        "dense", 1, "servers.placement=colocated sampling.ahead=1",
        "sampling.ahead = 1 with servers.placement = colocated: servers sleep", "sampling.ahead=0",
    ),
    "colocated and partial": (
        "dense", 1, "servers.placement=colocated sampling.partial=true",
        "sampling.partial = true with servers.placement = colocated: a server that sleeps", "sampling.partial=false",
    ),
    "colocated with requests that stay": (
        "dense", 1, "servers.placement=colocated servers.update=retract",
        "servers.update = retract with servers.placement = colocated", "servers.update=abort",
    ),
    "colocated behind a router": (
        "dense", 1, "servers.placement=colocated servers.router=http://127.0.0.1:9",
        "servers.router = http://127.0.0.1:9 with servers.placement = colocated", "Remove servers.router",
    ),
    "colocated and unable to sleep": (
        "dense", 1, "servers.placement=colocated sglang.enable-memory-saver=false",
        "sglang.enable_memory_saver = false with servers.placement = colocated", "Remove it",
    ),
    "colocated and cut into stages": (
        "dense", 1, "servers.placement=colocated sglang.pipeline_parallel_size=2",
        "sglang.pp_size = 2 with servers.placement = colocated", "Set sglang.pp_size=1",
    ),
    "servers on three GPUs": (
        "dense", 1, "sglang.tp_size=3",
        "sglang.tp_size = 3: SGLang cuts a model into equal parts, and its 8 attention heads do not divide by 3, its",
        "Set sglang.tp_size to 1, 2, 4 or 8.",
    ),
    "copies of attention on no whole GPUs": (
        "moe", 1, "sglang.tp_size=4 sglang.enable_dp_attention=true sglang.dp_size=3",
        "sglang.tp_size = 4 with sglang.dp_size = 3: each copy of attention", "multiple of 3",
    ),
    "experts on groups of three": (
        "moe", 1, "sglang.tp_size=4 sglang.expert-parallel-size=3",
        "sglang.ep_size = 3 with sglang.tp_size = 4: SGLang deals the model's 16 experts", "Set sglang.ep_size to 1, 2 or 4",
    ),
    # publish
    "files of a broadcast": (
        "dense", 1, "publish.keep_files=true publish.transport=broadcast",
        "publish.keep_files = true with publish.transport = broadcast", "publish.transport=disk",
    ),
    "a file for a folder": (
        "dense", 1, "publish.folder=README.md",
        "publish.folder = README.md: this is a file", "Name a folder",
    ),
    "probes longer than packs": (
        "dense", 1, "publish.probe_tokens=9000",
        "publish.probe_tokens = 9000: the policy takes sequences of 8192", "at most 8192",
    ),
    # observe
    "W&B without a project": (
        "dense", 1, "observe.wandb_mode=offline",
        "observe.wandb_mode = offline without observe.wandb_project", "Set observe.wandb_project",
    ),
    "W&B that is not installed": (
        "dense", 1, "observe.wandb_project=mine",
        "observe.wandb_project = mine: the package wandb is not installed", "Install it",
    ),
}  # fmt: skip
