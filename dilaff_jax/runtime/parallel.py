"""Processes and devices: start, mapping a per-device program, placing state and batches.

A program is written for one device; its collectives run over the axis `AXIS`. `Devices.map` turns
it into one over all devices, by `jax.pmap`, by `jax.shard_map`, or, in the mode "fsdp", by
`jax.jit` over arrays that lie in pieces, see `sharding`: the numbers are the same.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dilaff_jax import schema
from dilaff_jax.errors import UserError
from dilaff_jax.runtime import sharding
from dilaff_jax.schema import Key

AXIS = "batch"
Items = TypeVar("Items", list[Any], np.ndarray)
MODES = ("pmap", "shard_map", "fsdp")

KEYS: schema.Section = {
    "mode": Key(
        "pmap",
        schema.choice(*MODES),
        "`pmap`, `shard_map`, or `fsdp`, for models that one device cannot hold: parameters, the "
        "optimiser's state and the average lie in pieces on all devices. The numbers are the same.",
    ),
    "mesh": Key(
        {},
        schema.OPTIONS,
        "Of `fsdp`: `{'data': 2, 'fsdp': 8}`, how many copies of the state there are, each in how "
        "many pieces; all devices together. `{}`: one copy in pieces on all.",
    ),
    "min_size": Key(4096, schema.COUNT, "Of `fsdp`: arrays of fewer numbers stay whole."),
    "devices": Key(0, schema.WHOLE, "Of each process; 0: all."),
    "coordinator": Key(
        "",
        schema.TEXT,
        "HOST:PORT of process 0, `auto` on Cloud TPU, GKE and SLURM, or empty, see "
        "[several hosts](multi_host.md).",
    ),
    "num_processes": Key(0, schema.WHOLE, "How many there are."),
    "process_id": Key(-1, schema.at_least(-1, "-1 for none, or 0 and more"), "This one, from 0."),
    "heartbeat": Key(
        100,
        schema.COUNT,
        "Seconds of silence after which a process is taken for dead, and the others end.",
    ),
}
# Those that `initialize` takes.
PROCESS_KEYS = ("coordinator", "num_processes", "process_id", "heartbeat")
Mode: TypeAlias = Literal["pmap", "shard_map", "fsdp"]
Placement: TypeAlias = str | tuple[str, ...]


def initialize(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, heartbeat: int = 100
) -> None:
    """Joins the other processes, if there are any; must run before JAX is used.

    Args:
        coordinator: HOST:PORT of process 0; "" reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
            JAX_PROCESS_ID, and where they are unset stays alone; "auto" asks the cluster (Cloud
            TPU, GKE, XPK's GPUs, SLURM).
        num_processes: how many there are.
        process_id: this one, from 0.
        heartbeat: seconds of silence after which a process is taken for dead and the others end.

    Raises:
        UserError: some but not all of the three are known; an address that is none.
    """
    if coordinator == "auto":
        jax.distributed.initialize(**_of_xpk(), heartbeat_timeout_seconds=heartbeat)
        return
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = num_processes or int(os.environ.get("JAX_NUM_PROCESSES", 0))
    index = process_id if process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", -1))
    if not address and count <= 1:
        return
    if not address or not 0 <= index < count:
        raise UserError(
            f"found coordinator {address!r}, num_processes {count}, process_id {index}; several "
            "processes need all three, with 0 <= process_id < num_processes: set them in "
            "config.parallel, or as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(
            f"found coordinator {address!r}; expected HOST:PORT of process 0, such as "
            "10.0.0.2:8476, or 'auto' on a cluster that JAX knows"
        )
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=heartbeat)


def _of_xpk() -> dict[str, Any]:
    """What XPK tells the nodes of a GPU workload, in JAX's terms; {} elsewhere.

    An address without its port, which JAX would take for whole, and how many nodes there are under
    names that JAX does not know (`get_env_container` of its core/docker_resources.py).
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK")
    if not all(os.environ.get(name) for name in names):
        return {}
    host, port, count, index = (os.environ[name] for name in names)
    return {
        "coordinator_address": f"{host}:{port}",
        "num_processes": int(count),
        "process_id": int(index),
    }


def local_devices() -> list[jax.Device]:
    """The devices of this process. Raises UserError where there are none of the kind asked for."""
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"JAX finds no device: JAX_PLATFORMS is {jax.config.values.get('jax_platforms')!r}"
            + (f" ({error})" if str(error) else "")
            + '; install JAX for it, such as "jax[cuda13]" or "jax[tpu]", look whether its driver '
            "works, or unset JAX_PLATFORMS"
        ) from error


class Devices:
    """The devices of this run and what is done with them.

    Args:
        mode: how programs are mapped.
        count: use this many of each process's devices; 0 for all.
        compile_for: devices of a slice that is not there, to compile programs for it (not "pmap");
            they are then the devices of this run.
        mesh: of "fsdp": {"data": copies, "fsdp": pieces}; {} for one copy.
        min_size: of "fsdp": arrays of fewer numbers stay whole.

    Raises:
        UserError: an unknown mode, more devices asked for than there are, or a mesh that is not of
            as many.
    """

    def __init__(
        self,
        mode: Mode = "pmap",
        count: int = 0,
        compile_for: Sequence[jax.Device] | None = None,
        mesh: Mapping[str, int] | None = None,
        min_size: int = 4096,
    ) -> None:
        if mode not in MODES:
            allowed = ", ".join(map(repr, MODES))
            raise UserError(f"parallel.mode is {mode!r}; expected one of {allowed}")
        if compile_for is not None and mode == "pmap":
            raise UserError("parallel.mode is 'pmap'; devices to compile for need another")
        if mesh and mode != "fsdp":
            raise UserError(f"parallel.mesh is {dict(mesh)}, which is of mode 'fsdp', not {mode!r}")
        local = local_devices() if compile_for is None else list(compile_for)
        if count < 0 or count > len(local):
            raise UserError(
                f"parallel.devices is {count}; this process has {len(local)} devices (0 for all)"
            )
        self.mode, self._min_size = mode, min_size
        self.local = local[: count or None]
        every = [
            d
            for process in range(jax.process_count())
            for d in [d for d in jax.devices() if d.process_index == process][: count or None]
        ]
        if compile_for is not None:
            every = self.local
        self.total = len(every)
        self._all = every
        # pmap's state is placed on the devices of this process, the others' on those of all.
        self._mesh = Mesh(np.array(self.local if mode == "pmap" else every), (AXIS,))
        self._rows = PartitionSpec(AXIS)
        if mode == "fsdp":
            self._mesh = sharding.mesh(every, mesh or {})
            self._rows = PartitionSpec(self._mesh.axis_names)

    @classmethod
    def of(
        cls, config: ml_collections.ConfigDict, compile_for: Sequence[jax.Device] | None = None
    ) -> "Devices":
        """Those of `config.parallel`, or those to compile for. Raises UserError as the constructor.

        pmap's program is shard_map's, of which it is compiled for devices that are not there.
        """
        mode, count = config.mode, config.devices
        if compile_for is not None:
            mode, count = ("shard_map" if mode == "pmap" else mode), 0
        return cls(mode, count, compile_for, dict(config.mesh), config.min_size)

    def table(self, params: Any) -> str | None:
        """Which parameters are cut and which are whole; None where all are whole."""
        if self.mode != "fsdp":
            return None
        return sharding.table(params, self._mesh.shape["fsdp"], self._min_size)

    @property
    def spread(self) -> int:
        """Of how many devices' rows, one after another, a batch is made that a program gets."""
        return self.total if self.mode == "fsdp" else 1

    def map(
        self,
        program: Callable[..., Any],
        *,
        out: Placement,
        donate: bool = False,
        shared: int = 0,
    ) -> Any:
        """Maps `program(state, batch, *shared)` over all devices.

        Args:
            program: gets the whole state, this device's rows of the batch, and what follows whole.
            out: "replicated", "sharded" or "state", which lies as `place` has it, or a tuple of
                these for a program that returns a tuple.
            donate: give the state's memory to the result. The state must lie where `replicate`
                puts it.
            shared: number of arguments that follow.
        """
        donated = (0,) if donate else ()
        if self.mode == "pmap":
            axes = jax.tree.map({"replicated": None, "state": None, "sharded": 0}.get, out)
            return jax.pmap(
                program,
                axis_name=AXIS,
                in_axes=(None, 0, *(None,) * shared),
                out_axes=axes,
                donate_argnums=donated,
                devices=self._all,
            )
        if self.mode == "fsdp":
            return jax.jit(self._whole(program, out), donate_argnums=donated)
        whole = PartitionSpec()
        specs = jax.tree.map(
            {"replicated": whole, "state": whole, "sharded": PartitionSpec(AXIS)}.__getitem__, out
        )
        # check_vma=False: with it the gradients of replicated parameters arrive already summed, and
        # the program's own psum would count them once more for every device.
        mapped = jax.shard_map(
            program,
            mesh=self._mesh,
            in_specs=(PartitionSpec(), PartitionSpec(AXIS), *(PartitionSpec(),) * shared),
            out_specs=specs,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated)

    def _whole(self, program: Callable[..., Any], out: Placement) -> Callable[..., Any]:
        """A per-device program as one over whole arrays, for the compiler to divide.

        It runs as on a single device that has all rows.
        """

        def run(state: Any, batch: Any, *shared: Any) -> Any:
            def alone(rows: Any) -> Any:
                return program(state, rows, *shared)

            rows = jax.tree.map(lambda x: x[None], batch)
            # So that what is made for a kind of device knows for which: these may not be there.
            with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
                results = jax.vmap(alone, axis_name=AXIS)(rows)
            results = jax.tree.map(lambda x: x[0], results)
            if isinstance(out, str):
                return jax.lax.with_sharding_constraint(results, self._placement(results, out))
            return tuple(
                jax.lax.with_sharding_constraint(r, self._placement(r, o))
                for r, o in zip(results, out, strict=True)
            )

        return run

    def _placement(self, tree: Any, kind: str) -> Any:
        """How each array of a tree lies on the devices."""
        if kind == "state" and self.mode == "fsdp":
            return sharding.of_state(tree, self._mesh, self._min_size)
        spec = self._rows if kind == "sharded" else PartitionSpec()
        return jax.tree.map(lambda _: NamedSharding(self._mesh, spec), tree)

    def place(self, tree: Any) -> Any:
        """Places a state, or the variables of one, on the devices: whole, or in pieces."""
        return self._put(tree, self._placement(tree, "state"))

    def replicate(self, tree: Any) -> Any:
        """Places `tree` on every device; what lies there already stays."""
        return self._put(tree, self._placement(tree, "replicated"))

    def _put(self, tree: Any, placements: Any) -> Any:
        if self.mode == "pmap" or jax.process_count() == 1:
            return jax.device_put(tree, placements)

        def place(x: Any, placement: NamedSharding) -> jax.Array:
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return x
            value = np.asarray(x)
            return jax.make_array_from_callback(value.shape, placement, lambda i: value[i])

        return jax.tree.map(place, tree, placements)

    def shard(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Places this process's rows `[b, ...]`: each device gets b / (local devices) of them.

        Raises:
            UserError: b is not a multiple of the number of local devices.
        """
        return {name: self._shard(name, np.asarray(rows)) for name, rows in batch.items()}

    def local_rows(self, array: jax.Array) -> np.ndarray:
        """Fetches a "sharded" result's rows of this process, in the order of the batch."""
        if self.mode == "pmap":
            rows = jax.device_get(array)
            # Not -1: maps of edges have no channels without a head, so no size to infer it from.
            return rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])
        shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start or 0)
        return np.concatenate([np.asarray(s.data) for s in shards])

    def abstract(self, tree: Any, placement: str = "replicated") -> Any:
        """Gives shapes and dtypes the placement of restored arrays ("state"), or of a batch."""
        if self.mode == "pmap" and jax.process_count() > 1:
            # What is restored is shared by all processes, which pmap's state is not.
            mesh = Mesh(np.array(self._all), (AXIS,))
            placements = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
        else:
            placements = self._placement(tree, placement)
        return jax.tree.map(
            lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), tree, placements
        )

    def per_process(self, batch_size: int) -> int:
        """Rows of a global batch that this process reads.

        Raises:
            UserError: the batch cannot be divided evenly over the devices.
        """
        if batch_size < 1 or batch_size % self.total:
            raise UserError(
                f"batch_size is {batch_size}; {self.total} devices need a multiple of {self.total}"
            )
        return batch_size // jax.process_count()

    def _shard(self, name: str, rows: np.ndarray) -> Any:
        each, rest = divmod(len(rows), len(self.local))
        if rest:
            raise UserError(
                f"{name} has {len(rows)} rows; {len(self.local)} local devices need a multiple"
            )
        if self.mode == "pmap":
            return rows.reshape(len(self.local), each, *rows.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(self._mesh, self._rows), rows)


def agree(failure: Exception | None, what: str) -> None:
    """Ends all processes where one cannot go on, instead of leaving the others waiting for it.

    Args:
        failure: of this process, or None.
        what: could not be done.

    Raises:
        Exception: `failure`.
        UserError: another process has one.
    """
    failed = sum_over_processes(np.asarray(failure is not None, np.int32))
    if failure is not None:
        raise failure
    if failed:
        raise UserError(f"{what}: another process of this run could not; its output says why")


def share(items: Items) -> Items:
    """Those of a list or an array that are this process's."""
    return items[jax.process_index() :: jax.process_count()]


def sum_over_processes(tree: Any) -> Any:
    """Adds NumPy arrays of one shape over all processes; 64-bit integers exactly."""
    if jax.process_count() == 1:
        return tree

    def add(x: np.ndarray) -> np.ndarray:
        # As bytes, because JAX would cut 64-bit numbers down to 32.
        own = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        gathered = multihost_utils.process_allgather(own)
        return np.asarray(gathered).view(x.dtype).reshape(-1, *x.shape).sum(axis=0)

    return jax.tree.map(add, tree)
