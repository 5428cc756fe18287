"""Layers of the model, one class a file."""
