"""The former name of python -m dilaff_jax.report.compare_runs, which scripts may have."""

import sys

from dilaff_jax.report.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
