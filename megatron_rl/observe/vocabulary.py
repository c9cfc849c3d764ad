"""What metrics mean: a name for people, a unit, and a sentence. Names that are not here are shown as they are."""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["", "nats", "tokens", "share", "ratio", "tokens/s", "s", "bytes", "steps", "FLOP/s"]


@dataclass(frozen=True)
class Meaning:
    """What a metric is."""

    title: str
    text: str
    unit: Unit = ""


SEQUENCE_RATIO = "of the sequences' ratios new / old, as the surrogate takes them"

KNOWN: dict[str, Meaning] = {
    "reward/mean": Meaning("reward", "Mean reward of the step's samples: the weighted sum of components."),
    "reward/std": Meaning("spread of rewards", "Standard deviation of the reward over the step's samples."),
    "loss": Meaning("loss", "What the optimizer steps on, penalties included. Its level says little, jumps say much."),
    "negative_log_likelihood": Meaning("−log p", "Mean −log p of the tokens to be learned.", "nats"),
    "grad_norm": Meaning("gradient norm", "Norm of the whole gradient before it is clipped."),
    "skipped_updates": Meaning("skipped updates", "Optimizer steps left out: the loss or the gradient was not finite."),
    "lr": Meaning("learning rate", "Of the last optimizer step."),
    "clip_fraction": Meaning("clipped", "Share of sequences whose gradient the clip took away.", "share"),
    "clip_fraction_tokens": Meaning("clipped, by tokens", "Share of tokens whose gradient the clip took away.", "share"),
    "ratio": Meaning("ratio", f"Mean {SEQUENCE_RATIO}.", "ratio"),
    "ratio_deviation": Meaning("|ratio − 1|", f"Mean distance from 1 {SEQUENCE_RATIO}."),
    "ratio_std": Meaning("spread of ratios", f"Standard deviation {SEQUENCE_RATIO}."),
    "ratio_min": Meaning("smallest ratio", f"Smallest {SEQUENCE_RATIO}.", "ratio"),
    "ratio_max": Meaning("largest ratio", f"Largest {SEQUENCE_RATIO}.", "ratio"),
    "entropy": Meaning("entropy", "Mean entropy of the policy over its tokens. Near 0 it has stopped to explore.", "nats"),
    "old_k1": Meaning("KL(old ‖ new), k1", "How far updates moved the policy from the one that sampled: mean of −d.", "nats"),
    "old_k3": Meaning("KL(old ‖ new), k3", "The same by an estimate that is never negative: mean of e^d − 1 − d.", "nats"),
    "reference_k1": Meaning("KL(new ‖ reference), k1", "How far the policy is from the reference model.", "nats"),
    "reference_k3": Meaning("KL(new ‖ reference), k3", "The same by an estimate that is never negative.", "nats"),
    "mismatch_k1": Meaning("mismatch k1", "KL(rollout ‖ old) as the mean of −x, x = log-prob of trainer − of server.", "nats"),
    "mismatch_k3": Meaning("mismatch k3", "The same KL by an estimate that is never negative: mean of e^x − 1 − x.", "nats"),
    "mismatch_chi2": Meaning("mismatch χ²", "Mean of e^(2x) − 1: the variance that importance weights would have."),
    "mismatch_effective_share": Meaning("effective samples", "Effective sample size of importance weights e^x.", "share"),
    "mismatch_max": Meaning("largest |log-ratio|", "Largest |x| of any token: trainer against server.", "nats"),
    "mismatch_perplexity_ratio": Meaning("perplexity ratio", "Perplexity of the trainer over the server's; 1: equal.", "ratio"),
    "zero_advantage": Meaning("advantage 0", "Share of sequences that teach nothing, their advantage being 0.", "share"),
    "advantage/abs_mean": Meaning("|advantage|", "Mean absolute advantage of the step's samples."),
    "advantage/zero_groups": Meaning("equal groups", "Share of groups whose samples all earned the same.", "share"),
    "response/tokens": Meaning("response length", "Mean tokens that the policy wrote in a sample.", "tokens"),
    "response/longest": Meaning("longest response", "Most tokens that the policy wrote in a sample.", "tokens"),
    "response/cut_off": Meaning("cut off", "Share of responses that a length limit ended.", "share"),
    "sample/failed": Meaning("without reward", "Share of samples whose reward could not be found out.", "share"),
    "rate/tokens": Meaning("throughput", "Tokens of the step, prompts included, by the seconds of the step.", "tokens/s"),
    "rate/sample": Meaning("sampling", "Tokens that the policy wrote, by the seconds of sampling.", "tokens/s"),
    "rate/old": Meaning("scoring", "Tokens by the seconds of old log-probs.", "tokens/s"),
    "rate/update": Meaning("updating", "Tokens by the seconds of updates.", "tokens/s"),
    "rate/mfu": Meaning("MFU", "Model FLOPs of the update as a share of what the GPUs could do.", "share"),
    "memory/peak": Meaning("peak memory", "Largest memory of a rank in the step.", "bytes"),
    "staleness/mean": Meaning("staleness", "Mean age of the weights that wrote the samples, in published versions.", "steps"),
    "staleness/max": Meaning("oldest weights", "Age of the oldest weights that wrote a sample.", "steps"),
    "publish/seconds": Meaning("publishing", "Seconds until all servers had the new weights.", "s"),
    "publish/paused_seconds": Meaning("servers paused", "Longest time that a server generated nothing for it.", "s"),
    "publish/megabytes": Meaning("published", "Megabytes of weights sent."),
    "publish/servers": Meaning("servers", "Servers that run the new weights."),
    "publish/failed_servers": Meaning("servers that failed", "Servers that did not take the new weights."),
    "publish/difference": Meaning("probe", "Largest mean |difference| of log-probs after publishing: server, trainer.", "nats"),
    "sampling/thrown_away": Meaning("thrown away", "Groups whose rewards were all equal, in whose place others were sampled."),
    "sampling/failed_prompts": Meaning("prompts failed", "Prompts that could not be sampled."),
    "sampling/cut_off": Meaning("carried over", "Responses that go on in the next step."),
    "moe/max_over_mean": Meaning("fullest expert", "Tokens of the fullest expert over the mean, the worst layer's."),
    "moe/dropped": Meaning("dropped tokens", "Share of tokens that an expert had no room for.", "share"),
    "replay/differs": Meaning(
        "told otherwise",
        "Share of tokens x layers whose router would choose other experts than it repeats, in updates.",
        "share",
    ),
    "replay/choices_differ": Meaning(
        "choices told otherwise", "Share of expert choices that routers would make and do not, in updates.", "share"
    ),
    "replay/rollout_differs": Meaning(
        "trainer and server differ", "Share of tokens x layers for which trainer and server choose other experts.", "share"
    ),
    "replay/rollout_choices_differ": Meaning(
        "differing choices", "Share of the trainer's expert choices that the server did not make.", "share"
    ),
    "replay/missing": Meaning("without routing", "Share of samples of which the servers returned no routing.", "share"),
    "replay/bytes": Meaning("held for replay", "Expert choices that the fullest rank holds for a step.", "bytes"),
    "moe/routing_changed": Meaning("changed routing", "Share of expert choices that the update changed.", "share"),
}


def meaning(name: str) -> Meaning:
    """What a metric of this name is."""
    if name in KNOWN:
        return KNOWN[name]
    room, _, rest = name.partition("/")
    if room == "seconds":
        return Meaning(rest, f"Seconds of the phase {rest}.", "s")
    if room == "reward" and rest:
        return Meaning(rest, f"Mean of the reward component {rest}, unweighted.")
    return Meaning(name, f"As {name} in metrics.jsonl.")
