"""The former name of python -m dilaff_jax.report.run_summary, which scripts may have."""

import sys

from dilaff_jax.report.run_summary import main

if __name__ == "__main__":
    sys.exit(main())
