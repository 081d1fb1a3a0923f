"""Who may write to a folder of a bucket: a lease, which ends by itself where its holder is gone.

An object store has no locks, but it can refuse to make an object that is there. So terms are
numbered: whoever makes `.lease/00000008` has the eighth. Its holder writes it anew while it lives.
Who wants the next watches it, by its own clock alone, since those of two machines differ, and makes
number nine once nothing has happened for the length of a lease. Whoever finds a later number than
its own has lost, and stops.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable

from absl import logging

from dilaff_jax.runtime.locks import Taken
from dilaff_jax.storage.bucket import Bucket

# Seconds without a sign of life after which a holder is taken to be gone; our choice.
SECONDS = 60.0
_FOLDER = ".lease"


class Lease:
    """The right to write to a bucket's folder; see the module.

    Args:
        bucket: of the folder.
        owner: of this copy of the folder on this machine: whoever holds the copy's own lock and
            finds its name in an old lease knows that its holder is gone.
    """

    def __init__(self, bucket: Bucket, owner: str) -> None:
        self._bucket, self._owner = bucket, owner
        # It must not wait for a bucket longer than others wait for it.
        self._quick = Bucket(bucket.address, patience=SECONDS / 4)
        self._name, self._ended = "", threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._lost: str | None = None
        self._on_loss: Callable[[], object] = lambda: None

    def take(self, on_loss: Callable[[], object], *, wait: bool = False) -> str | None:
        """Takes the lease, and renews it in the background until `release`.

        Returns the owner before, None where there was none.

        Args:
            on_loss: called from another thread if another machine takes the lease over.
            wait: for as long as another machine holds it, and lives.

        Raises:
            Taken: another machine holds it, and lives, or was quicker; not if it is to `wait`.
        """
        while True:
            try:
                return self._take(on_loss)
            except Taken:
                if not wait:
                    raise
            self.wait()

    def wait(self) -> None:
        """Returns once nobody holds it: it was let go, or its holder gave no sign of life."""
        said = False
        while True:
            before = self._last()[1]
            if before.get("owner") == self._owner or before.get("ended", True):
                return
            if not said:
                logging.warning(
                    "%s: %s works there; waiting for it", self._bucket.address, before.get("by")
                )
                said = True
            if not self._lives():
                return

    def _take(self, on_loss: Callable[[], object]) -> str | None:
        terms, before = self._last()
        if before.get("owner") != self._owner and not before.get("ended", True):
            self._watch(before)
        last = int(terms[-1].rpartition("/")[2]) if terms else 0
        self._name = f"{_FOLDER}/{last + 1:08d}"
        if not self._bucket.create(self._name, self._text(ended=False)):
            raise Taken(f"{self._bucket.address}: another machine has just begun there")
        self._bucket.remove(terms)
        self._on_loss = on_loss
        self._thread.start()
        return before.get("owner")

    def check(self) -> None:
        """Raises Taken where another machine has taken the lease over."""
        if self._lost:
            raise Taken(
                f"{self._bucket.address}: {self._lost} has taken it over, because nothing was "
                f"heard from here for {SECONDS:.0f} s. What is there is its own now; what was done "
                "here since is in the copy alone"
            )

    def stop(self) -> None:
        """Renews it no more; without `release` before, the next waits for it to end by itself."""
        self._ended.set()
        if self._thread.ident:
            self._thread.join()

    def release(self) -> None:
        """Ends the lease; the next need not wait."""
        self.stop()
        if self._name and not self._lost and not self._successor(self._bucket):
            self._bucket.write(self._name, self._text(ended=True))

    def _last(self) -> tuple[list[str], dict]:
        """The objects of all terms, and the content of the last; {} without any."""
        terms = sorted(self._bucket.list(_FOLDER))
        return terms, self._content(self._bucket, terms[-1]) if terms else {}

    def _watch(self, before: dict) -> None:
        """Returns when a holder gave no sign of life for long enough; raises Taken if it does."""
        address = self._bucket.address
        logging.warning(
            "%s is held by %s; waiting %.0f s for a sign of life",
            *(address, before.get("by"), SECONDS),
        )
        if self._lives():
            raise Taken(
                f"{address}: {before.get('by')} works there; wait for it, or use another folder"
            )
        logging.warning("%s gives none: it is taken over", before.get("by"))

    def _lives(self) -> bool:
        """Whether anything happens to the lease within its length."""
        version, begun = self._bucket.list(_FOLDER), time.monotonic()
        while time.monotonic() - begun < SECONDS:
            time.sleep(min(5.0, SECONDS / 4))
            if self._bucket.list(_FOLDER) != version:
                return True
        return False

    def _renew(self) -> None:
        while not self._ended.wait(SECONDS / 4):
            try:
                later = self._successor(self._quick)
                # A store that makes what is there all the same has let another in beside us.
                own = self._content(self._quick, self._name)
                if not later and own.get("owner", self._owner) != self._owner:
                    later = self._name
                if later:
                    self._lost = str(self._content(self._quick, later).get("by"))
                    self._on_loss()
                    return
                self._quick.write(self._name, self._text(ended=False))
            except Exception as error:  # whatever it is, the next time may be better
                logging.debug("the lease was not renewed: %s", error)

    def _successor(self, bucket: Bucket) -> str | None:
        later = [name for name in bucket.list(_FOLDER) if name > self._name]
        return max(later, default=None)

    def _content(self, bucket: Bucket, name: str) -> dict:
        try:
            return dict(json.loads(bucket.read(name) or b"{}"))
        except ValueError:
            return {}  # of a writer that is unknown here; it is not renewed in our form either

    def _text(self, *, ended: bool) -> bytes:
        by = f"process {os.getpid()} on {socket.gethostname()}"
        content = {"owner": self._owner, "by": by, "at": time.time(), "ended": ended}
        return json.dumps(content).encode()
