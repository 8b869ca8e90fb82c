"""What tests of comparisons share: outcomes that are made up, small data, and a stand-in for the feature network.

For test_claim.py, test_evidence.py and test_score.py.
"""

import numpy as np
import torch

from reference.comparison.outcomes import Outcome


def outcome_of(way, seed, nll, seconds, *, levels=1, steps=100, cost=1.0):
    """Make an outcome up: three evaluations that end at a loss, and at a time."""
    return Outcome(
        way=way,
        seed=seed,
        levels=levels,
        steps=steps,
        epochs=steps / 10,
        operations=cost,
        stages=[{"patch": 2**level, "steps": 1, "seconds": 1.0} for level in reversed(range(levels))],
        setup_seconds=4.0,
        curve={
            "step": [40, 80, steps],
            "seconds": [0.4 * seconds, 0.8 * seconds, seconds],
            "nll": [nll + 2, nll + 1, nll],
            "error": [0.5, 0.5, 0.25],
        },
        num_images=7,
        device="GPU",
        versions={"torch": "2.0"},
    )


def small_data(path):
    """Write 4×4 grids in which each token is, mostly, the one before it and its class."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 90)
    steps = generator.integers(0, 2, (90, 16)) + labels[:, None]
    tokens = (steps.cumsum(1) % 12).reshape(90, 4, 4).astype(np.uint16)
    centroids = generator.integers(0, 255, (12, 4)).astype(np.float32)
    parts = {"train": tokens[:60], "train_labels": labels[:60], "test": tokens[60:], "test_labels": labels[60:]}
    np.savez(path, centroids=centroids, **parts)


class MeanColour(torch.nn.Module):
    """A stand-in for the feature network: three features, the colours' means."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def extract_features(self, pixels):
        return self.scale * pixels[:, :, ::2, ::2]
