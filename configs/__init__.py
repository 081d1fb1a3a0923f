"""Experiments: one short file each, deriving from `default.py`."""
