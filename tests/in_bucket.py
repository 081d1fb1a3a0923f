"""The command, as `python -m dilaff_jax.main`, with a bucket looked at often and leases of seconds."""

from dilaff_jax import main
from dilaff_jax.storage import lease, mirror

mirror.EVERY, lease.SECONDS = 0.3, 4.0

if __name__ == "__main__":
    main.run()
