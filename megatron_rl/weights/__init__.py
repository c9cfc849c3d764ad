"""Weights on the move: quantisation now; the Hugging Face map, conversion and publishing later."""
