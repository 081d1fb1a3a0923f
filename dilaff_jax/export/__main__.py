"""The command python -m dilaff_jax.export WORKDIR FILE."""

import sys

from dilaff_jax.export.stablehlo import main

if __name__ == "__main__":
    sys.exit(main())
