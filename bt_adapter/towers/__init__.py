"""Frozen image towers: which image models there are, their tensors under our names, and the tower that runs them."""
