"""megatron_rl: reinforcement learning of mixture-of-experts language models on stock Megatron-core and SGLang."""

__version__ = "0.1.0"
