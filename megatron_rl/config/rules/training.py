"""Rules about first weights, schedules and recomputation."""

from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.layout_map import chunk_sizes
from megatron_rl.config.rules.case import Case, Rule, either, problem

# A Hugging Face checkpoint has one of the first two, one of this program's the last.
CHECKPOINT_FILES = ("model.safetensors.index.json", "model.safetensors", "manifest.json")


def first_weights_are_there(case: Case) -> Iterator[str]:
    init = case.settings.policy.init
    if init != "random" and not any((Path(init) / name).is_file() for name in CHECKPOINT_FILES):
        yield problem(
            f"policy.init = {init}",
            f"there is neither {' nor '.join(CHECKPOINT_FILES)} in it",
            "Name the folder of a Hugging Face checkpoint in safetensors files or of one of a run, or policy.init=random",
        )


def first_weights_are_drawn_by_chance(case: Case) -> Iterator[str]:
    """A run that is there already goes on from its checkpoints, whatever it began with."""
    policy, folder = case.settings.policy, case.settings.run.directory
    if policy.init == "random" and not (folder / "settings.yaml").is_file():
        yield problem(
            "policy.init = random",
            f"a run that begins with these settings begins with weights drawn by chance: of {policy.config} it takes the shape "
            "alone, and nothing that the model has learned",
            "Set policy.init to the folder of its checkpoint, a Hugging Face one or one of a run; leave it for a toy",
        )


def learning_rate_falls(case: Case) -> Iterator[str]:
    optimizer = case.settings.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield problem(
            f"optimizer.min_lr = {optimizer.min_lr} with optimizer.lr = {optimizer.lr}",
            "the learning rate falls from lr to min_lr, it cannot end above its peak",
            f"Set optimizer.min_lr to at most {optimizer.lr}",
        )


def warmup_ends_before_the_decay(case: Case) -> Iterator[str]:
    optimizer, steps = case.settings.optimizer, case.settings.optimizer_steps
    whole = "run.steps" if steps == case.settings.run.steps else "run.steps x batch.minibatches x batch.epochs"
    name, end = (whole, steps) if optimizer.decay_steps is None else ("optimizer.decay_steps", optimizer.decay_steps)
    if optimizer.warmup_steps >= end:
        yield problem(
            f"optimizer.warmup_steps = {optimizer.warmup_steps} with {name} = {end}",
            "the schedule would end before the warm-up does",
            f"Set optimizer.warmup_steps below {end}",
        )


def weight_decay_schedule_has_an_end(case: Case) -> Iterator[str]:
    optimizer = case.settings.optimizer
    schedule, end = optimizer.weight_decay_schedule, optimizer.weight_decay_end
    if schedule != "constant" and end is None:
        yield problem(
            f"optimizer.weight_decay_schedule = {schedule}",
            "no weight decay is given for it to reach",
            "Set optimizer.weight_decay_end, or optimizer.weight_decay_schedule=constant",
        )
    if schedule == "constant" and end not in (None, optimizer.weight_decay):
        yield problem(
            f"optimizer.weight_decay_end = {end} with optimizer.weight_decay_schedule = constant",
            f"a constant weight decay stays at optimizer.weight_decay = {optimizer.weight_decay}",
            "Set optimizer.weight_decay_schedule to linear or cosine, or remove optimizer.weight_decay_end",
        )


def recomputed_modules_are_named(case: Case) -> Iterator[str]:
    recompute = case.settings.recompute
    if recompute.mode == "selective" and not recompute.modules:
        yield problem(
            "recompute.modules = [] with recompute.mode = selective",
            "no module is named to recompute",
            "Name one, such as recompute.modules=[core_attn], or set recompute.mode=none",
        )


def recomputed_modules_exist(case: Case) -> Iterator[str]:
    recompute, model = case.settings.recompute, case.architecture
    exists = {
        "mla_up_proj": model.latent_attention is not None,
        "mlp": case.experts is None or not all(model.moe_layers),
        "moe": case.experts is not None,
        "moe_act": case.experts is not None,
        "shared_experts": case.experts is not None and case.experts.shared_hidden > 0,
    }
    for module in recompute.modules if recompute.mode == "selective" else ():
        if not exists.get(module, True):
            others = either(name for name in ("core_attn", "layernorm", *exists) if exists.get(name, True))
            yield problem(
                f"recompute.modules contains {module}",
                f"a {model.family} model of this shape has no such module",
                f"Choose from {others}",
            )


def recomputed_layers_fit_a_chunk(case: Case) -> Iterator[str]:
    recompute, layout, layers = case.settings.recompute, case.layout, case.architecture.layers
    if recompute.mode != "full" or (layout.pipeline_layers is None and layers % (layout.pipeline * layout.virtual_pipeline)):
        return  # a split that does not divide is reported by the layout rules
    most = max(chunk_sizes(layout, layers), default=0)
    if recompute.layers > most:
        yield problem(
            f"recompute.layers = {recompute.layers} with recompute.method = {recompute.method}",
            f"no rank runs more than {most} layers in one go (layout.pipeline, layout.virtual_pipeline)",
            f"Set recompute.layers to at most {most}",
        )


RULES: tuple[Rule, ...] = (
    first_weights_are_there,
    learning_rate_falls,
    warmup_ends_before_the_decay,
    weight_decay_schedule_has_an_end,
    recomputed_modules_are_named,
    recomputed_modules_exist,
    recomputed_layers_fit_a_chunk,
)
WARNINGS: tuple[Rule, ...] = (first_weights_are_drawn_by_chance,)
