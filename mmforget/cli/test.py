"""`mmforget test`: accuracy of a model on the test data."""

from __future__ import annotations

from mmforget.cli.settings import EVALUATION_KEYS, checked_settings

HELP = """
usage: mmforget test [-c FILE] [options]

Measures the accuracy of a model on the test data. With a request, separately on the part to
forget, the part to keep, and what earlier requests named.

options, all of them also as keys of the YAML file:
  -c, --config FILE       YAML file; options after it change single values
  --model MODEL           a folder, a hub id, shipped:NAME, or a class such as ImageClassifier
  --data DATA             class name (mmforget list data); --data.OPTION for its options
  --request.classes LIST  measure by request, such as '[3]'
  --trainer.OPTION VALUE  Lightning's trainer: accelerator, devices, precision, ...
  --print_config          print the complete configuration and stop
  --help-all              every option of every part, from the classes themselves

examples:
  mmforget test --model shipped:digit_world/classifier_vit --data DigitWorld
  mmforget test --model runs/fit/weights --data DigitWorld --request.classes '[3]'
  mmforget test -c configs/classifier/fit-digit_world.yaml --model runs/fit/weights
"""


def run(args: list[str]) -> int:
    """Measure.

    Raises:
        MMForgetError: the settings are wrong, or there is no such model.
    """
    settings = checked_settings("test", args, EVALUATION_KEYS)

    from mmforget.cli.train import evaluate

    return evaluate("test", args, settings)
