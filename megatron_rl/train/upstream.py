"""Quiet for a user's terminal: what upstream packages say at every start and nobody can act on."""

import logging
import warnings


def quiet_upstream() -> None:
    """Call it before the packages are imported. Errors, and warnings of our own, still show."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")  # GPU packages that are not there, classes it deprecates
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # Megatron asks for it
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r"megatron\.core.*")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
