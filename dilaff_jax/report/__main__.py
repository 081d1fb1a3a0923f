"""The command: python -m dilaff_jax.report DIR_OR_JSON [--output FILE.html]."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dilaff_jax.ablation import report


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and says where."""
    parser = argparse.ArgumentParser(description=report.__doc__, prog="python -m dilaff_jax.report")
    parser.add_argument("source", type=pathlib.Path, help="a workdir, or an ablation.json")
    parser.add_argument("--output", type=pathlib.Path, help="of the page; beside the numbers")
    options = parser.parse_args(arguments)
    try:
        print(f"written: {report.write(options.source, options.output)}")
    except ImportError as error:
        sys.exit(f"{error}: pip install 'dilaff-jax[report]'")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
