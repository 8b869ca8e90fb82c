"""The tests; a package of its own, since some packages on PyPI install a ``tests`` beside theirs."""
