"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864): functions, no weights.

Shapes: B batch, T query length, N heads, H head_dim.
"""

import math
from typing import Any

import numpy as np
from keras import ops


def inverse_frequencies(
    head_dim: int, max_wavelength: float = 10_000.0, scaling: dict[str, Any] | None = None
) -> tuple[np.ndarray, float]:
    """Angle per position of each feature pair, float32 (H/2,), and the factor on cos and sin.

    `scaling` is what `config.rope_options` returns: `None`, "linear" (Chen et al., 2023,
    https://arxiv.org/abs/2306.15595), "llama3" (Llama 3.1) or "yarn" (Peng et al., 2023,
    https://arxiv.org/abs/2309.00071).

    >>> inverse_frequencies(4)[0]
    array([1.  , 0.01], dtype=float32)
    """
    # The exponent and the power are rounded to float32 where the reference rounds them. At position
    # 100,000 one unit in the last place of a frequency turns the pair by 0.008 radian.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = np.power(float(max_wavelength), exponent.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1) / wavelength
    kind = None if scaling is None else scaling["rope_type"]
    if scaling is None:
        return frequency, 1.0
    if kind == "linear":
        return frequency / np.float32(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(frequency, scaling), 1.0
    return _yarn(wavelength, head_dim, max_wavelength, scaling), _yarn_attention_factor(scaling)


def _llama3(frequency: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Keeps short wavelengths, divides long ones by `factor`, and blends in between."""
    factor, low, high = (np.float32(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    # Full turns within the original context, by the reciprocals that the reference rounds on its way.
    one = np.float32(1)
    turns = one / (one / frequency * np.float32(2 * math.pi)) * np.float32(scaling["original_max_position_embeddings"])
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - keep) * frequency / factor + keep * frequency).astype(np.float32)


def _yarn(wavelength: np.ndarray, head_dim: int, max_wavelength: float, scaling: dict[str, Any]) -> np.ndarray:
    """Keeps pairs that turn fast, interpolates slow ones, with a linear ramp over the pairs between."""
    context = scaling["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(max_wavelength))

    low, high = pair_turning(scaling["beta_fast"]), pair_turning(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    keep = (1 - ramp).astype(np.float32)
    kept, interpolated = 1 / wavelength, 1 / (np.float32(scaling["factor"]) * wavelength)
    return (interpolated * (1 - keep) + kept * keep).astype(np.float32)


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    if scaling["attention_factor"] is not None:
        return float(scaling["attention_factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling["mscale"] and scaling["mscale_all_dim"]:
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


def rotary_angles(positions, frequencies, factor=1.0):
    """cos and sin of position x frequency, scaled by `factor`: (B, T) -> two float32 (B, T, H/2)."""
    angles = ops.expand_dims(ops.cast(positions, "float32"), -1) * ops.convert_to_tensor(frequencies, "float32")
    return ops.cos(angles) * factor, ops.sin(angles) * factor


def rotate(x, cos, sin):
    """Turns feature i together with feature i + H/2, in float32: x (B, T, N, H) -> same shape and dtype.

    Args:
        x: queries or keys (B, T, N, H).
        cos, sin: float32 (B, T, H/2), from `rotary_angles`.
    """
    cos, sin = (ops.expand_dims(ops.concatenate(pair, axis=-1), 2) for pair in ((cos, cos), (-sin, sin)))
    whole = ops.cast(x, "float32")
    first, second = ops.split(whole, 2, axis=-1)
    return ops.cast(whole * cos + ops.concatenate([second, first], axis=-1) * sin, x.dtype)
