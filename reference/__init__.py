"""The specification: plain PyTorch twins of the kernels, and the training system built on them."""
