"""The plan of a run: memory of ranks and servers, whether all of it fits, and how long a step takes."""

from dataclasses import dataclass
from functools import cached_property

from megatron_rl.plan.job import Job
from megatron_rl.plan.machine import GIB
from megatron_rl.plan.memory import RankMemory, rank_memory
from megatron_rl.plan.publishing import publish_seconds, transport
from megatron_rl.plan.serving import (
    RolloutTime,
    Server,
    ServerMemory,
    free_for_servers,
    rollout_time,
    server_memory,
    server_of,
)
from megatron_rl.plan.training import TrainingTime, training_time

DAY = 86400


@dataclass(frozen=True)
class Plan:
    """What a job takes. Parts are reckoned when they are asked for: a search over layouts asks for few of them."""

    job: Job

    # -- the policy ----------------------------------------------------------------------------------------------------

    @cached_property
    def ranks(self) -> list[RankMemory]:
        """Of one rank of each pipeline stage."""
        return rank_memory(self.job)

    @property
    def largest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def limit(self) -> float:
        """Bytes that a rank may take at its peak."""
        asleep = self.job.machine.asleep_gib * GIB if self.samples and self.job.settings.servers.colocated else 0.0
        return self.job.machine.usable_bytes - asleep

    @cached_property
    def training(self) -> TrainingTime:
        return training_time(self.job)

    # -- the servers ---------------------------------------------------------------------------------------------------

    @property
    def samples(self) -> bool:
        """Does the run sample, or learn from a bank or from responses that are there?"""
        return self.job.settings.bank.replay is None and not self.job.workload.supervised

    @cached_property
    def server(self) -> Server:
        return server_of(self.job.settings, cpu=self.job.machine.cpu)

    @property
    def servers(self) -> int:
        """As many as the GPUs of cluster.server_nodes make, or those of the policy where they share them; else as the settings
        name or start."""
        settings = self.job.settings
        own, cluster = settings.servers, settings.cluster
        if own.urls:
            return len(own.urls)
        if own.colocated:
            return self.job.world_size // self.server.gpus
        if cluster.server_nodes:
            return cluster.server_nodes * cluster.gpus_per_node // self.server.gpus
        return own.count or 1

    @cached_property
    def server_memory(self) -> ServerMemory:
        return server_memory(self.job, self.server, free_for_servers(self.job, self._while_sampling))

    @property
    def _while_sampling(self) -> int:
        """Bytes of the policy when a server starts on its GPU: weights and masters; moments come with the first step."""
        rank = self.largest
        masters = rank.optimizer // 3 if self.job.bytes == 2 else 0
        return rank.weights + masters

    @cached_property
    def rollout(self) -> RolloutTime:
        return rollout_time(self.job, self.server, self.server_memory, self.servers)

    @property
    def transport(self) -> str:
        return transport(self.job)

    @property
    def publish(self) -> float:
        """Seconds."""
        return publish_seconds(self.job, self.server, self.servers)

    # -- the step ------------------------------------------------------------------------------------------------------

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of a step's phases by the names that the trainer gives them."""
        times = {"old": self.training.old, "update": self.training.update}
        if self.job.workload.supervised:
            del times["old"]
        return {"rollout": self.rollout.seconds, **times, "publish": self.publish} if self.samples else times

    @property
    def step_seconds(self) -> float:
        """Phases follow one another; sampling that runs ahead goes on beside learning."""
        phases = dict(self.phases)
        if self.samples and self.job.settings.sampling.ahead:
            phases["rollout"] = max(0.0, phases["rollout"] - phases["old"] - phases["update"])
        return sum(phases.values())

    @property
    def tokens_a_day(self) -> float:
        """Of prompts and responses that are learned from."""
        return self.job.workload.tokens / self.step_seconds * DAY

    # -- whether it fits -----------------------------------------------------------------------------------------------

    @property
    def policy_problems(self) -> list[str]:
        """Why the policy does not fit its GPUs."""
        machine, largest = self.job.machine, self.largest
        problems = []
        if largest.peak > self.limit:
            problems.append(
                f"a rank of pipeline stage {largest.stage} takes {gib(largest.peak)} at its peak, and {machine.name} has "
                f"{gib(self.limit)} for it ({machine.memory_gib:g} GiB less a reserve of {machine.reserve_gib:g} GiB"
                + (f" and {machine.asleep_gib:g} GiB of a sleeping server)" if self.limit < machine.usable_bytes else ")")
            )
        if self.job.fp8 and machine.tflops.fp8 is None:
            problems.append(f"precision.fp8 = transformer_engine: {machine.name} has no FP8 products. Set precision.fp8=off")
        return problems

    @property
    def server_problems(self) -> list[str]:
        """Why the servers do not fit theirs."""
        if not self.samples:
            return []
        memory, server, longest = self.server_memory, self.server, self.job.workload.prompt + self.job.workload.longest
        size = f"sglang.tp_size = {server.tensor}"
        if self.servers < 1:
            return [f"{size}: a server takes {server.gpus} GPUs, more than there are for servers. Lower it, or raise "
                    "cluster.server_nodes"]  # fmt: skip
        if memory.weights > memory.static:
            return [
                f"{size}: a server's weights, {gib(memory.weights)} on each GPU, do not fit the {gib(memory.static)} that it "
                "may take for weights, keys and values. Raise sglang.tp_size (or sglang.pp_size, sglang.mem_fraction_static), "
                "or serve in FP8"
            ]
        if memory.capacity < longest:
            return [
                f"{size}: a server can keep {memory.capacity:,} tokens, fewer than the {longest:,} of the longest sample. "
                "Raise sglang.tp_size, or lower sampling.max_new_tokens"
            ]
        if self.job.settings.servers.colocated:
            taken = self.largest.state + memory.static
            if taken > self.limit:
                return [
                    f"servers.placement = colocated: policy and server take {gib(taken)} together while servers sample, and "
                    f"there are {gib(self.limit)}. Lower sglang.mem_fraction_static, or spread the policy further"
                ]
        return []

    @property
    def problems(self) -> list[str]:
        return self.policy_problems + self.server_problems

    @property
    def fits(self) -> bool:
        return not self.problems


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
