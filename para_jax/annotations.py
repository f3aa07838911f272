"""`Array`, and jaxtyping's arrays with shapes: for annotations only, so that jaxtyping need not be installed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax import Array as Array
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
    from jaxtyping import Int16 as Int16
    from jaxtyping import Key as Key
    from jaxtyping import UInt32 as UInt32
else:
    Array = Bool = Float = Int = Int16 = Key = UInt32 = Any
