"""Numerical operations in plain torch: each op has a `_ref` beside it that states what it computes."""
