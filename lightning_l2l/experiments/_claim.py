"""One claim of the sanity check: a number that was found, and what it must be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """A number found and a number expected.

    Attributes:
        text: What is claimed, in plain words.
        found: The number found; a NaN fails.
        expected: The number expected, or the lower end of the range.
        tolerance: Largest absolute difference that is allowed.
        up_to: Upper end of the range, where a range is expected.

    Example:
        >>> Claim("a ratio", 1.16, 1.10, up_to=1.22).holds, Claim("a count", 3.0, 2.0).holds
        (True, False)
    """

    text: str
    found: float
    expected: float
    tolerance: float = 0.0
    up_to: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the number is what was expected."""
        if self.up_to is not None:
            return self.expected <= self.found <= self.up_to
        return self.found == self.expected or abs(self.found - self.expected) <= self.tolerance

    def expectation(self) -> str:
        """The expectation in words."""
        if self.up_to is not None:
            return f"{self.expected:g} to {self.up_to:g}"
        return f"{self.expected:.7g}" + (f" within {self.tolerance:.1g}" if self.tolerance else "")
