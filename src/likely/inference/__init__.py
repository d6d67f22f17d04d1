"""Inference beside gradients: what is found by search, counting and sampling."""
