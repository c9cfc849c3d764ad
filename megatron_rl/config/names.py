"""The dotted names of all settings: what each allows, and which one a wrong name was meant to be."""

import difflib
import types
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_rl.config.settings import Settings

# Names that other trainers use; nobody coming from there should have to search.
FOREIGN_NAMES = {
    "adv_estimator": "objective.advantage",
    "advantage_estimator": "objective.advantage",
    "clip_grad_norm": "optimizer.clip_grad",
    "clip_ratio_high": "objective.options.clip_high",
    "clip_ratio_low": "objective.options.clip_low",
    "context_parallel_size": "layout.context",
    "cp": "layout.context",
    "default_local_dir": "run.directory",
    "ep": "layout.expert",
    "eps_clip": "objective.options.clip_low",
    "eps_clip_high": "objective.options.clip_high",
    "epsilon": "objective.options.clip_low",
    "epsilon_high": "objective.options.clip_high",
    "etp": "layout.expert_tensor",
    "eval_steps": "evaluation.every",
    "expert_model_parallel_size": "layout.expert",
    "expert_tensor_parallel_size": "layout.expert_tensor",
    "hf_checkpoint": "policy.init",
    "learning_rate": "optimizer.lr",
    "loss_mode": "objective.surrogate",
    "loss_type": "objective.surrogate",
    "lr_decay_style": "optimizer.lr_schedule",
    "lr_scheduler_type": "optimizer.lr_schedule",
    "max_completion_length": "sampling.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "sampling.max_new_tokens",
    "max_seq_len": "batch.max_sequence",
    "max_steps": "run.steps",
    "max_tokens_per_gpu": "batch.max_tokens",
    "model": "policy.config",
    "model_path": "policy.config",
    "n": "sampling.group_size",
    "n_samples_per_prompt": "sampling.group_size",
    "num_generations": "sampling.group_size",
    "num_iterations": "batch.epochs",
    "num_rollout": "run.steps",
    "output_dir": "run.directory",
    "pipeline_model_parallel_size": "layout.pipeline",
    "pp": "layout.pipeline",
    "ppo_epochs": "batch.epochs",
    "ppo_max_token_len_per_gpu": "batch.max_tokens",
    "ppo_mini_batch_size": "batch.minibatches",
    "reward_funcs": "rewards",
    "rollout_batch_size": "sampling.groups",
    "rollout_max_response_len": "sampling.max_new_tokens",
    "save_freq": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "seq_length": "batch.max_sequence",
    "sp": "layout.sequence_parallel",
    "tensor_model_parallel_size": "layout.tensor",
    "test_freq": "evaluation.every",
    "tp": "layout.tensor",
    "train_batch_size": "sampling.groups",
    "train_files": "data.sources",
    "train_iters": "run.steps",
    "use_distributed_optimizer": "layout.distributed_optimizer",
    "val_files": "data.validation_sources",
    "virtual_pipeline_model_parallel_size": "layout.virtual_pipeline",
    "vpp": "layout.virtual_pipeline",
}
SIMILAR = 0.6  # difflib ratio from which a name counts as a slip of the pen for another


@cache
def setting_fields() -> dict[str, FieldInfo]:
    """Every setting by its dotted name, in the order of declaration."""
    return dict(_fields(Settings, ""))


@cache
def section_names() -> frozenset[str]:
    """The dotted names that hold settings instead of being one."""
    names = (name.split(".")[:depth] for name in setting_fields() for depth in range(1, name.count(".") + 1))
    return frozenset(".".join(parts) for parts in names)


@cache
def open_names() -> frozenset[str]:
    """The settings that hold named values of the user's choice: `objective.options` and its like."""
    return frozenset(name for name, field in setting_fields().items() if get_origin(field.annotation) is dict)


def open_name(name: str) -> str | None:
    """The open setting that a dotted name is or lies in: `objective.options` for `objective.options.clip_low`."""
    return next((known for known in open_names() if name == known or name.startswith(f"{known}.")), None)


def _fields(model: type[BaseModel], prefix: str) -> Iterable[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def nearest_name(unknown: str) -> str | None:
    """The valid dotted name that `unknown` most likely stands for: the same or nearly the same last word, in any section."""
    section, _, word = unknown.rpartition(".")
    if section in setting_fields():
        return section  # more was written behind a setting
    if word in FOREIGN_NAMES:
        return FOREIGN_NAMES[word]

    def score(name: str) -> tuple[bool, float]:
        other_section, _, other_word = name.rpartition(".")
        words, sections = _ratio(word, other_word), _ratio(section, other_section)
        return words >= SIMILAR, 0.75 * words + 0.25 * sections

    best = max(setting_fields(), key=score)
    return best if score(best)[0] else None


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()


def allowed_values(field: FieldInfo) -> str:
    """What a setting may be, in words: `a whole number of at least 1, or null`."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: Any, metadata: Iterable[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return ", or ".join("null" if option is type(None) else _allowed(option, ()) for option in arguments)
    if origin is Literal:
        return arguments[0] if len(arguments) == 1 else "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list, each entry {_allowed(arguments[0], ())}"
    if origin is dict:
        return "named values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        members = ", ".join(f"{f.alias or name}: {_allowed(f.annotation, f.metadata)}" for name, f in fields)
        return f"{{{members}}}"
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "text"}
    return words[annotation] + _bounds(annotation, metadata)


def _bounds(annotation: Any, metadata: Iterable[Any]) -> str:
    words = []
    for limit in metadata:
        match limit:
            case object(gt=low) if annotation is int and isinstance(low, int):
                words.append(f"of at least {low + 1}")
            case object(gt=low):
                words.append(f"above {low}")
            case object(ge=low):
                words.append(f"of at least {low}")
            case object(lt=high):
                words.append(f"below {high}")
            case object(le=high):
                words.append(f"of at most {high}")
    return "".join(f" {word}" for word in words[:1]) + "".join(f" and {word}" for word in words[1:])
