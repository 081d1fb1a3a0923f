"""The former name of python -m dilaff_jax.export.onnx, which scripts may have."""

import sys

from dilaff_jax.export.onnx import main

if __name__ == "__main__":
    sys.exit(main())
