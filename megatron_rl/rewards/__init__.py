"""Rewards: what a response is worth. Built by `registry.build`, run by `model.RewardModel`."""
