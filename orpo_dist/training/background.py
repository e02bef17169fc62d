"""One piece of work at a time beside the training, in a thread."""

import threading
import time
from collections.abc import Callable


class Background:
    """Its failure is raised by `wait`.

    A thread that is abandoned ends with the process: a checkpoint that is not published by then does not exist.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._took: float | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`. That of the last time must have been waited for."""
        assert self._thread is None, "one at a time"
        began = time.monotonic()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error
            self._took = time.monotonic() - began

        self._thread = threading.Thread(target=run, name="orpo-dist-save", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the work has ended with an error that was not raised yet."""
        return self._error is not None

    def took(self) -> float | None:
        """Seconds that the last finished work took, said once."""
        seconds, self._took = self._took, None
        return seconds

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the work. Returns whether it is done. Raises its error, once."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True
