"""Batches: the same stream for any number of workers and processes, and exact resume."""

import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import grain
import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dilaff_jax.data import batch_iterator, data_config, datasets, pipeline, prepare
from dilaff_jax.data.images import DataError
from tests.data_files import image_folder, tiny_shapes


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """`shapes/tiny`: 10 train, 7 validation, 2 test images of 32 × 32; `image_folder/mixed`."""
    folder = tmp_path_factory.mktemp("data")
    tiny_shapes(folder)
    source = image_folder(folder / "in", ("a", "b"), size=(20, 30))
    image_folder(source, ("c",), size=(26, 12))
    prepare.prepare("image_folder/mixed", folder, source)
    return folder


@pytest.fixture
def data(data_dir):
    return data_config.default(dataset="shapes/tiny", data_dir=str(data_dir), crop_size=(24, 28))


def train_batches(data, **options):
    return pipeline.train_batches(data, datasets.load(data, data.train_split), **options)


def eval_batches(data, split=None, **options):
    return pipeline.eval_batches(data, datasets.load(data, split or data.eval_split), **options)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def train(data, count, batch_size=4, seed=1, **kwargs):
    with train_batches(data, batch_size=batch_size, seed=seed, **kwargs) as it:
        return take(it, count)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])


# Order.


@hypothesis.given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 1000))
def test_every_epoch_is_a_permutation(seed, length, epoch):
    places = [pipeline.place(seed, epoch * length + i, length) for i in range(length)]
    assert {e for e, _ in places} == {epoch}
    assert sorted(i for _, i in places) == list(range(length))


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed, epoch):
        return tuple(pipeline.place(seed, epoch * 50 + i, 50)[1] for i in range(50))

    orders = {order(seed, epoch) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25  # also not those of another seed's epochs


def test_the_first_index_of_an_epoch_is_uniform():
    first = [pipeline.place(seed, 0, 10)[1] for seed in range(2000)]
    assert np.bincount(first, minlength=10).min() > 130


def test_the_same_image_is_augmented_anew_every_epoch(data):
    seen = train(data, 3, batch_size=10)
    flat = [image.tobytes() for batch in seen for image in batch["image"]]
    assert len(set(flat)) == 30


def test_batches_have_the_stated_shapes(data):
    (batch,) = train(data, 1)
    assert batch["image"].shape == (4, 24, 28, 3)
    assert batch["label"].shape == (4, 24, 28)
    assert {value.dtype for value in batch.values()} == {np.dtype(np.uint8)}
    assert {type(value) for value in batch.values()} == {np.ndarray}


def test_the_stream_is_the_same_with_0_1_and_2_workers(data):
    want = train(data, 7)  # 28 of 10 examples: it crosses epochs
    for workers in (1, 2):
        data.workers = workers
        assert_same(train(data, 7), want)


def test_the_stream_does_not_depend_on_cache_prefetch_or_threads(data):
    want = train(data, 6)
    data.cache, data.prefetch = True, 5
    assert_same(train(data, 6), want)


def test_another_seed_is_another_stream(data):
    one, two = (train(data, 1, seed=s)[0]["image"] for s in (1, 2))
    assert (one != two).any()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_make_the_batches_of_one(data, count):
    want = train(data, 6)
    parts = [train(data, 6, process_index=p, process_count=count) for p in range(count)]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in want[0]}
        for step in range(6)
    ]
    assert_same(joined, want)


class Spy:
    """A source that remembers what was read."""

    def __init__(self, source):
        self.source, self.read = source, []
        self.channels, self.dtype = source.channels, source.dtype

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.read.append(index)
        return self.source[index]


def test_shards_are_disjoint_and_complete_and_nothing_else_is_read(data):
    read = []
    for process in range(2):
        batch_at = train_batches(
            data, batch_size=10, seed=0, process_index=process, process_count=2
        ).batch_at
        spy = Spy(batch_at.source)
        object.__setattr__(batch_at, "source", spy)
        batch_at(3)
        assert len(spy.read) == 5
        read.append(set(spy.read))
    assert not read[0] & read[1]
    assert read[0] | read[1] == set(range(10))


def test_num_epochs_ends_the_stream(data):
    with train_batches(data, batch_size=4, seed=0, num_epochs=2) as it:
        assert len(it) == len(list(it)) == 5


def test_the_stream_is_endless_by_default(data):
    with train_batches(data, batch_size=4, seed=0) as it:
        with pytest.raises(TypeError, match="no length"):
            len(it)
        state = it.get_state() | {"step": 10**9}
        it.set_state(state)
        assert next(it)["image"].shape == (4, 24, 28, 3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, "no positive multiple of 2 processes"),
        ({"batch_size": 0}, "no positive multiple"),
        ({"batch_size": 4, "process_index": 2, "process_count": 2}, "not in 0..1"),
        ({"batch_size": 11, "num_epochs": 1}, "do not fill one batch of 11"),
        ({"batch_size": 4, "seed": -1}, "seed=-1: want 0 or more"),
    ],
)
def test_bad_arguments_are_refused(data, kwargs, message):
    with pytest.raises(ValueError, match=message):
        train_batches(data, **{"seed": 0} | kwargs)


def test_an_unknown_key_is_refused(data):
    with data.unlocked():
        data.crop = (3, 3)
    with pytest.raises(ValueError, match=r"no key 'crop' .did you mean 'crop_size'"):
        train_batches(data, batch_size=4, seed=0)


# Position.


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 0)])
def test_a_restored_stream_continues_exactly_in_mid_epoch(data, before, after):
    want = train(data, 8)
    data.workers = before
    with train_batches(data, batch_size=4, seed=1) as it:
        take(it, 3)  # 12 of 10 examples: in the second epoch
        state = it.get_state()
    data.workers = after
    with train_batches(data, batch_size=4, seed=1) as it:
        it.set_state(state)
        assert it.get_state() == state
        assert_same(take(it, 5), want[3:])


def test_going_back_in_a_running_stream_is_exact(data):
    data.workers = 2
    with train_batches(data, batch_size=4, seed=1) as it:
        state = it.get_state()
        first = take(it, 4)
        it.set_state(state)
        assert_same(take(it, 4), first)


def test_a_position_saved_by_one_process_serves_two(data):
    want = train(data, 6)
    with train_batches(data, batch_size=4, seed=1) as it:
        take(it, 2)
        state = it.get_state()
    for process in range(2):
        kwargs = {"process_index": process, "process_count": 2}
        with train_batches(data, batch_size=4, seed=1, **kwargs) as it:
            it.set_state(state)
            for batch, whole in zip(take(it, 4), want[2:], strict=True):
                rows = whole["label"][2 * process : 2 * process + 2]
                np.testing.assert_array_equal(batch["label"], rows)


@pytest.mark.parametrize("change", [{"seed": 2}, {"batch_size": 2}])
def test_a_position_of_another_stream_is_refused(data, change):
    arguments = {"batch_size": 4, "seed": 1}
    state = train_batches(data, **arguments).get_state()
    other = train_batches(data, **arguments | change)
    with pytest.raises(ValueError, match=f"{next(iter(change))} differ"):
        other.set_state(state)


def test_the_position_goes_through_an_orbax_checkpoint(data, tmp_path):
    want = train(data, 6)
    with (
        train_batches(data, batch_size=4, seed=1) as it,
        ocp.CheckpointManager(tmp_path) as manager,
    ):
        take(it, 2)
        state = ocp.args.StandardSave({"weight": np.arange(3.0)})
        save = ocp.args.Composite(state=state, data=grain.checkpoint.CheckpointSave(it))
        manager.save(2, args=save)
        take(it, 2)
        manager.wait_until_finished()
        restore = grain.checkpoint.CheckpointRestore(it)
        manager.restore(2, args=ocp.args.Composite(data=restore))
        assert_same(take(it, 4), want[2:])


# Prefetch to the device.


def test_prefetched_batches_are_on_the_device_and_in_order(data):
    want = train(data, 5, num_epochs=2)
    it = train_batches(data, batch_size=4, seed=1, num_epochs=2)
    it = batch_iterator.DevicePrefetch(it, jax.device_put, depth=2)
    found = list(it)
    it.close()
    assert isinstance(found[0]["image"], jax.Array)
    assert_same([jax.device_get(batch) for batch in found], want)


@pytest.mark.parametrize(("depth", "workers"), [(1, 0), (3, 0), (2, 1)])
def test_the_saved_position_is_that_of_the_batches_returned(data, depth, workers):
    want = train(data, 8)
    data.workers = workers
    make = lambda: batch_iterator.DevicePrefetch(  # noqa: E731
        train_batches(data, batch_size=4, seed=1), jax.device_put, depth
    )
    it = make()
    assert it.get_state()["step"] == 0
    take(it, 3)
    state = it.get_state()
    it.close()
    assert state["step"] == 3
    it = make()
    it.set_state(state)
    assert it.get_state() == state
    assert_same([jax.device_get(batch) for batch in take(it, 5)], want[3:])
    it.set_state(state)  # also while batches lie ahead
    assert_same([jax.device_get(batch) for batch in take(it, 1)], want[3:4])
    it.close()


def test_batches_on_the_device_outlive_the_workers_memory(data):
    want = train(data, 6)
    data.workers = 1
    with train_batches(data, batch_size=4, seed=1) as it:
        held = [jax.device_put(batch) for batch in take(it, 6)]
    assert_same([jax.device_get(batch) for batch in held], want)


def test_depth_0_is_refused(data):
    it = train_batches(data, batch_size=4, seed=1)
    with pytest.raises(ValueError, match="depth=0: want at least 1"):
        batch_iterator.DevicePrefetch(it, jax.device_put, depth=0)


# Evaluation.


@pytest.mark.parametrize(
    ("batch_size", "processes"), [(1, 1), (3, 1), (8, 1), (4, 2), (8, 4), (16, 2)]
)
def test_every_image_is_evaluated_exactly_once(data, batch_size, processes):
    source = datasets.load(data, "validation")
    seen, lengths, shapes = [], set(), set()
    for process in range(processes):
        kwargs = {"process_index": process, "process_count": processes}
        it = eval_batches(data, batch_size=batch_size, **kwargs)
        found = list(it)
        lengths.add(len(found))
        shapes |= {tuple(batch[k].shape for k in sorted(batch)) for batch in found}
        for batch in found:
            for row in np.flatnonzero(batch["mask"]):
                index = int(batch["index"][row])
                seen.append(index)
                np.testing.assert_array_equal(batch["label"][row], source[index]["label"])
                np.testing.assert_array_equal(batch["image"][row], source[index]["image"])
            padding = ~batch["mask"]
            assert (batch["label"][padding] == 255).all()
            assert (batch["index"][padding] == -1).all()
            assert (batch["size"][padding] == 0).all()
    assert sorted(seen) == list(range(7))
    assert lengths == {-(-7 // batch_size)}
    assert len(shapes) == 1


def test_images_of_different_sizes_are_padded_and_their_sizes_kept(data_dir):
    data = data_config.default(
        dataset="image_folder/mixed", data_dir=str(data_dir), eval_split="train", pad_rgb=(1, 2, 3)
    )
    source = datasets.load(data, "train")
    (batch,) = list(eval_batches(data, batch_size=3))
    assert batch["size"].tolist() == source.sizes.tolist() == [[20, 30], [20, 30], [26, 12]]
    assert batch["image"].shape == (3, 26, 30, 3)
    for row, (height, width) in enumerate(batch["size"]):
        example = source[row]
        np.testing.assert_array_equal(batch["image"][row, :height, :width], example["image"])
        np.testing.assert_array_equal(batch["label"][row, :height, :width], example["label"])
        outside = np.ones((26, 30), bool)
        outside[:height, :width] = False
        assert (batch["image"][row][outside] == (1, 2, 3)).all()
        assert (batch["label"][row][outside] == 255).all()


@pytest.mark.parametrize(("processes", "unit"), [(1, 1), (1, 4), (2, 2)])
def test_like_sizes_come_together_and_every_image_once(processes, unit):
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 400, (50, 2))
    sizes[17] = 3000, 4000  # one of a camera among small ones
    sizes[18] = 10, 10
    groups = pipeline.like_sizes(sizes, 8, unit)
    assert sorted(i for group in groups for i in group.indices) == list(range(50))
    areas = sizes.prod(axis=1)
    median = next(g for g in groups if np.argsort(areas)[25] in g.indices)
    for group in groups:
        members = sizes[list(group.indices)]
        assert (members <= group.size).all()
        assert group.rows % unit == 0
        assert group.rows <= 8
        limit = 8 * np.prod(median.size)
        assert group.rows == unit or group.rows * np.prod(group.size) <= limit
        assert list(group.indices) == sorted(group.indices)
    alone = next(g for g in groups if 17 in g.indices)
    assert (alone.indices, alone.size, alone.rows) == ((17,), (3000, 4000), unit)
    assert len(groups) <= 4
    boxes = [np.prod(group.size) for group in groups]
    assert all(2 * b <= a for a, b in itertools.pairwise(boxes))
    one = pipeline.like_sizes(np.full((7, 2), 32), 4, unit)
    assert one == (pipeline.Group(tuple(range(7)), (32, 32), 4),)


def test_batches_of_like_sizes_hold_every_image_once(data_dir):
    data = data_config.default(
        dataset="image_folder/mixed", data_dir=str(data_dir), eval_split="train"
    )
    source = datasets.load(data, "train")
    for processes in (1, 2):
        batches = [
            list(
                eval_batches(
                    data, batch_size=4, unit=2, process_index=process, process_count=processes
                )
            )
            for process in range(processes)
        ]
        assert len({len(b) for b in batches}) == 1
        found = [(b, r) for own in batches for b in own for r in np.flatnonzero(b["mask"])]
        assert sorted(int(b["index"][r]) for b, r in found) == [0, 1, 2]
        for b, r in found:
            height, width = b["size"][r]
            example = source[int(b["index"][r])]
            np.testing.assert_array_equal(b["image"][r, :height, :width], example["image"])
        # Of 600 and 312 pixels: like enough.
        assert {b["image"].shape[1:3] for own in batches for b in own} == {(26, 30)}
    data.eval_size = (32, 40)
    assert next(eval_batches(data, batch_size=2, unit=1))["image"].shape == (2, 32, 40, 3)


def test_a_given_eval_size_is_kept_and_too_small_a_one_refused(data_dir):
    data = data_config.default(
        dataset="image_folder/mixed", data_dir=str(data_dir), eval_split="train"
    )
    data.eval_size = (32, 40)
    assert next(eval_batches(data, batch_size=2))["image"].shape == (2, 32, 40, 3)
    data.eval_size = (24, 40)
    message = (
        r"eval_size=\(24, 40\) is smaller than 1 images .*'c' \(26, 12\); want at least \(26, 30\)"
    )
    with pytest.raises(ValueError, match=message):
        eval_batches(data, batch_size=2)


def test_evaluation_at_half_size_counts_half_sizes(data):
    data.resize = 0.5
    batch = next(eval_batches(data, batch_size=2))
    assert batch["image"].shape == (2, 16, 16, 3)
    assert batch["size"].tolist() == [[16, 16], [16, 16]]


def test_evaluation_is_the_same_with_workers(data):
    want = list(eval_batches(data, batch_size=3, split="train"))
    data.workers = 2
    with eval_batches(data, batch_size=3, split="train") as it:
        assert_same(list(it), want)


# Workers.


def test_a_fault_in_a_worker_reaches_the_caller(data, data_dir, tmp_path):
    shutil.copytree(data_dir / "shapes", tmp_path / "shapes")
    data.data_dir, data.workers = str(tmp_path), 1
    it = train_batches(data, batch_size=4, seed=0)
    it.batch_at.source.records = Damaged()
    with pytest.raises(DataError, match=r"shapes/tiny train, example 'train_0.*damaged record"):
        next(it)
    it.close()


class Damaged:
    """Records that are no images."""

    def __getitem__(self, index):
        return {"image": b"\x00", "label": b"\x00"}


def test_too_little_shared_memory_is_said_at_once(data, monkeypatch):
    data.workers = 2
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(batch_iterator.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="of shared memory, /dev/shm has 0 MiB free; lower"):
        train_batches(data, batch_size=4, seed=0)


SCRIPT = """
import sys, time
from dilaff_jax.data import data_config, datasets, pipeline
if __name__ == "__main__":
    data = data_config.default(dataset="shapes/tiny", data_dir=sys.argv[1], workers=2, crop_size=(24, 28))
    source = datasets.load(data, "train")
    it = pipeline.train_batches(data, source, batch_size=4, seed=1)
    for _ in range(4):  # from both workers
        next(it)
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        next(it)
        print("batch", flush=True)
"""


def children(pid):
    """Worker processes of a process: its children that run Python's spawn_main."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as line:
                    if int(stat.read().rsplit(")", 1)[1].split()[1]) == pid:
                        found.append((int(entry), line.read()))
            except (FileNotFoundError, ProcessLookupError):
                pass
    return [child for child, line in found if "spawn_main" in line]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def running(data_dir, tmp_path):
    """A process that reads batches with two workers, outside of absl and pytest."""
    script = tmp_path / "reader.py"
    script.write_text(SCRIPT)
    errors = tmp_path / "errors.txt"
    with open(errors, "w") as file:
        command = [sys.executable, str(script), str(data_dir)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout.readline() == "ready\n", errors.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def test_workers_end_when_their_process_is_killed(running):
    workers = children(running.pid)
    assert len(workers) == 2
    running.kill()
    running.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_workers_leave_signals_of_the_group_to_their_parent(running):
    for worker in children(running.pid):
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    for _ in range(20):
        assert running.stdout.readline() == "batch\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_script_may_end_without_closing_its_batches(workers, data_dir, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from dilaff_jax.data import data_config, datasets, pipeline\n"
        "def main():\n"
        f"    c = data_config.default(dataset='shapes/tiny', data_dir={str(data_dir)!r},\n"
        f"                            crop_size=(32, 32), workers={workers})\n"
        "    batches = pipeline.train_batches(c, datasets.load(c, 'train'), batch_size=4, seed=0)\n"
        "    print(next(batches)['image'].shape)\n"
        "    globals()['left_open'] = batches\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    root = pathlib.Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(4, 32, 32, 3)"
    assert "TypeError" not in result.stderr
    assert "Exception ignored" not in result.stderr
