"""Whether a server can sample for this run, asked before it gets any work. Each problem comes with its fix."""

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_rl.config.architecture import Architecture
from megatron_rl.config.errors import UserError
from megatron_rl.config.families import read_architecture
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.errors import ServerError, Unsettled
from megatron_rl.rollout.replies import RoutingShape, ServerInfo

OF_NO_MATTER = ("init_std", "max_positions")  # of a model, to one that samples from it


class UnsuitableServer(UserError, RuntimeError):
    """A server that is not there, or not one for this run."""


@dataclass(frozen=True)
class Demands:
    """What a run asks of each of its servers."""

    family: str  # model_type
    vocabulary: int
    routing: RoutingShape | None = None  # None: routing is not asked for
    longest: int | None = None  # tokens of the longest sample
    seeded: bool = False
    sleeps: bool = False  # gives its memory back while the policy learns
    model: Architecture | None = None  # None: whatever it serves of the family

    @classmethod
    def of(
        cls,
        model: Architecture,
        *,
        routing: bool = False,
        longest: int | None = None,
        seeded: bool = False,
        sleeps: bool = False,
    ) -> "Demands":
        """What sampling from this model asks."""
        shape = None
        if routing:
            if not model.is_moe or model.experts is None:
                raise UserError(f"Routing cannot be replayed: a {model.family} model without experts has none. Turn it off.")
            shape = RoutingShape(model.layers, model.experts.top_k, model.experts.count)
        return cls(model.family, model.vocab, shape, longest, seeded, sleeps, model)


async def inspect(client: Client, demands: Demands) -> ServerInfo:
    """What the server can do, if that is what is asked; else UnsuitableServer with all that is in the way."""
    try:
        await client.rouse()  # somebody may have paused it, or put it to sleep, and gone
        info, model, vocabulary = await client.server_info(), await client.model_info(), await client.vocabulary_size()
    except Unsettled as error:
        raise UnsuitableServer(f"The server {client.url} cannot sample for this run: {error.what}.") from error
    except ServerError as error:
        raise UnsuitableServer(
            f"{error}. Is an SGLang server running there? Correct servers.urls, or start servers with `megatron-rl serve`."
        ) from error
    problems = []
    if model.family is not None and model.family != demands.family:
        problems.append(f"it serves {model.path}, a {model.family} model; this run trains a {demands.family} model")
    if vocabulary != demands.vocabulary:
        problems.append(f"its model ({model.path}) has {vocabulary} tokens; the policy's has {demands.vocabulary}")
    if demands.model is not None and not problems:
        problems += _differences(model.path, demands.model)
    if problems:
        problems.append("start it with the policy's model, or correct servers.urls")
    problems += shortcomings(info, demands)
    if problems:
        raise UnsuitableServer(f"The server {client.url} cannot sample for this run: {'; '.join(problems)}.")
    return info


def shortcomings(info: ServerInfo, demands: Demands) -> list[str]:
    """What it would have to be started with."""
    problems = []
    if demands.routing is not None and not info.returns_routing:
        problems.append("it does not return routing, which replay asks for: start it with --enable-return-routed-experts")
    if demands.seeded and not info.deterministic:
        problems.append("it does not heed seeds: start it with --enable-deterministic-inference, or sample without a seed")
    if demands.sleeps and not info.sleeps:
        problems.append(
            "it cannot give its memory back, as servers.placement=colocated asks: start it with --enable-memory-saver, or set "
            "servers.placement=separate"
        )
    if demands.longest is not None and info.longest_input < demands.longest:
        problems.append(
            f"it takes {info.longest_input} tokens at most, samples may have {demands.longest}: lower sampling.max_tokens, or "
            "start it with a longer --context-length"
        )
    return problems


def _differences(path: str, ours: Architecture) -> list[str]:
    """What is otherwise in the served model, where its folder is seen. Tensors of other shapes would end the server."""
    if not (Path(path) / "config.json").is_file():
        return []
    theirs = read_architecture(Path(path))
    names = [field.name for field in fields(Architecture) if field.name not in OF_NO_MATTER]
    differing = [name for name in names if getattr(theirs, name) != getattr(ours, name)]
    return [
        f"the {name} of its model ({path}) is {getattr(theirs, name)}; the policy's {getattr(ours, name)}" for name in differing
    ]
