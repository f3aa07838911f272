"""What a prepared adapter does to a projection's output: the one idea of this library.

An adapter is *prepared* once per prompt, which gives an `Adjustment`, and the Adjustment is *applied* to every
token. Decoding only ever sees Adjustments, so it does not know which tenant, or which method, a row belongs to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adjustment:
    """A prepared adapter of one layer: for each adjusted site, how far its scale is from one.

    A site's output `y` becomes `y * (1 + offset)`. The offset is kept instead of the scale because bfloat16 has
    eight bits around one and full relative precision around zero; the sum is taken in float32. Offsets are
    indexed by a site's Hugging Face name (`q_proj`, ...) and shaped (features,) for one sequence or
    (batch, features) for a batch. The empty Adjustment is the identity and costs nothing.

    >>> import jax.numpy as jnp
    >>> adjustment = Adjustment({"q_proj": jnp.array([[0.5, -1.0]])})
    >>> adjustment.apply("q_proj", jnp.array([[[2.0, 2.0], [4.0, 4.0]]])).tolist()
    [[[3.0, 0.0], [6.0, 0.0]]]
    >>> adjustment.apply("k_proj", jnp.ones((1, 1, 2))).tolist()
    [[[1.0, 1.0]]]
    """

    offsets: Mapping[str, Float[Array, "*b features"]] = field(default_factory=dict)

    def apply(self, site: str, y: Float[Array, "*b t features"]) -> Float[Array, "*b t features"]:
        """Adjusts the output of one site, in float32, and returns it in its own dtype."""
        if site not in self.offsets:
            return y
        scale = 1 + self.offsets[site].astype(jnp.float32)
        return (y.astype(jnp.float32) * scale[..., None, :]).astype(y.dtype)

    def where(self, member_b: Bool[Array, "b"]) -> Adjustment:
        """This Adjustment in the rows that `member_b` marks, the identity in the others.

        >>> adjustment = Adjustment({"q_proj": jnp.ones((2, 1))})
        >>> adjustment.where(jnp.array([True, False])).offsets["q_proj"].tolist()
        [[1.0], [0.0]]
        """
        return jax.tree.map(lambda x: jnp.where(member_b[:, None], x, 0), self)

    def astype(self, dtype: jnp.dtype) -> Adjustment:
        """The form in which it waits for the tokens: two bytes a feature in bfloat16."""
        return jax.tree.map(lambda x: x.astype(dtype), self)


def merge(adjustments: Iterable[Adjustment]) -> Adjustment:
    """One Adjustment for a batch whose rows were prepared by different adapters.

    Every row has at most one adapter, so all offsets but one are zero at each row and site and their sum is exact.

    >>> a = Adjustment({"q_proj": jnp.array([[0.5], [0.0]])})
    >>> b = Adjustment({"q_proj": jnp.array([[0.0], [2.0]]), "up_proj": jnp.array([[0.0], [1.0]])})
    >>> {site: x.tolist() for site, x in merge([a, b]).offsets.items()}
    {'q_proj': [[0.5], [2.0]], 'up_proj': [[0.0], [1.0]]}
    """
    offsets: dict[str, Array] = {}
    for adjustment in adjustments:
        for site, offset in adjustment.offsets.items():
            offsets[site] = offsets[site] + offset if site in offsets else offset
    return Adjustment(offsets)
