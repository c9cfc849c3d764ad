"""Settings of the machines that a run is meant for."""

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_rl.config.section import Section


class ClusterSettings(Section):
    """The machines a run is planned for, checked against, and launched on; the layout is worked out for their GPUs."""

    nodes: PositiveInt | None = Field(
        None, description="Machines whose GPUs hold the policy. With gpus_per_node it gives layout.world_size."
    )
    gpus_per_node: PositiveInt = Field(8, description="GPUs of a machine, and so ranks on it; without GPUs, ranks on it.")
    server_nodes: NonNegativeInt = Field(
        0, description="Machines for servers alone; 0: servers share the policy's machines, or are somebody else's."
    )
    gpu: str | None = Field(
        None, description="Kind of GPU, such as h100: what `megatron-rl plan` reckons memory and time with."
    )

    @property
    def ranks(self) -> int | None:
        """Of the policy, where it is known on how many machines it shall live."""
        return None if self.nodes is None else self.nodes * self.gpus_per_node
