"""Reading what the callback saw: a run that learns, one that is lost and rescued, and a meta-gradient that is refused.

Prints one line for each meta-update and writes diagnostics.png, the first run's `callback.plot()`:

    python examples/diagnostics.py
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from digits_task import QUIET, Classifier, Digits, prepare

from lightning_l2l import LearnedStepSize, LearnToLearn, meta_gradient
from lightning_l2l.functional import inner_optimizer


def observe(learning_rate: float, initial_search: bool, epochs: int) -> LearnToLearn:
    L.seed_everything(0, verbose=False)
    learner = LearnToLearn(initial_search=initial_search)
    L.Trainer(max_epochs=epochs, callbacks=[learner], **QUIET).fit(Classifier(learning_rate=learning_rate), Digits())
    print(f"{'step':>5}{'rate':>10}{'objective':>11}{'gradient':>11}{'agreement':>11}{'loss':>8}")
    for record in learner.history:
        found = record["diagnostics"]
        if not record["meta_gradient"]:  # none at all, and why
            print(f"{record['step']:5d}{record['learning_rates'][0]:10.3g}   {found['note']}")
            continue
        (gradient,), (loss,) = record["meta_gradient"]["learning_rate"], found["losses"]
        print(f"{record['step']:5d}{record['learning_rates'][0]:10.3g}{record['meta_objective']:11.3g}", end="")
        print(f"{gradient:11.3g}{record['signals']['agreement']:11.2f}{loss:8.3f} {found['note']}")
    if learner.history:
        print("signals at the end:", {name: round(value, 2) for name, value in learner.history[-1]["signals"].items()})
    return learner


def refused() -> str:
    """Steps a thousand times too long on a parabola: after twelve of them the loss is no number any more."""
    learned = LearnedStepSize().attach(inner_optimizer(torch.optim.SGD, lr=2000.0))
    parameters = {"w": torch.ones(3)}
    result = meta_gradient(
        lambda found, _: 0.5 * found["w"].square().sum() + 1, parameters, learned, [None] * 12, None, objective="naive"
    )
    print(f"usable: {result.usable}, gradient: {result.gradients['learning_rate'].item()}")
    print(result.explain())
    return result.explain()


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three epochs only")
    parser.add_argument("--plot", default="diagnostics.png", help="where to write the figure (%(default)s)")
    options = parser.parse_args(arguments)
    epochs = 3 if options.quick else 15
    prepare()
    print("From 0.001, with the initial search. Negative gradient: a larger rate would have been better.")
    healthy = observe(1e-3, True, epochs)
    print("\nFrom 1000, without it. The first steps ruin the weights: back to the snapshot, with a tenth of the rate.")
    observe(1e3, False, min(epochs, 5))
    print("\nA look-ahead that diverges. Its gradient is NaN, never zero, and the callback halves the rate instead.")
    refused()
    healthy.plot(options.plot)
    print(f"\nfigure: {options.plot}")
    return healthy.history


if __name__ == "__main__":
    main()
