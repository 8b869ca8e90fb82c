"""The cross entropies of one row against many targets, in four rooms; CONTRIBUTING.md has the map.

What is asked (`options`, `targets`), what is computed (the kernels, and the same in PyTorch), how it is launched (the
functions below the kernels), and how autograd sees it (`patch_cross_entropy`, `linear_patch_cross_entropy`).
"""
