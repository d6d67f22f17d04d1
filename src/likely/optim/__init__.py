"""Optimisers of the Adam family, from the 2014 algorithm on: usable with any PyTorch code, dependent on torch alone."""
