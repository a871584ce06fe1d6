"""Exact meta-gradients: unrolls of the inner training, and evolution strategies."""
