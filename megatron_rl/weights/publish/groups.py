"""A process group of one trainer rank and the ranks of one server, over which weights are broadcast.

A group a server: one that dies breaks only its own. The group is ours alone (no default group is touched, nothing is
registered), and lives for one publish, so that servers may come and go between two. SGLang forms its side with torch's
`_new_process_group_helper`; the prefixes of the store below are those that it writes under.
"""

import asyncio
import secrets
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.weights.publish.errors import PublishError
from megatron_rl.weights.publish.ports import Backend, Server
from megatron_rl.weights.publish.waiting import in_thread, together


class UpdateGroup:
    """The sender's end. `broadcast` sends, `close` leaves, whatever state the other end is in."""

    def __init__(self, name: str, url: str, group: Any, device: torch.device) -> None:
        self.name = name
        self.url = url  # of the server at the other end
        self.device = device
        self._group = group

    @classmethod
    async def form(cls, server: Server, tensor_parallel: int, device: torch.device, seconds: float) -> "UpdateGroup":
        """Meet the server's ranks. They are told where over HTTP; the store listens on the address that they reach us by."""
        name = f"megatron-rl-{secrets.token_hex(4)}"
        backend: Backend = "nccl" if device.type == "cuda" else "gloo"
        size, timeout = 1 + tensor_parallel, timedelta(seconds=seconds)
        address = own_address(server.url)
        listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = listener.getsockname()[1]
        store = dist.TCPStore(address, port, size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())
        prefixed = dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store))
        make = _nccl if backend == "nccl" else _gloo
        group, _ = await together(
            in_thread(device, make, prefixed, size, timeout),
            asyncio.wait_for(server.join_group(name, address, port, 1, size, backend), seconds),
        )
        return cls(name, server.url, group, device)

    async def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Send tensors, one after another, all at once under way."""
        try:
            await in_thread(self.device, self._send, list(tensors))
        except RuntimeError as error:  # torch's, which says nothing of whose connection it was
            raise PublishError(f"{self.url}: the broadcast of weights to it broke off: {error}") from error

    def close(self) -> None:
        """Leave. A server that still waits for something from us is told so by the broken connection."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _send(self, tensors: list[Tensor]) -> None:
        group = self._group
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        for work in [group.broadcast([tensor], options) for tensor in tensors]:
            work.wait()
        if self.device.type == "cuda":  # NCCL's wait only orders the stream; the tensors must outlive the sending
            torch.cuda.current_stream(self.device).synchronize()


def _gloo(store: dist.Store, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(dist.PrefixStore("cpu/", store), 0, size, timeout)


def _nccl(store: dist.Store, size: int, timeout: timedelta) -> Any:
    """Read from torch's source and not run here, for want of GPUs."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(dist.PrefixStore("cuda/", store), 0, size, options)


def own_address(url: str) -> str:
    """The address of this machine on the way to a server: what the server can reach us by."""
    parts = urlsplit(url)
    family, kind, protocol, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket only looks up the route
        return str(probe.getsockname()[0])
