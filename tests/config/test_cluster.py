"""Machines give the number of ranks."""

from pathlib import Path

from megatron_rl.config.load import load_settings


def test_machines_give_the_number_of_ranks(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"policy: {{config: {tmp_path}}}\ncluster: {{nodes: 4}}\n")
    assert load_settings(recipe).world_size == 32
    assert load_settings(recipe, ["cluster.gpus_per_node=4", "cluster.server_nodes=9"]).world_size == 16
    assert load_settings(recipe, ["cluster.nodes=null"]).world_size is None
    assert load_settings(recipe, ["cluster.nodes=null", "layout.world_size=6"]).world_size == 6
