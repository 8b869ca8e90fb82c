"""Device functions that several kernels of the losses share: exponentials, logarithms, division, the soft cap."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.44269504088896340736)
LN_2 = tl.constexpr(0.69314718055994530942)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """Return e^x; with PRECISE, to the last places of fp32, as results that are not rounded to 16 bits need it.

    The GPU has only 2^y. Rounding y = x · log2(e) alone costs |x| units in the last place of the result, so PRECISE
    first takes off the whole powers of two (Cody and Waite: n · 0.693359375 is exact, and the rest of ln 2 is small).
    """
    if PRECISE:
        x = tl.where(x < -200.0, -200.0, x)  # -inf must give 0, not inf - inf; NaN stays NaN
        whole = tl.floor(x * LOG2_E + 0.5)
        rest = (x - whole * 0.693359375) - whole * -2.12194440054690583e-4
        return tl.exp2(rest * LOG2_E) * tl.exp2(whole)
    return tl.exp2(x * LOG2_E)


@triton.jit
def divide(x, y):
    """Return x / y to the last place, for ordinary y.

    The GPU's fast division is off by up to two of them, which one step of Newton's method makes good. `tl.div_rn` is
    exact for any numbers, but calls a slow path, for which a kernel with many values in registers has none to spare.
    """
    quotient = x / y
    missing = tl.fma(-quotient, y, x) / y
    return tl.where(missing == missing, quotient + missing, quotient)  # for an infinite quotient, missing is NaN


@triton.jit
def log1p(x):
    """Return log(1 + x) for x in [0, 1], to the last places of fp32 however small x is."""
    # 2 · artanh(x / (2 + x)): the ratio is at most a third, and the first term left out is 1e-9 of the sum.
    ratio = tl.div_rn(x, 2.0 + x)
    square = ratio * ratio
    series = 1.0 / 13.0 + square * (1.0 / 15.0)
    for odd in tl.static_range(11, 0, -2):
        series = 1.0 / odd + square * series
    return 2.0 * ratio * series


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent, to a few ulp; `tl.math` has none that works on every back end."""
    magnitude = tl.abs(x)
    decay = exp(-2.0 * magnitude, True)
    far = tl.div_rn(1.0 - decay, 1.0 + decay)
    # Near zero 1 - decay cancels; the series is exact to 1e-8 below 0.2.
    square = magnitude * magnitude
    near = magnitude * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    result = tl.where(magnitude < 0.2, near, far)
    return tl.where(x < 0, -result, result)


@triton.jit
def capped(logits, softcap):
    """Return ``softcap · tanh(logits / softcap)``, or the logits themselves where there is no cap.

    The product is rounded here, as an fma with 0: left as a product, the compiler fuses it with a subtraction that
    comes later, and a row's maximum less itself is no longer 0.
    """
    if softcap is not None:
        cap = tl.cast(softcap, tl.float32)  # torch.compile passes Python numbers as fp64
        logits = tl.fma(tanh(logits / cap), cap, 0.0)
    return logits


@triton.jit
def cap_derivative(capped_logits, softcap):
    """Return the derivative of the cap at logits that are capped already."""
    ratio = capped_logits / tl.cast(softcap, tl.float32)
    return 1.0 - ratio * ratio
