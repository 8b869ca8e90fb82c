"""One file per family of trainers; each runs on a CPU in under a minute: ``python -m examples.plain_pytorch``."""
