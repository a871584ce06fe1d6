"""The engine: unrolls, objectives and estimators as pure functions of state, on torch and torchopt only."""
