"""The two roles of a worker."""

import enum


class Role(enum.IntEnum):
    """What a worker computes; the value indexes the role axis of schedule tables."""

    ATTENTION = 0
    EXPERT = 1

    @property
    def label(self) -> str:
        """Its name in reports, and of its parameters."""
        return self.name.lower()
