"""The specification (`ops`: plain PyTorch twins of the kernels), and the training system built on them.

The other files here are commands, and the folders what they are made of.
"""
