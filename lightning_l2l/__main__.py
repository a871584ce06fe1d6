"""The command line: ``python -m lightning_l2l sanity | quadratic | least-squares | landscape``.

``sanity`` runs with nothing but the package itself, so that an installation can be checked. The experiments take their
options from the signatures of their functions, through jsonargparse (the ``cli`` extra).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_EXPERIMENTS = {
    "quadratic": "learn the step size of gradient descent on a quadratic (the paper's experiment 1)",
    "least-squares": "tune a step size on training or on held-out data (the paper's experiment 2)",
    "landscape": "the meta-objective over the step size: naive against log",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; ``None`` for those of the process.

    Returns:
        The exit status: 0 when all went well, 1 when a claim of the sanity check fails, 2 for a wrong command line.

    Raises:
        SystemExit: For ``--help`` and for a wrong command line, as argparse does.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m lightning_l2l",
        description="Learn the learning rate while you train: the built-in check and the paper's experiments.",
        epilog="Options of a command: python -m lightning_l2l COMMAND --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sanity = commands.add_parser(
        "sanity", help="check every claim of the package in seconds; exit status 0 if all hold"
    )
    sanity.add_argument("--plots", metavar="DIR", help="also write figures there (needs matplotlib)")
    for name, explanation in _EXPERIMENTS.items():
        commands.add_parser(name, help=explanation, add_help=False)
    chosen, rest = parser.parse_known_args(words)
    if chosen.command == "sanity":
        if rest:
            sanity.error(f"unrecognized arguments: {' '.join(rest)}")
        from lightning_l2l.experiments.sanity import run

        return run(chosen.plots)
    return _experiment(chosen.command, words[1:], parser)


def _experiment(name: str, words: list[str], parser: argparse.ArgumentParser) -> int:
    if find_spec("jsonargparse") is None:
        parser.exit(
            2,
            f"`{name}` takes its options through jsonargparse, which is not installed:\n"
            '    pip install "lightning-l2l[cli,plots]"\n'
            "`sanity` works without it, and so does calling the function from Python: "
            f"lightning_l2l.experiments.{_module(name)}.run(...)\n",
        )
    from jsonargparse import ArgumentParser

    run: Callable[..., Any] = import_module(f"lightning_l2l.experiments.{_module(name)}").run
    options = ArgumentParser(prog=f"{parser.prog} {name}", description=_EXPERIMENTS[name])
    options.add_function_arguments(run)
    options.set_defaults(output=_module(name))
    found = options.parse_args(words)
    try:
        result = run(**found.as_dict())
    except (ValueError, ImportError) as error:  # a setting that makes no sense: their messages say which and why
        options.exit(2, f"{options.prog}: {error}\n")
    _report(result, found.output)
    return 0


def _module(name: str) -> str:
    return name.replace("-", "_")


def _report(result: Any, output: Any) -> None:
    """Rows of numbers as a table, where the experiment returns some; where its files are, always."""
    rows = result if isinstance(result, list) else []
    if rows and hasattr(rows[0], "step_size_train"):
        columns = ("samples", "noise", "steps", "step_size_train", "step_size_validation", "test_rmse_train",
                   "test_rmse_validation", "test_rmse_zero")  # fmt: skip
        print("  ".join(columns))
        for row in rows:
            print("  ".join(f"{getattr(row, column):{len(column)}.4g}" for column in columns))
    print(f"written to {output}")


if __name__ == "__main__":
    raise SystemExit(main())
