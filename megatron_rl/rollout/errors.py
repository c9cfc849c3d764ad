"""What can go wrong between us and a server. Every error names the server, the endpoint and what was wrong."""

from http import HTTPStatus


class ServerError(RuntimeError):
    """A server that did not do what it was asked."""

    def __init__(self, server: str, endpoint: str, what: str) -> None:
        super().__init__(f"{server}{endpoint}: {what}")
        self.server = server
        self.endpoint = endpoint
        self.what = what


class Unreachable(ServerError):
    """No connection, or one that broke: nobody listens, or the server died."""


class TimedOut(ServerError):
    """Connected, but silent for longer than it may be."""


class BadReply(ServerError):
    """A reply that cannot be trusted: no JSON, cut short, fields missing, or numbers that contradict each other."""


class NoKey(ServerError):
    """The key that the server is to be asked with cannot be read, so it was not asked."""


class Unsettled(ServerError):
    """Somebody died while the server gave its memory back or took it: what it has now is not known."""


class Refused(ServerError):
    """The server understood and said no, or failed at it and said so."""

    def __init__(self, server: str, endpoint: str, what: str, status: int) -> None:
        super().__init__(server, endpoint, f"{what} (HTTP {status})")
        self.status = status

    @property
    def is_for_the_key(self) -> bool:
        """Whether it asks for another API key, or for one at all."""
        return self.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)

    @property
    def is_overload(self) -> bool:
        """Whether the same request may go well later, or elsewhere."""
        return self.status >= HTTPStatus.INTERNAL_SERVER_ERROR or self.status == HTTPStatus.TOO_MANY_REQUESTS
