"""The patch discriminator of the first stage (Isola et al. 2017, "PatchGAN"; Esser et al. 2021)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ldm_jax.models.layers import check_groups
from ldm_jax.models.primitives import Dtype


def _norm_scale_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


class PatchDiscriminator(nn.Module):
    """A discriminator of patches: 4x4 convolutions, `layers` of them with stride 2, widths doubling up to 8 times.

    Group normalisation replaces the papers' batch normalisation: results do not depend on the number of devices.
    Kernels start from N(0, 0.02) and norm scales from N(1, 0.02), as in pix2pix (0.02 is the standard deviation).
    """

    in_channels: int = 3
    features: int = 64
    layers: int = 3
    norm_num_groups: int = 32
    dtype: Dtype = None

    def setup(self):
        """Checks the fields."""
        if self.layers < 1:
            raise ValueError(f"the discriminator needs at least 1 layer of stride 2; got layers={self.layers}")
        check_groups(self._widths()[1:], self.norm_num_groups)

    def _widths(self) -> tuple[int, ...]:
        """One width per hidden convolution: `layers` with stride 2, one with stride 1."""
        return tuple(self.features * min(2**i, 8) for i in range(self.layers + 1))

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Pixels [B, H, W, C] in [-1, 1] -> float32 logits [B, H', W', 1], one per patch, positive for real.

        H' = H / 2^layers - 2 for sizes that divide: each of the two last convolutions takes one row and column.
        """
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"the discriminator takes {self.in_channels} channels on the last axis; got {x.shape}")
        if min(x.shape[1:3]) >> self.layers < 3:
            raise ValueError(
                f"{self.layers} discriminator layers of stride 2 leave no patch of {x.shape[1]}x{x.shape[2]} pixels; "
                f"take sizes of {3 * 2**self.layers} or more, or fewer layers"
            )
        options = {"epsilon": 1e-5, "use_fast_variance": False, "scale_init": _norm_scale_init, "dtype": self.dtype}
        norm, h = partial(nn.GroupNorm, self.norm_num_groups, **options), x
        for i, width in enumerate(self._widths()):
            first, last = i == 0, i == self.layers
            h = self._conv(width, strides=1 if last else 2, use_bias=first, name=f"conv_{i}")(h)
            if not first:
                h = norm(name=f"norm_{i}")(h)
            h = nn.leaky_relu(h, 0.2)
        return self._conv(1, strides=1, use_bias=True, name="conv_out")(h).astype(jnp.float32)

    def _conv(self, features: int, **options: Any) -> nn.Conv:
        init = nn.initializers.normal(0.02)
        return nn.Conv(features, (4, 4), padding=((1, 1), (1, 1)), kernel_init=init, dtype=self.dtype, **options)
