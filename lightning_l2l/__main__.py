"""The command line: ``python -m lightning_l2l sanity | quadratic | least-squares | landscape | meta-train | ...``.

``sanity`` runs with nothing but the package itself, so that an installation can be checked. The experiments take their
options from the signatures of their functions, through jsonargparse (the ``cli`` extra).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_PRINTED = (int, float, str, type(None))
_EXPERIMENTS = {
    "quadratic": "learn the step size of gradient descent on a quadratic (the paper's experiment 1)",
    "least-squares": "tune a step size on training or on held-out data (the paper's experiment 2)",
    "landscape": "the meta-objective over the step size: naive against log",
    "meta-train": "train a neural optimizer over tasks, save it, compare it with tuned Adam and SGD",
    "evaluate": "compare a saved learned optimizer with tuned Adam and SGD",
    "mlp-optimizer": "neural optimizers trained on training or on held-out data (the paper's experiment 3)",
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
    rows = [row for row in result if is_dataclass(row)] if isinstance(result, list) else []
    if rows:
        columns = _columns(rows)
        table = [columns, *([_cell(getattr(row, name)) for name in columns] for row in rows)]
        widths = [max(len(line[place]) for line in table) for place in range(len(table[0]))]
        for line in table:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"written to {output}")


def _columns(rows: list[Any]) -> list[str]:
    """The fields that hold one number or a name in every row; curves are in the files."""
    names = [field.name for field in fields(rows[0])]
    return [name for name in names if all(isinstance(getattr(row, name), _PRINTED) for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
