"""The commands of ``python -m lightning_l2l``: each a module with ``add_arguments`` and ``run``."""
