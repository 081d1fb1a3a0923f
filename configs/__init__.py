"""Experiments: one short file each, deriving from `default.py`.

Installed with the package, where they are `dilaff_jax.configs`.
"""
