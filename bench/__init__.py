"""Benchmarks of npp_kernels: every operation at every scale stage, against what others do, checked before it is timed.

`shapes` names what is measured, `inputs` makes its tensors, `contenders` who takes part, `oracle` who may be timed,
`limits` what the machine allows, `clocks` and `measure` do the timing; `test_operations` hands it all to
pytest-benchmark, and `report`, `plots` and `tables` turn its JSON into pages.
"""
