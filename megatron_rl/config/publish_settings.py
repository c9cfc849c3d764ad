"""The section `publish:` of the settings."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_rl.config.section import Section


class PublishSettings(Section):
    """How new weights reach the servers, and how it is proven that they did. See docs/publish.md.

    What becomes of requests meanwhile is `servers.update`, how long a server may take `servers.update_seconds`.
    """

    transport: Literal["auto", "disk", "broadcast", "tensor"] = Field(
        "auto",
        description="disk: files in a folder that all see. broadcast: a process group with each server. tensor: in the "
        "request, on GPUs as handles of shared memory. auto: what is fastest where the run is.",
    )
    bucket_bytes: PositiveInt = Field(
        512 * 2**20,
        description="Bytes of weights that travel at once. A rank holds up to three buckets beyond its weights, a server one.",
    )
    folder: Path | None = Field(
        None, description="For disk: a folder that all ranks and servers see. Default: a memory file system, on one machine."
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Format in which unquantised weights are sent; default: the policy's own."
    )
    senders: PositiveInt | None = Field(
        None, description="Ranks that broadcast, each to its share of the servers; default: one on each machine of the ranks."
    )
    keep_files: bool = Field(
        False, description="disk: keep the files until the next publish, so that servers that come late can load them at once."
    )
    probe: bool = Field(True, description="After each publish, compare every server's log-probs with the policy's.")
    probe_sequences: PositiveInt = Field(4, description="Sequences of random tokens that are compared, the same in every run.")
    probe_tokens: int | None = Field(None, ge=2, description="Tokens of each; default: 64, or as many as sequences may have.")
    tolerance: PositiveFloat | None = Field(
        None,
        description="Largest mean |difference| of a sequence's log-probs. Default by the policy's format: 1e-4 (float32), "
        "0.05 (bfloat16), 0.25 (FP8 servers).",
    )
