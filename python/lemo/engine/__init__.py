"""The engine: layers over kept tokens, forward and backward, given a `stack.Step`. It never asks who calls it."""
