"""Weights from torch's layout and back, and the report that both give the same numbers."""
