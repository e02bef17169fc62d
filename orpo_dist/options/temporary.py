"""Errors that a restart may get over: nobody is to blame, and exit code 2 would tell schedulers not to try again."""

import errno

from huggingface_hub.errors import HfHubHTTPError

_NUMBERS = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNRESET,
    errno.EDQUOT,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
_TOO_MANY_REQUESTS, _SERVER_ERRORS = 429, 500


def is_temporary(error: BaseException) -> bool:
    """Whether the error or one of its causes is a fault of a disk, a network file system or a server, or a timeout."""
    link: BaseException | None = error
    seen: list[BaseException] = []
    while link is not None and link not in seen:
        seen.append(link)
        if isinstance(link, TimeoutError) or (isinstance(link, OSError) and link.errno in _NUMBERS):
            return True
        if isinstance(link, HfHubHTTPError):
            status = getattr(link.response, "status_code", None)  # of either HTTP library that the client has used
            if status is not None and (status == _TOO_MANY_REQUESTS or status >= _SERVER_ERRORS):
                return True
        link = link.__cause__ or link.__context__
    return False
