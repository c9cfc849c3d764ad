"""Rules about evaluation."""

from collections.abc import Iterator

from megatron_rl.config.rules.case import Case, Rule, problem


def there_are_prompts_to_evaluate(case: Case) -> Iterator[str]:
    every, data = case.settings.evaluation.every, case.settings.data
    if every and not data.validation_sources and not (data.validation_share and data.sources):
        yield problem(
            f"evaluation.every = {every}",
            "there are no validation prompts",
            "Set data.validation_share (0.05, say) or data.validation_sources, or evaluation.every=0",
        )


def there_are_rewards_to_evaluate_by(case: Case) -> Iterator[str]:
    every = case.settings.evaluation.every
    if every and not case.settings.rewards:
        yield problem(
            f"evaluation.every = {every} with rewards = []",
            "no response would be right",
            "Name rewards, such as rewards=[{name: math}], or set evaluation.every=0",
        )


def greedy_responses_are_all_the_same(case: Case) -> Iterator[str]:
    evaluation = case.settings.evaluation
    if evaluation.every and evaluation.temperature == 0 and evaluation.samples > 1:
        yield problem(
            f"evaluation.samples = {evaluation.samples} with evaluation.temperature = 0",
            "the likeliest response is the same each time",
            "Set evaluation.samples=1, or a temperature",
        )


RULES: tuple[Rule, ...] = (there_are_prompts_to_evaluate, there_are_rewards_to_evaluate_by)
WARNINGS: tuple[Rule, ...] = (greedy_responses_are_all_the_same,)
