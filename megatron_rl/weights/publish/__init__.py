"""Weights on their way to live servers: plan, transports, the protocol around an update, and the proof that it worked."""
