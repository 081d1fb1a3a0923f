"""The former name of python -m dilaff_jax.export.saved_model, which scripts may have."""

import sys

from dilaff_jax.export.saved_model import main

if __name__ == "__main__":
    sys.exit(main())
