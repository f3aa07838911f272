"""`python -m para_jax.planning`: the process that plans are made in."""

from para_jax.planning.process import serve

serve()
