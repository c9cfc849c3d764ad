"""What publishing tells of that somebody must mend."""

from megatron_rl.config.errors import UserError


class PublishError(UserError, RuntimeError):
    """Weights that could not be sent at all."""


class WrongWeights(PublishError):
    """A server that has taken all weights and computes otherwise than the policy. The run must not go on."""
