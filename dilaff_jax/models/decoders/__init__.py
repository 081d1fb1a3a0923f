"""Decoders, one a file; `models.segmenter` says what a file must hold."""
