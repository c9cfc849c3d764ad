"""Sampling: SGLang servers, the client that speaks to them, and the pool that spreads work over them."""
