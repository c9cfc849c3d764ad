"""Rules about how steps are learned from, and kept."""

from collections.abc import Iterator

from megatron_rl.config.rules.case import Case, Rule, problem


def on_policy_is_one_update(case: Case) -> Iterator[str]:
    batch = case.settings.batch
    if case.settings.objective.on_policy and batch.minibatches * batch.epochs > 1:
        yield problem(
            f"objective.on_policy = true with batch.minibatches = {batch.minibatches} and batch.epochs = {batch.epochs}",
            "after its first update the policy is no more the one whose ratios are 1",
            "Set both to 1, or objective.on_policy=false",
        )


def replayed_routing_is_there(case: Case) -> Iterator[str]:
    objective, sampling = case.settings.objective, case.settings.sampling
    name = f"objective.routing_replay = {objective.routing_replay}"
    if objective.routing_replay != "off" and not case.architecture.is_moe:
        yield problem(
            name, f"a {case.architecture.family} model without experts routes nothing", "Set objective.routing_replay=off"
        )
    if objective.routing_replay == "rollout" and sampling.routing is False and case.settings.bank.replay is None:
        yield problem(
            f"{name} with sampling.routing = false",
            "servers would not return what is to be replayed",
            "Set sampling.routing=true, or objective.routing_replay=policy",
        )
    if objective.routing_replay != "policy":
        return
    if objective.on_policy:
        yield problem(
            f"{name} with objective.on_policy = true",
            "the one update of a step has no pass before it whose routing it could repeat",
            "Set objective.routing_replay to off or rollout, or objective.on_policy=false",
        )
    elif objective.old_log_probs == "rollout":
        yield problem(
            f"{name} with objective.old_log_probs = rollout",
            "the trainer does not compute `old`, so it has no routing of it",
            "Set objective.routing_replay=rollout, or objective.old_log_probs=recompute",
        )


def replayed_bank_is_there(case: Case) -> Iterator[str]:
    replay = case.settings.bank.replay
    if replay is not None and not (replay / "bank.json").is_file():
        yield problem(
            f"bank.replay = {replay}", "there is no bank in it (bank.json)", "Name a run's bank folder, such as runs/mine/bank"
        )


def kept_steps_reach_back_to_the_checkpoint(case: Case) -> Iterator[str]:
    keep, every = case.settings.bank.keep_steps, case.settings.checkpoint.every or case.settings.run.steps
    if keep is not None and keep < every:
        yield problem(
            f"bank.keep_steps = {keep} with a checkpoint every {every} steps",
            "a killed run learns again from the steps since its checkpoint, and those no more kept are sampled anew",
            f"Set bank.keep_steps to at least {every}, or checkpoint.every to at most {keep}",
        )


RULES: tuple[Rule, ...] = (on_policy_is_one_update, replayed_routing_is_there, replayed_bank_is_there)
WARNINGS: tuple[Rule, ...] = (kept_steps_reach_back_to_the_checkpoint,)
