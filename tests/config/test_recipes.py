"""What stands in configs/: every recipe on every pair, models against published numbers, and the table of docs/recipes.md."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.checks import check, warnings
from megatron_rl.config.counting import active_parameters, model_parameters
from megatron_rl.config.families import read_architecture
from megatron_rl.config.load import load_settings
from megatron_rl.config.rules.launching import launch_problems
from megatron_rl.config.settings import Settings
from megatron_rl.config.show import render_layout
from megatron_rl.plan.job import Job, workload_of
from megatron_rl.plan.machine import find_machine
from megatron_rl.plan.plan import Plan
from megatron_rl.rewards import registry
from megatron_rl.train import objective

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs/recipes.md"


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


RECIPES, MODELS, CLUSTERS, PAIRS = map(names, ("recipes", "models", "clusters", "pairs"))
# What the hub counts in the weights, the biases of routers included, which no gradient moves.
IN_THE_WEIGHTS = {
    "deepseek-v3": 671_026_419_200,
    "kimi-k2": 1_026_408_232_448,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}
# 10^9 parameters, all and those active for a token, as authors state them.
STATED = {
    "deepseek-v3": (671, 37),
    "glm-4.5": (355, 32),
    "glm-4.5-air": (106, 12),
    "kimi-k2": (1040, 32.6),
    "mixtral-8x7b": (46.7, 12.9),
    "moonlight-16b-a3b": (15.29, 2.24),
    "olmoe-1b-7b": (6.9, 1.3),
    "qwen3-4b": (4.0, 4.0),
    "qwen3-8b": (8.2, 8.2),
    "qwen3-32b": (32.8, 32.8),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
}
WITHOUT_VOCABULARY = ("glm-4.5", "glm-4.5-air", "moonlight-16b-a3b")  # so their reports count
ROUNDING = 0.02  # authors round, and GLM's count its prediction layer
STATE = 18  # bytes a parameter while training, however it is dealt
GPU_BYTES = {"h100": 79.1 * 2**30, "h200": 139.8 * 2**30, "b200": 178 * 2**30}
ROOM = 0.8  # of them, for state


def architecture(model: str) -> Architecture:
    return read_architecture(CONFIGS / "models" / model)


def pair_of(model: str, cluster: str) -> str:
    return f"{model}-{cluster}"


def load(pair: str, recipe: str | None = None, *overrides: str) -> Settings:
    files = [CONFIGS / f"recipes/{recipe}.yaml"] if recipe else []
    first, *others = [*files, CONFIGS / f"pairs/{pair}.yaml"]
    return load_settings(first, [*map(str, others), *overrides])


def size_of(cluster: str) -> tuple[int, str]:
    """Machines and GPU: 4x8-h100 says both."""
    machines, _, gpu = cluster.partition("x8-")
    return int(machines), gpu


# -- models ------------------------------------------------------------------------------------------------------------


def test_every_model_has_its_numbers() -> None:
    configs = {path.parent.name for path in CONFIGS.glob("models/*/config.json")} - {"toy-moe"}
    assert configs == set(MODELS) == set(STATED) >= set(IN_THE_WEIGHTS)
    assert all(load_settings(CONFIGS / f"models/{model}.yaml").policy.config.name == model for model in MODELS)


@pytest.mark.parametrize("model", IN_THE_WEIGHTS)
def test_parameters_are_those_in_the_weights(model: str) -> None:
    shape = architecture(model)
    biases = shape.experts.count * sum(shape.moe_layers) if shape.experts and shape.experts.expert_bias else 0
    assert model_parameters(shape).total + biases == IN_THE_WEIGHTS[model]


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_those_that_authors_state(model: str) -> None:
    shape = architecture(model)
    parameters = model_parameters(shape)
    left_out = parameters.embedding + parameters.output if model in WITHOUT_VOCABULARY else 0
    counted = (parameters.total - left_out, active_parameters(shape) - left_out)
    assert [count / 1e9 for count in counted] == pytest.approx(STATED[model], rel=ROUNDING)


# -- recipes and pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_every_recipe_runs_on_a_pair(pair: str, tmp_path: Path) -> None:
    """It loads, passes every check without a warning, its ranks can be dealt out, and ranks and servers have the memory."""
    (tmp_path / "model.safetensors").touch()
    settings = load(pair)
    shape, ranks = read_architecture(settings.policy.config), settings.world_size
    assert ranks is not None
    render_layout(settings, shape, ranks)
    for recipe in RECIPES:
        settings = load(pair, recipe, f"policy.init={tmp_path}")
        assert (settings.world_size, recipe, [*check(settings, shape, ranks), *warnings(settings, shape, ranks)]) == (
            ranks,
            recipe,
            [],
        )
        assert settings.cluster.gpu is not None
        plan = Plan(Job(settings, shape, ranks, find_machine(settings.cluster.gpu), workload_of(settings, None, None)))
        assert (recipe, plan.problems, plan.samples) == (recipe, [], recipe != "sft")


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_can_be_launched(pair: str) -> None:
    """As it is, but for servers that need two machines: their pair says that they are started by other means."""
    settings = load(pair, "gspo")
    several = "two machines" in (CONFIGS / f"pairs/{pair}.yaml").read_text()
    problems = list(launch_problems(settings, "slurm", "all"))
    assert [("a server lives on one machine" in problem) for problem in problems] == [True] * several
    if several:
        cluster = settings.cluster.model_copy(update={"server_nodes": 0})
        assert list(launch_problems(settings.model_copy(update={"cluster": cluster}), "slurm", "all")) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_names_can_be_built(recipe: str) -> None:
    settings = load(PAIRS[0], recipe)
    registry.build(settings.rewards)
    objective.build(settings.objective)
    assert bool(settings.rewards) == (recipe != "sft")
    if settings.sampling.environment is not None:
        module, _, name = settings.sampling.environment.partition(":")
        getattr(import_module(module), name)(**settings.sampling.environment_options)


def test_recipes_know_no_machines_and_pairs_no_learning() -> None:
    """Else their order on the command line would matter where nobody expects it."""
    of_recipes = "data rewards scoring supervised sampling objective batch optimizer evaluation checkpoint observe run include"
    of_pairs = "include cluster layout recompute batch servers sglang"
    for recipe in RECIPES:
        values = yaml.safe_load((CONFIGS / f"recipes/{recipe}.yaml").read_text())
        assert set(values) <= set(of_recipes.split()), recipe
        assert "max_tokens" not in values.get("batch", {}), recipe
    for pair in PAIRS:
        values = yaml.safe_load((CONFIGS / f"pairs/{pair}.yaml").read_text())
        assert set(values) <= set(of_pairs.split()), pair


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_is_what_its_name_says(pair: str) -> None:
    model, cluster = next((model, cluster) for model in MODELS for cluster in CLUSTERS if pair_of(model, cluster) == pair)
    settings = load(pair)
    machines, gpu = size_of(cluster)
    assert settings.policy.config == CONFIGS / "models" / model
    assert (settings.cluster.nodes or 0) + settings.cluster.server_nodes == machines
    assert (settings.cluster.gpus_per_node, settings.cluster.gpu) == (8, gpu)
    assert settings.servers.colocated == (settings.cluster.server_nodes == 0)


# -- the page ----------------------------------------------------------------------------------------------------------


def table() -> dict[tuple[str, str], str]:
    """What docs/recipes.md says of each model on each cluster."""
    header, _, *rows = re.findall(r"^\| (?:model|\[|---).*\|$", PAGE.read_text().partition("## Which model")[2], re.M)
    clusters = [cell.strip() for cell in header.strip("|").split("|")][1:]
    found: dict[tuple[str, str], str] = {}
    for row in rows:
        first, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        model = re.match(r"\[([^\]]+)\]", first)
        assert model
        found |= {(model[1], cluster): cell for cluster, cell in zip(clusters, cells, strict=True)}
    return found


def share_of_memory(model: str, cluster: str) -> float:
    """That the state of training takes at least, with one machine left to servers where they share none."""
    machines, gpu = size_of(cluster)
    return model_parameters(architecture(model)).total * STATE / (max(machines - 1, 1) * 8 * GPU_BYTES[gpu])


def test_the_page_knows_every_model_on_every_cluster() -> None:
    said = table()
    assert set(said) == {(model, cluster) for model in MODELS for cluster in CLUSTERS}
    assert {pair_of(*where) for where, cell in said.items() if cell == "pair"} == set(PAIRS)
    assert set(said.values()) == {"pair", "too large", "too small"}


def test_what_the_page_gives_as_a_reason_is_one() -> None:
    for (model, cluster), cell in table().items():
        machines, gpu = size_of(cluster)
        assert (share_of_memory(model, cluster) > ROOM) == (cell == "too large"), (model, cluster)
        if cell == "too small":
            smaller = [other for other in CLUSTERS if size_of(other)[0] < machines and size_of(other)[1] == gpu]
            assert any(pair_of(model, other) in PAIRS for other in smaller), (model, cluster)


def test_the_page_tells_of_every_recipe() -> None:
    assert set(re.findall(r"\(\.\./configs/recipes/([\w-]+)\.yaml\)", PAGE.read_text())) == set(RECIPES)
