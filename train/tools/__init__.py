"""Commands beside training and evaluation: ``python -m train.tools.export`` and so on."""
