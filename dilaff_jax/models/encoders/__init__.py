"""Encoders, one family a file; `models.segmenter` says what a file must hold."""
