"""Lossless coding: entropy coder, codecs, bits-back, the file format ``.lk``."""
