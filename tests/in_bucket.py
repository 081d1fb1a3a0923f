"""The command, as `python -m dilaff_jax.main`, with a bucket looked at often and leases of seconds."""

import os

from dilaff_jax import main
from dilaff_jax.storage import bucket, lease, mirror

mirror.EVERY, lease.SECONDS = 0.3, 4.0
bucket.PATIENCE = float(os.environ.get("PATIENCE", bucket.PATIENCE))

if __name__ == "__main__":
    main.run()
