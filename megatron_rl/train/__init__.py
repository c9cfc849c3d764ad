"""Training: the loop and what it is made of.

The room can be called like the function at its heart, so that `from megatron_rl import train` gives something to call
whichever of the two Python finds under that name.
"""

import sys
from types import ModuleType
from typing import Any


class Room(ModuleType):
    """This module."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """See `megatron_rl.train.run.train`."""
        from megatron_rl.train.run import train

        return train(*arguments, **named)


sys.modules[__name__].__class__ = Room
