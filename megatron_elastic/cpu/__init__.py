"""Runs Megatron's code on a machine without a GPU."""
