"""Errors that reach clients. The HTTP and the gRPC server map each class to one status; the text is for people.

Beside these, a `ValueError` is an invalid request and a `KeyError` an unknown name, as everywhere in this package.
"""

from __future__ import annotations


class ServingError(Exception):
    """A request was refused or ended early, through no fault of its own or not only by its own fault."""


class QueueFull(ServingError):
    """Too many requests wait (max_queue_len), or too many adapters are being loaded. Retry later."""


class Unavailable(ServingError):
    """This server cannot take the request, now or ever again. Another server may."""


class Draining(Unavailable):
    """The server is shutting down gracefully and accepts no requests."""


class DeadlineExceeded(ServingError):
    """The request reached its deadline before its last token and was aborted."""


class RequestFailed(ServingError):
    """The request was accepted and could not be finished, for example because its adapter could not be loaded.

    Other requests are not affected.
    """


class EngineDead(Unavailable):
    """The device failed and did not recover. Every request ends with this error."""


class DuplicateRequest(ValueError):
    """A request with the same id is running."""


class InvalidValue(ValueError):
    """A setting or a field of a request has a value that is not allowed.

    Attributes:
        field: Its name.
    """

    def __init__(self, field: str, text: str):
        super().__init__(text)
        self.field = field

    def __reduce__(self) -> tuple[type[InvalidValue], tuple[str, str]]:
        return type(self), (self.field, str(self))  # as an exception is otherwise made again of its text alone


class InvalidGrammar(ValueError):
    """The structured output that a request asks for is wrong or not supported.

    Attributes:
        reason: Fault of it, without the name of the field of `SamplingParams`.
    """

    def __init__(self, reason: str):
        super().__init__(f"structured_outputs: {reason}")
        self.reason = reason

    def __reduce__(self) -> tuple[type[InvalidGrammar], tuple[str]]:
        return type(self), (self.reason,)


class Unauthenticated(ServingError):
    """The server requires an API key, and the request has no valid one."""


class Forbidden(ServingError):
    """The request's API key does not permit this call."""
