"""Which curves the page draws, and what each says."""

from dataclasses import dataclass
from typing import Any

from megatron_rl.observe.vocabulary import meaning

# Shown large at the top of the page, where a run has them.
HEADLINES = (
    "reward/mean", "clip_fraction", "entropy", "old_k3", "mismatch_k3", "response/tokens", "rate/tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """Curves that share an axis. A name that ends in / means all metrics below it that no other chart has."""

    title: str
    text: str
    names: tuple[str, ...]


LEARNING = (
    Chart("Reward", "Mean over the step's samples: the whole, which the advantage is made of, and its components unweighted.",
          ("reward/mean", "reward/")),
    Chart("Spread of rewards", meaning("reward/std").text, ("reward/std",)),
    Chart("Loss", meaning("loss").text, ("loss", "negative_log_likelihood")),
    Chart("Clipped", "Share of sequences, and of tokens, whose gradient the clip took away. GSPO clips far more than GRPO.",
          ("clip_fraction", "clip_fraction_tokens")),
    Chart("Entropy", meaning("entropy").text, ("entropy",)),
    Chart("KL", "How far the policy is from the one that sampled, and from the reference model where there is one.",
          ("old_k1", "old_k3", "reference_k1", "reference_k3")),
    Chart("Gradient norm", meaning("grad_norm").text, ("grad_norm",)),
    Chart("Ratio", "New over old probability of a sequence, as the surrogate takes it: mean and extremes.",
          ("ratio", "ratio_min", "ratio_max")),
    Chart("Response length", "Tokens that the policy wrote in a sample.", ("response/tokens", "response/longest")),
    Chart("Cut off and failed", "Responses that a length limit ended, and samples without an honest reward, as shares.",
          ("response/cut_off", "sample/failed")),
    Chart("Groups that teach nothing", meaning("advantage/zero_groups").text, ("advantage/zero_groups", "zero_advantage")),
    Chart("Learning rate", meaning("lr").text, ("lr",)),
    Chart("Staleness", "Age of the weights that wrote the samples, in published versions.", ("staleness/",)),
)  # fmt: skip
MISMATCH = tuple(
    Chart(meaning(name).title, meaning(name).text, (name,))
    for name in (
        "mismatch_k1", "mismatch_k3", "mismatch_chi2", "mismatch_effective_share", "mismatch_max", "mismatch_perplexity_ratio",
        "publish/difference",
    )
)  # fmt: skip
SPEED = (
    Chart("Tokens per second", "Of the whole step, and of the phases that handle tokens.", ("rate/tokens", "rate/")),
    Chart("Seconds by phase", "The same seconds as above, as curves.", ("seconds/",)),
    Chart("Publishing", "Until all servers had the new weights, and how long they generated nothing for it.",
          ("publish/seconds", "publish/paused_seconds")),
    Chart("MFU", meaning("rate/mfu").text, ("rate/mfu",)),
    Chart("Memory", meaning("memory/peak").text, ("memory/",)),
)  # fmt: skip
EXPERTS = (
    Chart("Fullest expert", meaning("moe/max_over_mean").text, ("moe/max_over_mean",)),
    Chart("Changed and dropped", "Choices of experts that an update changed, and tokens that found no room, as shares.",
          ("moe/routing_changed", "moe/dropped", "moe/")),
    Chart("Routing replay", "Where routers would choose other experts than they repeat, and where trainer and server differ.",
          ("replay/differs", "replay/choices_differ", "replay/rollout_differs", "replay/rollout_choices_differ")),
    Chart("Samples without routing", meaning("replay/missing").text, ("replay/missing",)),
    Chart("Held for replay", meaning("replay/bytes").text, ("replay/bytes",)),
)  # fmt: skip
PANELS = {"learning": LEARNING, "mismatch": MISMATCH, "speed": SPEED, "experts": EXPERTS}


def charts(names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The charts of each panel that have anything to draw; metrics that none of them knows get one each, under `others`."""
    named = {name for panel in PANELS.values() for chart in panel for name in chart.names}
    taken: set[str] = set()
    found: dict[str, list[dict[str, Any]]] = {}
    for panel, members in PANELS.items():
        found[panel] = []
        for chart in members:
            own = [name for wanted in chart.names for name in _meant(wanted, names, named | taken)]
            taken.update(own)
            if own:
                found[panel].append(_described(chart.title, chart.text, own))
    rest = [name for name in names if name not in taken]
    found["others"] = [_described(meaning(name).title, meaning(name).text, [name]) for name in rest]
    return found


def _meant(wanted: str, names: list[str], taken: set[str]) -> list[str]:
    if wanted.endswith("/"):
        return [name for name in names if name.startswith(wanted) and name not in taken]
    return [wanted] if wanted in names else []


def _described(title: str, text: str, names: list[str]) -> dict[str, Any]:
    series = [{"name": name, **vars(meaning(name))} for name in names]
    return {"title": title, "text": text, "unit": meaning(names[0]).unit, "series": series}
