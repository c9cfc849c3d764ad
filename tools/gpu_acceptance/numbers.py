"""Does a policy compute the same on the GPU as on the CPU, where every layout and every part of it is tested?

The reference is the policy on a CPU in float32: torch's own layers over gloo, the path that the project's tests compare with
transformers. It is scored, takes one optimizer step by the supervised loss, and is scored again; whoever is compared with it
starts from the same weights and reads the same tokens. The step's epsilon is large, so that it is proportional to the gradient:
of plain Adam's first step only the gradient's sign would be seen, and where it is nearly zero that is chance.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rl.objectives.sft import SupervisedLoss
from megatron_rl.policy.policy import Policy
from megatron_rl.train.publishing import score
from tools.gpu_acceptance.child import Task
from tools.gpu_acceptance.models import opened, precision, sequences, settings_of, small
from tools.gpu_acceptance.parts import REFERENCE
from tools.gpu_acceptance.results import Finding

STEP = {"lr": 3e-4, "eps": 1e-3}
# Largest |difference| of a log-probability in float32: sums of hundreds of products in another order.
CLOSE = 1e-4
RELATIVE = 1e-4  # of the loss and of the gradient's norm in float32
# In bfloat16 the GPU may be as far from the reference as twice what the CPU is in bfloat16: rounding the same number of times,
# in another order.
SLACK = 2.0
LAYOUTS: Mapping[str, dict[str, int]] = {
    "tensor": {"tensor": 2},
    "expert": {"expert": 2},
    "pipeline": {"pipeline": 2},
    "context": {"context": 2},
}


@dataclass(frozen=True)
class Course:
    """What a policy says of the tokens, learns from them, and says then."""

    before: NDArray[np.float32]  # [tokens] log-probs
    loss: float
    grad_norm: float
    after: NDArray[np.float32]  # [tokens]

    @classmethod
    def of(cls, policy: Policy, given: list[Any]) -> Self:
        tokens = [sequence.tokens for sequence in given]
        before = np.concatenate(score(policy, tokens))
        report = policy.update(policy.pack(given), SupervisedLoss())
        return cls(before, report.loss, report.grad_norm, np.concatenate(score(policy, tokens)))

    @classmethod
    def load(cls, task: Task, format: str) -> Self:
        """The reference's, which must be of the model that is compared with it."""
        with np.load(task.folder / REFERENCE) as file:
            if str(file["about"]) != _about(task.smoke):
                raise RuntimeError(f"{REFERENCE} was made of another model: do --only reference --again")
            return cls(**{name: file[f"{format}_{name}"] for name in cls.__dataclass_fields__})


def save(task: Task, courses: Mapping[str, Course]) -> None:
    """Courses by format, for other parts."""
    arrays = {f"{format}_{name}": value for format, course in courses.items() for name, value in vars(course).items()}
    np.savez(task.folder / REFERENCE, about=_about(task.smoke), **arrays)


def _about(smoke: bool) -> str:
    """What a reference is of."""
    return json.dumps([asdict(small(smoke)), STEP])


def _run(task: Task, format: str, layout: Mapping[str, int] | None = None) -> Course:
    shape = small(task.smoke)
    sections: dict[str, Any] = {"precision": precision(format), "optimizer": STEP, "layout": dict(layout or {})}
    with opened(settings_of(shape, task.scratch, **sections), format) as policy:
        return Course.of(policy, sequences(shape, seed=0))


def reference(task: Task) -> Iterator[Finding]:
    """On the CPU, in float32 and in bfloat16, which shows how far rounding alone leads."""
    exact = _run(task, "float32")
    rounded = _run(task, "bfloat16")
    save(task, {"float32": exact, "bfloat16": rounded})
    yield Finding("tokens", float(len(exact.before)))
    yield Finding("loss in float32", exact.loss, "nats a token")
    yield Finding("norm of the gradient in float32", exact.grad_norm)
    yield Finding("what one update changes", _mean(exact.after, exact.before), "nats, mean |Δ log-prob|")
    yield Finding("bfloat16 on the CPU beside float32", _mean(rounded.before, exact.before), "nats, mean |Δ log-prob|")


def equal(task: Task) -> Iterator[Finding]:
    """One rank, of a format."""
    exact = Course.load(task, "float32")
    course = _run(task, task.variant)
    if task.variant.endswith("float32"):
        yield from _tight(course, exact)
        return
    rounded = Course.load(task, "bfloat16")
    allowed = SLACK * _mean(rounded.before, exact.before)
    later = SLACK * _mean(rounded.after, exact.after)
    yield Finding("log-probs", _mean(course.before, exact.before), "nats, mean |Δ|", allowed, "allowed: twice the CPU's")
    yield Finding("log-probs after an update", _mean(course.after, exact.after), "nats, mean |Δ|", later)
    yield Finding("loss", abs(course.loss - exact.loss), "nats, |Δ|", allowed)
    yield Finding("norm of the gradient", _relative(course.grad_norm, exact.grad_norm), "relative", 0.05)


def layout(task: Task) -> Iterator[Finding]:
    """Two ranks, in float32 by torch's own layers."""
    exact = Course.load(task, "float32")
    yield from _tight(_run(task, "float32", LAYOUTS[task.variant]), exact)


def _tight(course: Course, exact: Course) -> Iterator[Finding]:
    yield Finding("log-probs", float(np.abs(course.before - exact.before).max()), "nats, largest |Δ|", CLOSE)
    yield Finding("log-probs after an update", float(np.abs(course.after - exact.after).max()), "nats, largest |Δ|", 10 * CLOSE)
    yield Finding("loss", _relative(course.loss, exact.loss), "relative", RELATIVE)
    yield Finding("norm of the gradient", _relative(course.grad_norm, exact.grad_norm), "relative", RELATIVE)


def _mean(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).mean())


def _relative(one: float, other: float) -> float:
    return abs(float(one) - float(other)) / abs(float(other))
