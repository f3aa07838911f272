"""Counts the operations of a program's matmuls before it is compiled."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


def flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Multiplications and additions of all matmuls, on all devices together.

    A scan counts all of its iterations, a while loop with a data-dependent end counts one. A kernel counts every cell
    of its grid, so attention counts as if every token attended to the full row.

    >>> import jax.numpy as jnp
    >>> def twice(x, w):
    ...     return jax.lax.scan(lambda x, _: (x @ w, None), x, length=2)[0]
    >>> flops(jax.make_jaxpr(twice)(jnp.ones((3, 4)), jnp.ones((4, 4)))) == 2 * 2 * 3 * 4 * 4
    True
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    # Unused gradients of frozen weights are in the jaxpr until dead code is eliminated.
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(_eqn_flops(eqn) for eqn in needed.eqns)


def _eqn_flops(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name in ("dot_general", "ragged_dot_general"):
        ragged = params.get("ragged_dot_dimension_numbers")
        (inputs, _), _ = params["dimension_numbers"] if ragged is None else ragged.dot_dimension_numbers
        return 2.0 * prod(eqn.outvars[0].aval.shape) * prod(eqn.invars[0].aval.shape[i] for i in inputs)
    inner = [sum(_eqn_flops(eqn) for eqn in jaxpr.eqns) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner)
    times = {"scan": lambda: params["length"], "shard_map": lambda: params["mesh"].size}
    times["pallas_call"] = lambda: prod(params["grid_mapping"].grid)
    return sum(inner) * (times[name]() if name in times else 1)


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
    return [leaf for leaf in leaves if isinstance(leaf, Jaxpr | ClosedJaxpr)]
