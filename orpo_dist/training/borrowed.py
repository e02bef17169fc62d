"""What a run changes on the model that it is given, and takes off again: the caller's model outlives the trainer.

Dropout of the base, compiled blocks, fixed rotary frequencies and the names of layers to wrap are in force from the
construction of the trainer to the end of train(), and again in each later train(), evaluate() and predict(). What a
single step needs is put on and off within it (LayoutChoice.in_force).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orpo_dist.model.patches import Patched, undo_all

Change = Callable[[], list[Patched]]


class BorrowedModel:
    """The changes to one model, in the order in which they are put on."""

    def __init__(self) -> None:
        self._changes: list[Change] = []
        self._handles: list[Patched] = []
        self._depth = 0

    def another(self) -> None:
        """From now on the changes are those of another model (model_init); the last one gets its own back."""
        self.give_back()
        self._changes.clear()

    def change(self, put_on: Change) -> None:
        """Put a change on, now and in every later use. put_on: returns the handles that take it off."""
        self._changes.append(put_on)
        self._handles += put_on()

    def give_back(self) -> None:
        """Take everything off, in reverse order."""
        undo_all(self._handles)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the changes are in force; after the outermost one none is."""
        if not self._depth and not self._handles:
            for put_on in self._changes:
                self._handles += put_on()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.give_back()
