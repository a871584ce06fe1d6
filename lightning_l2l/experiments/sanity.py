"""The built-in check: claims of this package and of the paper, each with the number found and the number expected.

Needs no extras, no data and no network, and takes seconds. The oracles are independent of what they check: exact
rational arithmetic, closed forms against the general engine, the paper's theorems, and measured numbers of the paper's
own experiment in a smaller dimension.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_l2l.experiments import _sanity_engine, _sanity_least_squares, _sanity_quadratic
from lightning_l2l.experiments._claim import Claim

_GROUPS: tuple[Callable[[], Iterator[Claim]], ...] = (
    _sanity_quadratic.claims,
    _sanity_engine.claims,
    _sanity_least_squares.claims,
)


@dataclass(frozen=True)
class Tally:
    """How many claims hold."""

    held: int
    failed: int


def run(plots: Path | str | None = None) -> int:
    """Check every claim and print a line for each.

    Args:
        plots: Folder for the figures of the experiments; ``None`` for no figures.

    Returns:
        0 if all claims hold, otherwise 1: an exit status.

    Raises:
        ImportError: ``plots`` without matplotlib.
    """
    if plots is not None:
        from lightning_l2l.plotting import require_matplotlib

        require_matplotlib()
    began = time.perf_counter()
    print(f"{'':7}{'claim':74}{'found':>14}   expected")
    tally = check(claim for group in _GROUPS for claim in group())
    print(f"{tally.held} claims hold, {tally.failed} fail, {time.perf_counter() - began:.1f} seconds")
    if plots is not None:
        for path in _figures(Path(plots)):
            print(f"figure: {path}")
    return 0 if tally.failed == 0 else 1


def check(claims: Iterator[Claim]) -> Tally:
    """Print claims as they are found and count them.

    Example:
        >>> check(iter([Claim("one and one", 2.0, 2.0, tolerance=0.0)]))  # doctest: +NORMALIZE_WHITESPACE
        ok     one and one                              2   2
        Tally(held=1, failed=0)
    """
    held = failed = 0
    for claim in claims:
        held, failed = held + claim.holds, failed + (not claim.holds)
        found = f"{claim.found:.7g}" if math.isfinite(claim.found) else str(claim.found)
        print(f"{'ok' if claim.holds else 'FAILED':7}{claim.text:74}{found:>14}   {claim.expectation()}", flush=True)
    return Tally(held, failed)


def _figures(folder: Path) -> list[Path]:
    from lightning_l2l.experiments import landscape, least_squares, quadratic

    files = list(landscape.run(folder / "landscape"))
    files += quadratic.run(folder / "quadratic", meta_steps=200, progress=False).files
    one, several = folder / "least_squares", folder / "least_squares_by_samples"
    least_squares.run(one, dimension=200, samples=100, tasks=60, progress=False)
    sizes = (20, 50, 100, 150, 200, 300, 400, 800)
    least_squares.run(several, dimension=200, tasks=60, sweep="samples", sweep_values=sizes, progress=False)
    files += [*sorted(one.iterdir()), *sorted(several.iterdir())]
    return [path for path in files if path.suffix == ".png"]
