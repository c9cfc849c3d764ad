"""Rules about prompts."""

from collections.abc import Iterator

from megatron_rl.config.rules.case import Case, Rule, problem


def weights_are_given_to_all_sources_or_none(case: Case) -> Iterator[str]:
    sources = case.settings.data.sources
    without = [source.path for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        yield problem(
            f"data.sources: {without[0]} has no weight and others have",
            "a weight is a share beside the others'",
            "Give a weight to every source, or to none",
        )


def own_templates_are_used(case: Case) -> Iterator[str]:
    data = case.settings.data
    for name, given in (("chat_template", data.chat_template), ("chat_template_kwargs", data.chat_template_kwargs)):
        if data.template == "none" and given:
            yield problem(
                f"data.{name} = {given} with data.template = none",
                "prompts go to the model as they are, through no template",
                f"Set data.template=chat, or remove data.{name}",
            )


def a_source_has_one_way_to_its_question(case: Case) -> Iterator[str]:
    data = case.settings.data
    for source in (*data.sources, *data.validation_sources):
        given = [name for name in ("prompt", "messages", "wording") if getattr(source, name) is not None]
        if len(given) > 1:
            yield problem(
                f"data source {source.path}: {' and '.join(given)} are set",
                "each of them says what the question is",
                "Keep one",
            )


RULES: tuple[Rule, ...] = (
    weights_are_given_to_all_sources_or_none,
    own_templates_are_used,
    a_source_has_one_way_to_its_question,
)
