"""Buckets: what is in one is worked on in a copy on this machine's disk, and brought back."""
