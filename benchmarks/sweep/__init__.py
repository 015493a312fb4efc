"""Shapes of every size, each beside the best form in PyTorch: `make sweep`."""
