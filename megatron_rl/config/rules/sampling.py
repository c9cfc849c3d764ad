"""Rules about how groups are sampled."""

from collections.abc import Iterator

from megatron_rl.config.rules.case import Case, Rule, problem

EPISODES = ("episodes", "turn_groups")
ROLLOUT_REPLAY, OTHER_REPLAY = "objective.routing_replay = rollout", "objective.routing_replay=policy"


def episodes_have_an_environment(case: Case) -> Iterator[str]:
    sampling = case.settings.sampling
    if sampling.strategy in EPISODES and sampling.environment is None:
        yield problem(
            f"sampling.strategy = {sampling.strategy} with sampling.environment = null",
            "somebody must answer the policy's turns",
            "Name one, such as sampling.environment=megatron_rl.rollout.environments.calculator:Calculator",
        )
    if sampling.strategy not in EPISODES and sampling.environment is not None:
        yield problem(
            f"sampling.environment = {sampling.environment} with sampling.strategy = {sampling.strategy}",
            "single responses meet no environment",
            "Set sampling.strategy to episodes or turn_groups, or remove sampling.environment",
        )


def routing_needs_experts(case: Case) -> Iterator[str]:
    if case.settings.sampling.routing and not case.architecture.is_moe:
        yield problem(
            "sampling.routing = true",
            f"a {case.architecture.family} model without experts routes nothing",
            "Set sampling.routing=false",
        )
    if case.settings.keeps_routing and case.settings.servers.router is not None and case.settings.bank.replay is None:
        asked = case.settings.sampling.routing
        name, fix = ("sampling.routing = true", "sampling.routing=false") if asked else (ROLLOUT_REPLAY, OTHER_REPLAY)
        yield problem(
            f"{name} with servers.router = {case.settings.servers.router}",
            "a router drops what servers return of it",
            f"Remove servers.router, or set {fix}",
        )


def partial_and_ahead_are_two_ways(case: Case) -> Iterator[str]:
    sampling = case.settings.sampling
    if sampling.partial and sampling.ahead:
        yield problem(
            f"sampling.ahead = {sampling.ahead} with sampling.partial = true",
            "steps are filled either in order, some updates ahead, or by what is done first",
            "Set sampling.ahead=0, or sampling.partial=false",
        )


def samples_fit_into_packs(case: Case) -> Iterator[str]:
    sampling, batch = case.settings.sampling, case.settings.batch
    longest = batch.max_sequence or batch.max_tokens
    if sampling.max_tokens is not None and sampling.max_tokens > longest:
        name = "batch.max_sequence" if batch.max_sequence else "batch.max_tokens"
        yield problem(
            f"sampling.max_tokens = {sampling.max_tokens} with {name} = {longest}",
            "longer samples could not be learned from",
            f"Set sampling.max_tokens to at most {longest}, or raise {name}",
        )


def fewest_tokens_fit(case: Case) -> Iterator[str]:
    sampling = case.settings.sampling
    if sampling.min_new_tokens > sampling.max_new_tokens:
        yield problem(
            f"sampling.min_new_tokens = {sampling.min_new_tokens} with sampling.max_new_tokens = {sampling.max_new_tokens}",
            "no response could be long enough",
            f"Set sampling.min_new_tokens to at most {sampling.max_new_tokens}",
        )


def minibatches_hold_groups(case: Case) -> Iterator[str]:
    sampling, batch = case.settings.sampling, case.settings.batch
    if batch.minibatches > sampling.groups:
        yield problem(
            f"batch.minibatches = {batch.minibatches} with sampling.groups = {sampling.groups}",
            "a minibatch holds whole groups, at least one",
            f"Set batch.minibatches to at most {sampling.groups}",
        )


def cut_distributions_are_not_what_is_scored(case: Case) -> Iterator[str]:
    sampling = case.settings.sampling
    cuts = {"top_p": sampling.top_p < 1, "top_k": sampling.top_k is not None, "min_p": sampling.min_p > 0}
    if any(cuts.values()):
        names = " and ".join(f"sampling.{name} = {getattr(sampling, name)}" for name, cut in cuts.items() if cut)
        yield problem(
            names,
            "tokens are drawn from a part of the distribution, and their log-probabilities are those of the whole one",
            "Ratios compare whole distributions too; leave the cuts out unless you mean it",
        )


def masked_ends_are_scored_as_masked(case: Case) -> Iterator[str]:
    least = case.settings.sampling.min_new_tokens
    if least > 0:
        yield problem(
            f"sampling.min_new_tokens = {least}",
            "servers rule out the tokens that end a response until then, and report the log-probabilities of what is left; "
            "the policy's are those of all tokens",
            "Set sampling.min_new_tokens=0, and reward the length instead: rewards=[{name: length, options: {low: …}}]",
        )


RULES: tuple[Rule, ...] = (
    routing_needs_experts,
    episodes_have_an_environment,
    partial_and_ahead_are_two_ways,
    samples_fit_into_packs,
    fewest_tokens_fit,
    minibatches_hold_groups,
)
WARNINGS: tuple[Rule, ...] = (cut_distributions_are_not_what_is_scored, masked_ends_are_scored_as_masked)
