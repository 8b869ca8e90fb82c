"""Benchmarks of npp_kernels: every operation at every scale stage, against what others do, checked before it is timed.

`cases` says what is timed and against what it is held, `timing` how, `test_operations` hands both to pytest-benchmark,
and `reporting` turns its JSON into pages. The other files are commands: steps of trainers, sampling, several GPUs.
"""
