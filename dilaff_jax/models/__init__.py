"""Encoders, decoders and the dilated-affinity head; `segmenter.build` composes them from config."""
