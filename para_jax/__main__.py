"""`python -m para_jax` is `para-jax`."""

from para_jax.cli import command

command()
