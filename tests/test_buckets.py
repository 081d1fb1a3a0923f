"""Buckets of both protocols: what is written there, read from there, and who may."""

import asyncio
import errno
import importlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import threading
import time
import types

import pytest

from dilaff_jax import errors
from dilaff_jax.storage import bucket, copy, lease, mirror
from tests import buckets

SCHEMES = ("gs", "s3")


@pytest.fixture(scope="module", params=SCHEMES)
def served(request):
    with buckets.serving(request.param) as found:
        yield found


@pytest.fixture
def place(served, tmp_path, monkeypatch, request):
    """An address of its own, and the proxy's faults; copies are in tmp_path/cache."""
    monkeypatch.setenv("DILAFF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bucket, "PATIENCE", 20.0)
    monkeypatch.setattr(lease, "SECONDS", 2.0)
    if served[0].startswith("gs"):  # gcsfs's own waits are tens of seconds
        own = types.SimpleNamespace(**vars(asyncio))
        own.sleep = lambda _: asyncio.sleep(0.01)
        monkeypatch.setattr("gcsfs.retry.asyncio", own)
    with buckets.own_place(served, request.node.name, monkeypatch) as found:
        yield found


def write(folder, **contents):
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def objects(address):
    """What a bucket holds, without the lease."""
    found = bucket.Bucket(address)
    return {n: found.read(n) for n in found.list() if not n.startswith(".lease")}


def on_another_machine(monkeypatch, tmp_path, name):
    monkeypatch.setenv("DILAFF_JAX_CACHE", str(tmp_path / name))


# The protocol.


def test_any_name_and_size_comes_back(place, tmp_path):
    address, _ = place
    there, here = bucket.Bucket(address), tmp_path / "here"
    rng = random.Random(0)
    sizes = {"plain": 10, "a/b/c": 1, "empty": 0, "Größe [1] #2 %20?.bin": 300_000, "big": 40 << 20}
    for name, size in sizes.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(rng.randbytes(size))
    for number, end in enumerate((b"\r", b"\r\n", b"\n\n", b"\r\n--==0==", b"--")):
        (here / f"end-{number}").write_bytes(b"text" + end)
        sizes[f"end-{number}"] = 4 + len(end)
    bucket.Bucket(address + "2").write("neighbour", b"not ours")
    done = []
    there.put([*sizes, "gone meanwhile"], here, done.append)
    assert sorted(done) == sorted(sizes)
    assert {n: i.size for n, i in there.list().items()} == sizes
    assert set(there.list("a")) == {"a/b/c"}
    fetched = []
    there.fetch(sizes, tmp_path / "back", fetched.append)
    assert tree(tmp_path / "back") == tree(here)
    assert sorted(fetched) == sorted(sizes)
    before = there.list()["plain"].version
    there.write("plain", b"something else")
    assert there.list()["plain"].version != before
    there.remove(["plain", "not there"])
    assert "plain" not in there.list()
    assert there.read("plain") is None
    assert [p.name for p in tmp_path.iterdir()] == ["here", "back"] or not (
        tmp_path / "back.part"
    ).exists()


def test_of_many_who_make_one_object_one_is_told_so(place):
    address, faults = place
    told = []
    threads = [
        threading.Thread(
            target=lambda i=i: told.append(bucket.Bucket(address).create("x", b"%d" % i))
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [False] * 7 + [True]
    faults.lost = 1  # the server has done it, and nobody hears
    assert bucket.Bucket(address).create("y", b"mine")
    assert not bucket.Bucket(address).create("y", b"another's")


def passing(faults, seconds, **values):
    for name, value in values.items():
        setattr(faults, name, value)
    timer = threading.Timer(seconds, lambda: [setattr(faults, n, 0) for n in values])
    timer.start()
    return timer


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_bucket_that_fails_for_a_while_is_waited_for(status, place, tmp_path):
    address, faults = place
    there = bucket.Bucket(address)
    there.write("x", b"content")
    write(tmp_path / "here", y="other")
    for act in (
        lambda: there.read("x") == b"content",
        lambda: "x" in there.list(),
        lambda: there.put(["y"], tmp_path / "here", lambda _: None) is None,
        lambda: there.create(f"new-{len(there.list())}", b"1"),
    ):
        timer = passing(faults, 1.5, status=status)
        assert act()
        timer.join()
    assert there.read("y") == b"other"


def test_answers_that_end_in_the_middle_are_asked_for_again(place, tmp_path):
    address, faults = place
    there, content = bucket.Bucket(address), random.Random(1).randbytes(1 << 20)
    there.write("x", content)
    faults.cut, faults.only = 2, lambda method, path: "prefix=" not in path
    there.fetch(["x"], tmp_path / "back", lambda _: None)
    assert faults.cut == 0
    assert (tmp_path / "back/x").read_bytes() == content
    faults.cut = 2
    assert there.read("x") == content


def test_what_no_waiting_mends_is_said_at_once(place, monkeypatch):
    address, faults = place
    faults.status = 403
    for act in (bucket.Bucket.list, lambda b: b.read("x"), lambda b: b.write("x", b"1")):
        with pytest.raises(errors.UserError, match=r"no access .*log in"):
            act(bucket.Bucket(address))
    faults.status = 0
    away = address.replace("//bucket/", "//no-such-bucket/")
    for act in (bucket.Bucket.list, lambda b: b.write("x", b"1")):
        with pytest.raises(errors.UserError, match=r"there is no bucket ..://no-such-bucket; make"):
            act(bucket.Bucket(away))
    faults.status = 503
    with pytest.raises(bucket.Unreachable, match=r"failed for \d+ s .*run again when it is back"):
        bucket.Bucket(address, patience=0.5).list()
    faults.status = 0
    with pytest.raises(errors.UserError, match="want gs://BUCKET/FOLDER or s3://"):
        bucket.Bucket(address[:5])

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(errors.UserError, match=r"needs (gcsfs|s3fs): pip install"):
        bucket.Bucket(address)


# What is read.


def test_a_folder_that_is_read_follows_the_bucket(place, tmp_path, monkeypatch):
    address, faults = place
    there = bucket.Bucket(address)
    for name in ("a.txt", "b/c.txt", "x.lock", "y.part.txt"):
        there.write(name, name.encode())
    folder = mirror.local(address, "--input")
    assert tree(folder) == objects(address)
    assert mirror.local(address + "/b/c.txt", "--input").read_bytes() == b"b/c.txt"

    faults.seen.clear()
    assert mirror.local(address, "--input") == folder
    asked = [line for line in faults.seen if "c.txt" in line or "a.txt" in line]
    assert not asked, "what is there already is not fetched again"

    there.write("a.txt", b"new")
    there.remove(["b/c.txt"])
    (folder / "x.lock").write_text("damaged here")
    (folder / "stranger").write_text("put here")
    (folder / "y.part.txt").unlink()
    assert tree(mirror.local(address, "--input")) == objects(address)
    assert not (folder / "b").exists()

    # Files of one folder that are read one by one do not disturb one another, nor the folder.
    there.write("b/d.txt", b"d")
    whole = mirror.local(address, "--input")
    first, second = (mirror.local(f"{address}/{n}", "x") for n in ("a.txt", "b/d.txt"))
    assert (first.read_bytes(), second.read_bytes()) == (b"new", b"d")
    assert tree(whole) == objects(address)
    assert first.name == "a.txt", "a suffix tells what a file is"

    with pytest.raises(mirror.Nothing, match="--input: there is nothing at"):
        mirror.local(address + "/nothing", "--input")
    monkeypatch.setattr(
        copy.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=3, total=3, used=0)
    )
    there.write("a.txt", b"more than that")
    with pytest.raises(errors.UserError, match="set DILAFF_JAX_CACHE to a folder on a larger one"):
        mirror.local(address, "--input")


@pytest.mark.parametrize("name", ["../outside", "b//c", "b/../../outside", "./d"])
def test_a_name_that_would_lie_elsewhere_is_refused(name, place, tmp_path):
    address, _ = place
    found = {f"bucket/x/{name}": {"type": "file", "size": 1, "generation": "1"}}
    there = bucket.Bucket(address)
    there._root = "bucket/x"
    there._system = types.SimpleNamespace(find=lambda *_, **__: found)
    with pytest.raises(errors.UserError, match="which no file can be called; rename it"):
        there.list()


def test_a_store_that_ignores_the_condition_is_noticed(place, tmp_path, monkeypatch):
    """Another writes the same term: who finds it stops."""
    address, _ = place
    stopped = []
    monkeypatch.setattr(mirror.os, "kill", lambda *about: stopped.append(about))

    def work():
        with mirror.written(address, "--workdir", alone=True):
            other = json.dumps({"owner": "another", "by": "another machine", "ended": False})
            bucket.Bucket(address).write(".lease/00000001", other.encode())
            wait(lambda: stopped)

    with pytest.raises(lease.Taken, match="another machine has taken it over"):
        work()


def test_a_path_on_a_disk_is_itself(tmp_path):
    assert mirror.local(tmp_path, "x") == tmp_path
    with mirror.written(str(tmp_path / "new"), "x", alone=True) as folder:
        assert folder == tmp_path / "new"
    assert not (tmp_path / "new").exists()


# What is written.


def test_what_is_written_is_there_at_the_end_and_before(place, monkeypatch):
    address, _ = place
    monkeypatch.setattr(mirror, "EVERY", 0.1)
    with mirror.written(address, "--workdir", alone=True) as folder:
        write(folder, a="1", b__c="2")
        write(
            folder,
            **{".lock-0": "", "x.part": "half", "checkpoints__3.orbax-checkpoint-tmp__d": ""},
        )
        wait(lambda: set(objects(address)) == {"a", "b/c"})
        with (folder / "a").open("a") as file:
            file.write("more")
        wait(lambda: objects(address)["a"] == b"1more")
        (folder / "b/c").rename(folder / "d")
    assert objects(address) == {"a": b"1more", "d": b"2"}
    with mirror.written(address, "--workdir", alone=True) as again:
        assert again == folder
        (folder / "a").unlink()
    assert objects(address) == {"d": b"2"}


def wait(condition, seconds=30):
    done = threading.Event()
    for _ in range(seconds * 20):
        if condition():
            return
        done.wait(0.05)
    raise AssertionError("it did not come to that")


def test_a_checkpoint_is_there_whole_or_not_at_all(place, tmp_path, monkeypatch):
    """Its mark is brought last and removed first, and without it nobody takes it."""
    address, faults = place
    monkeypatch.setattr(mirror, "EVERY", 1000)
    with mirror.written(address, "--workdir", alone=True) as folder:
        write(folder, checkpoints__3___CHECKPOINT_METADATA="{}", **{"metrics.jsonl": "line"})
        write(folder, **{f"checkpoints__3__state__d__{i}": "x" * 100 for i in range(20)})
        faults.seen.clear()
    put = [
        line for line in faults.seen if line.startswith(("PUT", "POST")) and ".lease" not in line
    ]
    marks = [i for i, line in enumerate(put) if "_CHECKPOINT_METADATA" in line]
    if address.startswith("s3"):  # Google's names are in what is sent
        assert marks == [len(put) - 1]
    there = bucket.Bucket(address)
    there.remove(["checkpoints/3/_CHECKPOINT_METADATA"])
    below = "arm/seed-0/checkpoints/7/state/d"
    for name in ("checkpoints/4/state/d", below):
        there.write(name, b"torn")
    on_another_machine(monkeypatch, tmp_path, "elsewhere")
    with mirror.written(address, "--workdir", alone=True) as folder:
        assert set(tree(folder)) == {"metrics.jsonl"}
        assert set(objects(address)) == {"metrics.jsonl", below}, "what is torn is cleared away"
    with mirror.written(mirror.below(address, "arm", "seed-0"), "--workdir", alone=True):
        assert below not in objects(address), "by who is alone there"


def test_metrics_are_never_older_than_a_checkpoint(place, tmp_path):
    """A writer adds a line, then a checkpoint, without end; every state in the bucket has both."""
    address, _ = place
    ours = copy.Copy(bucket.Bucket(address), tmp_path / "x", written=True)
    stop = threading.Event()

    def work():
        for step in itertools.count(1):
            with (ours.folder / "metrics.jsonl").open("a") as file:
                file.write(f"{step}\n")
            write(ours.folder, **{f"checkpoints__{step}___CHECKPOINT_METADATA": ""})
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=work)
    thread.start()
    newest = []
    try:
        for _ in range(6):
            stop.wait(0.1)
            ours.push()
            found = objects(address)
            newest.append(max(int(n.split("/")[1]) for n in found if n.startswith("checkpoints")))
            assert newest[-1] <= len(found["metrics.jsonl"].splitlines())
    finally:
        stop.set()
        thread.join()
    assert newest == sorted(set(newest)), "the writer was at work meanwhile"


def checkpoint_of_many_files(folder):
    write(folder, **{f"checkpoints__3__state__{i:02}": "x" for i in range(30)})
    write(folder, checkpoints__3___CHECKPOINT_METADATA="{}")
    return folder / "checkpoints/3"


def test_a_checkpoint_that_goes_while_it_is_brought_is_there_whole(place, tmp_path):
    """Else, where a line is slower than a run saves, none would ever be there."""
    address, faults = place
    ours = copy.Copy(bucket.Bucket(address), tmp_path / "x", written=True)
    checkpoint = checkpoint_of_many_files(ours.folder)
    faults.only = lambda method, path: shutil.rmtree(checkpoint, ignore_errors=True)
    ours.push()
    assert not checkpoint.exists()
    assert len(objects(address)) == 31
    faults.only = lambda method, path: True
    ours.push()
    assert not objects(address), "it went here"
    assert not ours._holding.exists()


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_that_is_going_when_it_is_to_be_brought_gets_no_mark(
    links, place, tmp_path, monkeypatch
):
    address, _ = place
    ours = copy.Copy(bucket.Bucket(address), tmp_path / "x", written=True)
    checkpoint_of_many_files(ours.folder)
    link, seen = os.link, []

    def going(source, target):
        if source.parent.name == "state":
            seen.append(source)
        if len(seen) == 5:
            seen[-1].unlink(missing_ok=True)
        if not links:
            raise OSError(errno.EPERM, "this disk has no links")
        link(source, target)

    monkeypatch.setattr(os, "link", going)
    ours.push()
    assert not objects(address)
    ours.push()  # of what there is now
    assert len(objects(address)) == 30


# Who may.


def test_two_machines_exclude_each_other(place, tmp_path, monkeypatch):
    address, _ = place
    with mirror.written(address, "--workdir", alone=True) as first:
        with (
            pytest.raises(lease.Taken, match="another process of this machine works there"),
            mirror.written(address, "--workdir", alone=True),
        ):
            pass
        on_another_machine(monkeypatch, tmp_path, "second")
        with (
            pytest.raises(lease.Taken, match=r"process \d+ on .* works there; wait for it"),
            mirror.written(address, "--workdir", alone=True),
        ):
            pass
        write(first, a="first")
    with mirror.written(address, "--workdir", alone=True) as second:  # at once
        assert tree(second) == {"a": b"first"}


def test_who_is_to_wait_has_its_turn(place, tmp_path, monkeypatch, caplog):
    address, _ = place
    order = []

    def second():
        with mirror.written(address, "--workdir", alone=True, wait=True) as folder:
            order.append("second begins")
            assert tree(folder) == {"a": b"first"}

    with mirror.written(address, "--workdir", alone=True) as folder:
        on_another_machine(monkeypatch, tmp_path, "second")
        thread = threading.Thread(target=second)
        thread.start()
        wait(lambda: "works there; waiting for it" in caplog.text)
        write(folder, a="first")
        time.sleep(1.5 * lease.SECONDS)  # longer than it would wait for a sign of life
        order.append("first ends")
    thread.join(30)
    assert order == ["first ends", "second begins"]
    mirror.wait(address)  # nobody is there


def test_folders_below_one_have_leases_of_their_own(place, tmp_path, monkeypatch):
    """A checkpoint that another machine is bringing there is not taken for torn."""
    address, _ = place
    below = mirror.below(address, "joint", "seed-1")
    assert below == f"{address}/joint/seed-1"
    there = bucket.Bucket(address)
    with mirror.written(below, "--workdir", alone=True) as run:
        write(run, config="{}")
        there.write("joint/seed-1/checkpoints/3/state/a", b"its mark is still to come")
        there.write("checkpoints/3/state/a", b"torn")
        with mirror.written(address, "--workdir", alone=True) as whole:
            write(whole, summary="s")
            assert "joint/seed-1/.lease" not in tree(whole)
    assert {n for n in objects(address) if "/.lease/" not in n} == {
        "joint/seed-1/checkpoints/3/state/a", "joint/seed-1/config", "summary",
    }  # fmt: skip
    read = mirror.local(address, "--workdir")
    assert not [n for n in tree(read) if ".lease" in n]


def test_some_files_of_a_folder_and_one_written_at_once(place, tmp_path):
    address, _ = place
    names = re.compile(r"(.*/)?config\.json")
    assert tree(mirror.some(address, "--workdir", names)) == {}
    mirror.write_text(f"{address}/config.json", "one")
    bucket.Bucket(address).write("weights", b"large")
    assert tree(mirror.some(address, "--workdir", names)) == {"config.json": b"one"}
    mirror.write_text(f"{address}/config.json", "two")
    assert tree(mirror.some(address, "--workdir", names)) == {"config.json": b"two"}
    assert mirror.some(tmp_path, "--workdir", names) == tmp_path
    mirror.write_text(tmp_path / "config.json", "on a disk")
    assert (tmp_path / "config.json").read_text() == "on a disk"
    assert mirror.below(tmp_path, "a", "b") == tmp_path / "a" / "b"
    assert mirror.below("~/runs", "a") == pathlib.Path.home() / "runs" / "a"


def test_who_dies_is_succeeded_and_who_was_succeeded_stops(place, tmp_path, monkeypatch):
    address, _ = place
    monkeypatch.setattr(mirror, "EVERY", 1000)
    stopped = []
    monkeypatch.setattr(mirror.os, "kill", lambda *about: stopped.append(about))
    # It hangs: neither alive nor dead.
    renew, hangs = lease.Lease._renew, threading.Event()
    monkeypatch.setattr(lease.Lease, "_renew", lambda self: (hangs.wait(), renew(self)))

    def work():
        with mirror.written(address, "--workdir", alone=True) as first:
            write(first, a="first, never brought")
            with monkeypatch.context() as patch:
                patch.setenv("DILAFF_JAX_CACHE", str(tmp_path / "second"))
                patch.setattr(lease.Lease, "_renew", renew)
                with mirror.written(address, "--workdir", alone=True) as second:
                    write(second, a="second")
            hangs.set()
            wait(lambda: stopped)

    with pytest.raises(lease.Taken, match=r"has taken it over.*All of it is in"):
        work()
    assert objects(address) == {"a": b"second"}
    # Here it begins from what is there, and what was never brought is kept aside.
    with mirror.written(address, "--workdir", alone=True) as first:
        assert tree(first) == {"a": b"second"}
        aside = [p for p in first.parent.iterdir() if p.name.startswith("work-")]
        assert [tree(p) for p in aside] == [{"a": b"first, never brought"}]


def test_the_same_machine_goes_on_at_once_with_what_was_never_brought(place, tmp_path, monkeypatch):
    address, _ = place
    monkeypatch.setattr(mirror, "EVERY", 1000)
    with mirror.written(address, "--workdir", alone=True) as folder:
        write(folder, a="old", b="old")
    session = mirror._Session(
        bucket.Bucket(address), folder, alone=True, each=False
    )  # that of a process which is killed
    session.__enter__()
    write(folder, a="new, longer", c="new")
    (folder / "b").unlink()
    session._lease.stop()
    session._ended.set()
    with mirror.written(address, "--workdir", alone=True) as folder:
        assert tree(folder) == {"a": b"new, longer", "c": b"new"}
    assert objects(address) == {"a": b"new, longer", "c": b"new"}


def test_a_bucket_that_is_away_at_the_end_costs_nothing(place, monkeypatch):
    address, faults = place
    monkeypatch.setattr(bucket, "PATIENCE", 0.5)
    monkeypatch.setattr(mirror, "EVERY", 0.1)

    def work():
        with mirror.written(address, "--workdir", alone=True) as folder:
            faults.status = 503
            write(folder, a="kept")

    with pytest.raises(OSError, match=r"All of it is in .*the same command on this machine brings"):
        work()
    faults.status = 0
    assert not objects(address)
    with mirror.written(address, "--workdir", alone=True) as folder:
        assert tree(folder) == {"a": b"kept"}
    assert objects(address) == {"a": b"kept"}


def test_who_cannot_begin_gives_the_lease_back(place, tmp_path, monkeypatch):
    address, _ = place
    bucket.Bucket(address).write("a", b"some bytes")
    with monkeypatch.context() as patch:
        full = types.SimpleNamespace(free=3, total=3, used=0)
        patch.setattr(copy.shutil, "disk_usage", lambda _: full)
        with (
            pytest.raises(errors.UserError, match="set DILAFF_JAX_CACHE"),
            mirror.written(address, "--workdir", alone=True),
        ):
            pass
    on_another_machine(monkeypatch, tmp_path, "second")
    monkeypatch.setattr(lease, "SECONDS", 1e6)  # nobody waits
    with mirror.written(address, "--workdir", alone=True) as folder:
        assert tree(folder) == {"a": b"some bytes"}


def test_what_ended_the_work_is_not_hidden_by_a_bucket_that_is_away(place, monkeypatch):
    address, faults = place
    monkeypatch.setattr(bucket, "PATIENCE", 0.5)

    def work():
        with mirror.written(address, "--workdir", alone=True):
            faults.status = 503
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


@pytest.mark.parametrize("seed", range(6))
def test_after_any_changes_and_interruptions_both_are_alike(seed, place, tmp_path):
    """Files that come, change and go, on two machines in turn; processes that are killed."""
    address, _ = place
    rng, expected = random.Random(seed), {}
    names = ["a", "b/c", "b/d", "checkpoints/3/_CHECKPOINT_METADATA", "checkpoints/3/d"]
    machine = 0

    def opened():
        folder = tmp_path / f"machine-{machine}" / "work"
        return copy.Copy(bucket.Bucket(address), folder, written=True)

    for _ in range(12):
        ours = opened()
        ours.pull()
        for _ in range(rng.randrange(4)):
            name = rng.choice(names)
            if rng.random() < 0.6:
                content = rng.randbytes(rng.randrange(200))
                path = ours.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                expected[name] = content
            else:
                (ours.folder / name).unlink(missing_ok=True)
                expected.pop(name, None)
        if rng.random() < 0.3:  # killed before anything was brought: the same machine goes on
            continue
        if rng.random() < 0.3:  # killed when all was brought, before it was noted
            ours._note = lambda *_: None
            ours.push()
            continue
        ours.push()
        machine = rng.randrange(2)
    ours = opened()
    ours.pull()
    ours.push()
    if "checkpoints/3/_CHECKPOINT_METADATA" not in expected:
        expected.pop("checkpoints/3/d", None)
    assert {
        n: c for n, c in objects(address).items() if "checkpoints/3/d" not in n or n in expected
    } == expected
    elsewhere = copy.Copy(bucket.Bucket(address), tmp_path / "fresh", written=True)
    elsewhere.pull()
    assert tree(elsewhere.folder) == expected


def test_a_fetch_that_was_killed_is_not_taken_for_changes(place, tmp_path):
    address, _ = place
    there = bucket.Bucket(address)
    there.write("a", b"1")
    there.write("b", b"2")
    ours = copy.Copy(there, tmp_path / "work", written=True)
    ours._save(fetching=["a", "b"])
    (ours.folder / "a").write_bytes(b"1")  # and then it was killed
    again = copy.Copy(there, tmp_path / "work", written=True)
    assert not again.changed()
    again.pull()
    assert tree(again.folder) == {"a": b"1", "b": b"2"}
    assert json.loads(again._record.read_text())["fetching"] == []
