"""Weights on the move: the map between Hugging Face and Megatron, files of both, conversion, export, quantisation."""
