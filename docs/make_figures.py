"""Draw every figure of the documentation anew: python docs/make_figures.py (a few minutes on one core).

The figures are in the repository, so that the documentation builds without training anything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures"
KEPT = (
    "landscape/landscape.png",
    "quadratic/meta_gradient.png",
    "quadratic/optimal_step_size.png",
    "quadratic/step_size.png",
    "least_squares/trajectories.png",
    "least_squares_by_samples/sweep.png",
)


def main() -> None:
    """Run the examples and the sanity module, and keep their figures."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("digits", "diagnostics", "fabric", "meta_train_optimizer"):
            run([sys.executable, str(DOCS.parent / "examples" / f"{name}.py")], folder)
            shutil.copy(Path(folder) / f"{name}.png", FIGURES)
        run([sys.executable, "-m", "lightning_l2l", "sanity", "--plots", folder], folder)
        for name in KEPT:
            shutil.copy(Path(folder) / name, FIGURES / name.replace("/", "-"))


def run(command: list[str], folder: str) -> None:
    """Run in a folder of its own, against this source tree."""
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent.resolve())}
    subprocess.run(command, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
