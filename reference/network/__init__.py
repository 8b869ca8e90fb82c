"""The transformer that is trained, and its kernels."""
