"""What a caller may be told. Each is one answer of the HTTP and of the gRPC server; the text is for people.

A wrong request is a `ValueError`, a name that is not there a `KeyError`, as everywhere in this package.
"""

from __future__ import annotations


class ServingError(Exception):
    """Not the request's fault, or not only."""


class QueueFull(ServingError):
    """max_queue_len requests wait already, or too many adapters are being loaded: try again later."""


class Unavailable(ServingError):
    """This server cannot take the request now, or no more. Another may."""


class Draining(Unavailable):
    """The server is about to stop and takes nothing in."""


class DeadlineExceeded(ServingError):
    """The request's time was over before its last token; it was aborted."""


class RequestFailed(ServingError):
    """The request was taken in and could not be finished: its adapter cannot be loaded, say. Others are not concerned."""


class EngineDead(Unavailable):
    """The device failed and did not come back. Every request ends with this."""


class DuplicateRequest(ValueError):
    """A request of that id is running."""


class Unauthenticated(ServingError):
    """The server has keys, and none of them was given."""


class Forbidden(ServingError):
    """The key that was given may not do this."""
