"""The digits classifier under LightningCLI: LearnToLearn is configured in a YAML file or on the command line.

Prints the rates that were learned and draws them to digits_cli.png. The file is not needed, every option has its flag:

    python examples/digits_cli.py fit --config examples/digits.yaml
    python examples/digits_cli.py fit --trainer.callbacks=lightning_l2l.LearnToLearn --trainer.max_epochs=5
"""

from __future__ import annotations

from digits_task import Classifier, Digits, prepare
from lightning.pytorch.cli import LightningCLI

from lightning_l2l import LearnToLearn


def main(arguments: list[str] | None = None) -> LightningCLI:
    prepare()
    cli = LightningCLI(Classifier, Digits, args=arguments, save_config_callback=None)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, LearnToLearn):
            rates = ", ".join(f"{record['learning_rates'][0]:.2g}" for record in callback.history)
            print(f"learning rates: {rates}\nheld-out loss: {cli.trainer.callback_metrics['val_loss']:.3f}")
            callback.plot("digits_cli.png")
    return cli


if __name__ == "__main__":
    main()
