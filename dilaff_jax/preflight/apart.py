"""A program compiled in a process of its own.

A compiler keeps what it took, and may take all that a machine has: so each program begins with
nothing, and one that is too much ends its own process only.
"""

import dataclasses
import multiprocessing
import signal
from multiprocessing import connection

import jax
import ml_collections

from dilaff_jax.errors import UserError
from dilaff_jax.preflight.footprint import Footprint
from dilaff_jax.preflight.programs import Programs
from dilaff_jax.runtime import chips, machine
from dilaff_jax.runtime.parallel import Devices


@dataclasses.dataclass(frozen=True)
class Source:
    """What a process needs to lower the programs of a run.

    Attributes:
        config: the whole config, complete.
        num_classes: C.
        eval_size: (height, width) of evaluation images, or three sides of volumes.
        topology: a TPU slice such as "v5e:4x4", or "auto" for the devices of this machine.
    """

    config: ml_collections.ConfigDict
    num_classes: int
    eval_size: tuple[int, ...]
    topology: str

    def programs(self) -> Programs:
        """The programs, for the devices of the topology.

        Raises:
            UserError: the config or the topology cannot be.
        """
        if self.topology != "auto":
            # The TPU compiler is used as a library; this machine has no such device to start.
            jax.config.update("jax_platforms", "cpu")
        devices = Devices.of(self.config.parallel, chips.devices(self.topology))
        return Programs(self.config, self.num_classes, self.eval_size, devices)


def measure(source: Source, name: str, rows: int, limit: float | None) -> Footprint:
    """As `Programs.measure`, in a process that ends with it or with this one.

    Args:
        source: of the programs.
        name: of the program.
        rows: images a device.
        limit: bytes that a device has; None where unknown.

    Raises:
        UserError: the compiler refused the program for another reason than its size, or was ended.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, source, name, rows, limit), daemon=True)
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(_ended(name, process.exitcode)) from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, UserError):
        raise found
    return found


def _send(
    sender: connection.Connection, source: Source, name: str, rows: int, limit: float | None
) -> None:
    machine.end_with_parent()
    try:
        sender.send(source.programs().measure(name, rows, limit))
    except UserError as error:
        sender.send(error)


def _ended(name: str, code: int | None) -> str:
    if code is None or code >= 0:
        return (
            f"the {name} was not compiled: its process ended with status {code}, for what is above"
        )
    ended = f"the compiler of the {name} was ended by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        memory = machine.memory() / chips.GIB
        return (
            f"{ended}: most likely it needed more memory than this machine has ({memory:.0f} GiB). "
            "Stop what else runs here, or compile on a machine with more"
        )
    return f"{ended}, a fault of its own: try another version of it (docs/performance.md)"
