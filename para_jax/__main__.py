"""`python -m para_jax` is `para-jax`."""

import sys

from para_jax.cli import main

sys.exit(main())
