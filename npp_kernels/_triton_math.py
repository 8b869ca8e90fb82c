"""Device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, to a few ulp; `tl.math` has none that works on every back end."""
    magnitude = tl.abs(x)
    decay = tl.exp(-2.0 * magnitude)
    far = (1.0 - decay) / (1.0 + decay)
    # Near zero 1 - decay cancels; the series is exact to 1e-8 below 0.2.
    square = magnitude * magnitude
    near = magnitude * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    result = tl.where(magnitude < 0.2, near, far)
    return tl.where(x < 0, -result, result)


@triton.jit
def capped(logits, softcap):
    """Return ``softcap · tanh(logits / softcap)``, or the logits themselves where there is no cap."""
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def cap_derivative(capped_logits, softcap):
    """Return the derivative of the cap at logits that are capped already."""
    ratio = capped_logits / softcap
    return 1.0 - ratio * ratio
