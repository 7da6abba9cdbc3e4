"""Which task a free worker takes: one of its own group, then of a group without a worker, then of one that needs help."""

from collections import deque
from collections.abc import Hashable, Sequence

HELP_AFTER = 20.0  # seconds: about what a second worker costs that imports and compiles what the first one has compiled


class TaskQueue:
    """The waiting tasks by group, in order."""

    def __init__(self, groups: Sequence[Hashable]) -> None:
        self.groups = groups
        self.waiting: dict[Hashable, deque[int]] = {}
        for index, group in enumerate(groups):
            self.waiting.setdefault(group, deque()).append(index)
        self.seconds: dict[Hashable, float] = {}  # of the last task of a group, or of a longer one that runs
        self.new = deque(self.waiting)

    def take(self, group: Hashable) -> int | None:
        """The next task for a worker whose last task was of `group`; None where it would not help."""
        if not self.waiting.get(group):
            if self.new:
                group = self.new.popleft()
            else:
                left = {g: seconds * len(self.waiting[g]) for g, seconds in self.seconds.items()}
                group = max(left, key=left.__getitem__, default=None)
                if left.get(group, 0.0) <= HELP_AFTER:
                    return None
        elif group in self.new:
            self.new.remove(group)
        return self.waiting[group].popleft()

    def note_running(self, index: int, seconds: float) -> None:
        """A task has run for `seconds` by now."""
        group = self.groups[index]
        self.seconds[group] = max(seconds, self.seconds.get(group, 0.0))

    def end(self, index: int, seconds: float, failed: bool = False) -> None:
        """A task has ended after `seconds`; one that failed ends its group."""
        self.seconds[self.groups[index]] = seconds
        if failed:
            self.waiting[self.groups[index]].clear()
