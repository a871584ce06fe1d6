"""Draw every figure of the documentation anew: python docs/make_figures.py [example ...] (a few minutes on one core).

The figures are in the repository, so that the documentation builds without training anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image  # comes with matplotlib

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures"
# The arguments of each example; its figure has its name.
EXAMPLES: dict[str, list[str]] = {
    "per_group": [],
    "quadratic": [],
    "digits_cli": ["fit", "--config", str(DOCS.resolve().parent / "examples" / "digits.yaml")],
}
# Of examples/paper: the program, its arguments, the folder it writes to, and the figures kept.
SMALL = ["--dimension", "200", "--tasks", "60"]
SAMPLES = ["20", "50", "100", "150", "200", "300", "400", "800"]
PAPER: list[tuple[str, list[str], str, tuple[str, ...]]] = [
    ("landscape", [], "landscape", ("landscape",)),
    ("quadratic", ["--meta-steps", "200"], "quadratic", ("meta_gradient", "optimal_step_size", "step_size")),
    ("least_squares", [*SMALL, "--samples", "100"], "least_squares", ("trajectories",)),
    (
        "least_squares",
        [*SMALL, "--sweep", "samples", "--sweep-values", *SAMPLES],
        "least_squares_by_samples",
        ("sweep",),
    ),
]


def main() -> None:
    """Run the examples and the paper's experiments, and keep their figures; with names of examples, only these."""
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen or EXAMPLES:
            run([sys.executable, str(DOCS.resolve().parent / "examples" / f"{name}.py"), *EXAMPLES[name]], folder)
            keep(Path(folder) / f"{name}.png", f"{name}.png")
        if chosen:
            return
        for name, arguments, output, figures in PAPER:
            program = str(DOCS.resolve().parent / "examples" / "paper" / f"{name}.py")
            run([sys.executable, program, *arguments, "--output", output], folder)
            for figure in figures:
                keep(Path(folder) / output / f"{figure}.png", f"{output}-{figure}.png")


def keep(drawn: Path, name: str) -> None:
    """Into the documentation, with a palette of 64 colours: a third of the bytes, and no difference to be seen."""
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(FIGURES / name, optimize=True)


def run(command: list[str], folder: str) -> None:
    """Run in a folder of its own, against this source tree."""
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent.resolve())}
    subprocess.run(command, cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main()
