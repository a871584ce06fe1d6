"""Everything that touches Lightning, except the callback and the training module themselves.

Checked against Lightning 2.6.6. Private names of Lightning are used in :mod:`~lightning_l2l.host.trainer` only.
"""
