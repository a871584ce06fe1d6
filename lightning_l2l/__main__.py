"""The command line: ``python -m lightning_l2l sanity | quadratic | meta-train | evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_l2l.commands import evaluate, meta_train, quadratic, sanity

_COMMANDS = {"sanity": sanity, "quadratic": quadratic, "meta-train": meta_train, "evaluate": evaluate}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words of the command line; ``None`` for those of the process.

    Returns:
        The exit status: 0 when all went well, 1 when a claim of the sanity check fails.

    Raises:
        SystemExit: For ``--help``, and with status 2 for a wrong command line, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lightning_l2l",
        description="Learn the learning rate while you train: a check of this installation, and small experiments.",
        epilog="Options of a command: python -m lightning_l2l COMMAND --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0].rstrip(".")
        module.add_arguments(
            commands.add_parser(
                name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
            )
        )
    options = parser.parse_args(arguments)
    try:
        status: int = _COMMANDS[options.command].run(options)
    except (ValueError, ImportError) as error:  # a setting that makes no sense: their messages say which and why
        parser.exit(2, f"{parser.prog} {options.command}: {error}\n")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
