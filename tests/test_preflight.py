import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

from dilaff_jax.errors import UserError
from dilaff_jax.preflight import apart, footprint, hlo, run
from dilaff_jax.preflight.apart import Source
from dilaff_jax.preflight.footprint import Footprint
from dilaff_jax.preflight.programs import Programs
from dilaff_jax.runtime import chips
from dilaff_jax.runtime.parallel import Devices
from tests import tiny_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install -e '.[preflight]'",
)

# 1 MiB arrays: f32[512,512]. %b is in VMEM, S(1); the loop runs 5 times.
TEXT = """HloModule m, is_scheduled=true

%fused (p0: f32[512,512], p1: f32[512,512]) -> f32[512] {
  %p0 = f32[512,512]{1,0:T(8,128)} parameter(0)
  %p1 = f32[512,512]{1,0:T(8,128)S(1)} parameter(1)
  %s = f32[64,512]{1,0:T(8,128)} slice(%p0), slice={[0:64], [0:512]}
  ROOT %r = f32[512]{0:T(512)} reduce(%s, %p1), dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[512,512])) -> (s32[], f32[512,512]) {
  %t = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}) parameter(0)
  %x = f32[512,512]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %y = f32[512,512]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %out = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}) tuple(%i, %y)
}

ENTRY %main (a: f32[512,512]) -> f32[512] {
  %a = f32[512,512]{1,0:T(8,128)} parameter(0)
  %start = (f32[512,512]{1,0:T(8,128)S(1)}, f32[512,512]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %b = f32[512,512]{1,0:T(8,128)S(1)} copy-done(%start)
  %w = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %f = f32[512]{0:T(512)} fusion(%a, %b), kind=kLoop, calls=%fused
}
"""
MIB = 2**20


def test_traffic_counts_main_memory_slices_and_loops():
    # The copy reads 1 MiB; the loop reads and writes 1 MiB five times; the fusion reads 1/8 MiB of
    # what it slices, nothing of what is in VMEM, and writes 2 KiB.
    expected = MIB + 5 * 2 * MIB + MIB // 8 + 2048
    assert hlo.Program(TEXT).traffic() == expected


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    program = hlo.Program(TEXT)
    assert program.collectives() == [hlo.Collective("all-reduce", 5, 5 * MIB)]
    assert program.loops() == [5]


def test_a_loop_without_annotation_runs_as_often_as_its_condition_says():
    condition = """
%cond (c: (s32[], f32[512,512])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  %c = (s32[]{:T(128)}, f32[512,512]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY"""
    note = ', backend_config={"known_trip_count":{"n":"5"}}'
    program = hlo.Program(TEXT.replace(note, "").replace("\nENTRY", condition))
    assert program.loops() == [5]
    assert program.traffic() == hlo.Program(TEXT).traffic()


def test_arrays_count_with_the_padding_of_their_tiles():
    text = TEXT.replace("ROOT %f = f32[512]{0:T(512)}", "ROOT %f = bf16[9,65]{1,0:T(8,128)(2,1)}")
    padded = 16 * 128 * 2
    assert hlo.Program(text).traffic() - hlo.Program(TEXT).traffic() == padded - 2048


def test_traffic_of_a_program_that_runs_here_is_its_arrays():
    x = jax.ShapeDtypeStruct((256, 256), np.float32)
    compiled = jax.jit(lambda x: x * 2 + 1).lower(x).compile()
    assert hlo.Program(compiled.as_text()).traffic() == 2 * 4 * 256 * 256


@pytest.mark.parametrize(
    ("limit", "start", "unit", "fits", "fails"),
    [
        (100.0, 2, 1, 19, 20),  # 5 + 5n <= 100, from below
        (100.0, 64, 1, 19, 20),  # from above
        (100.0, 4, 4, 16, 20),
        (9.0, 4, 1, None, 1),  # not even one image
        (5e4, 8, 1, 9999, 10_000),
    ],
)
def test_the_search_finds_the_largest_batch_in_few_compilations(limit, start, unit, fits, fails):
    tried = []

    def need(rows):
        tried.append(rows)
        return Footprint(rows, 5.0 + 5 * rows, limit)

    found = run.largest(need, need(start), unit)
    assert len(tried) == len(set(tried)) <= 8
    low, high = (f and f.rows for f in found)
    if fits is None:
        assert low is None
        assert high == fails
    else:
        assert fits * 15 / 16 <= low <= fits
        assert fails <= high <= fails * 17 / 16
        assert low % unit == high % unit == 0


def test_the_search_compiles_few_that_fit():
    # A compiler refuses within seconds, and takes minutes for what hardly fits.
    tried = []

    def need(rows):
        tried.append(rows)
        return Footprint(rows, 2.0 + 0.43 * rows, 15.75)

    fits, fails = run.largest(need, need(2))
    assert (fits.rows, fails.rows) == (31, 32)
    assert sum(rows <= 31 for rows in tried[1:]) == 1


def test_the_search_survives_memory_that_is_no_line():
    # A compiler spends on speed what memory is left over, and saves near the limit.
    def need(rows):
        return Footprint(rows, min(40 + 9 * rows, 80 + 2 * rows + rows % 3), 150.0)

    fits, fails = run.largest(need, need(1))
    assert fits.rows <= 34 < fails.rows <= fits.rows + 2


def test_the_floor_is_the_slowest_of_three_resources():
    chip = chips.Chip("any", 1e9, flops=1e12, bandwidth=1e11, interconnect=1e10)
    program = Footprint(
        2,
        1.0,
        None,
        flops=1e9,
        traffic=5e8,
        collectives=(hlo.Collective("all-reduce", 3, 10**7),),
    )
    floors = program.floors(chip, devices=4)
    assert floors == pytest.approx(
        {"arithmetic": 1e-3, "memory traffic": 5e-3, "interconnect": 2 * 0.75e-3}
    )
    record = program.record(chip, devices=4)
    assert record["bound_by"] == "memory traffic"
    assert record["images_per_second_per_device_at_best"] == pytest.approx(400)


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:2x2x2", "v4:2x2", "v9:2x2", "v5litepod-4", "v6e-8", ""]
)
def test_a_wrong_topology_says_what_is_expected(name):
    with pytest.raises(ValueError, match="v5e:4x4"):
        chips.devices(name)


def test_a_missing_compiler_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        chips.devices("v5e:2x2")


def test_this_machines_devices_share_its_memory():
    found = chips.devices("auto")
    assert found == jax.local_devices()
    assert run.memory_limit(chips.of(found[0]), found) * len(found) == chips.of(found[0]).memory


def test_an_unprepared_data_set_of_unknown_classes_is_refused(tmp_path):
    config = tiny_config.get_config()
    config.data.update({"dataset": "image_folder/none", "data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="not prepared"):
        run.run(config, tmp_path, "auto")
    config.data.dataset = "camvid"
    assert run.classes_and_size(config, 0) == (11, (32, 32))


def test_propagation_is_measured_on_this_machine(tmp_path):
    config = tiny_config.get_config()
    devices = Devices("shard_map", compile_for=jax.local_devices())
    programs = Programs(config, 5, (32, 32), devices)
    found = footprint.measure(programs.propagation, 2, None)
    logits, edges, labels = 2 * 4 * 4 * 5 * 4, 2 * 8 * 8 * 16 * 4, 2 * 32 * 32 * 4
    assert found.arguments == logits + edges
    assert found.traffic >= logits + edges + labels
    assert not found.collectives


# Programs in processes of their own. What stands for a compiler is given to them by its name.


@dataclasses.dataclass(frozen=True)
class Ended(Source):
    """A compiler that a signal ends."""

    by: int = signal.SIGKILL

    def programs(self) -> Programs:
        os.kill(os.getpid(), self.by)
        raise AssertionError("still there")


@dataclasses.dataclass(frozen=True)
class Refused(Source):
    """A compiler that says why not, or that is broken."""

    error: type[Exception] = UserError

    def programs(self) -> Programs:
        raise self.error("no such thing")


@dataclasses.dataclass(frozen=True)
class Endless(Source):
    """A compiler that takes for ever; its process leaves its number in a file."""

    path: str = ""

    def programs(self) -> Programs:
        pathlib.Path(self.path).write_text(str(os.getpid()))
        time.sleep(600)
        raise AssertionError("still there")


def _source(kind: type[Source] = Source, **options) -> Source:
    return kind(tiny_config.get_config(), 5, (32, 32), "auto", **options)


def test_a_program_needs_the_same_in_a_process_of_its_own():
    source = _source()
    here = source.programs().measure("propagation", 2, 1e9)
    there = apart.measure(source, "propagation", 2, 1e9)
    assert dataclasses.replace(there, compile_seconds=here.compile_seconds) == here


@pytest.mark.parametrize(
    ("by", "why"), [(signal.SIGKILL, "SIGKILL.*more memory"), (signal.SIGSEGV, "SIGSEGV.*another")]
)
def test_a_compiler_that_is_ended_is_named_and_ends_nothing_else(by, why):
    with pytest.raises(UserError, match=f"the compiler of the propagation was ended by {why}"):
        apart.measure(_source(Ended, by=by), "propagation", 2, None)


def test_what_a_compiler_says_comes_through(capfd):
    with pytest.raises(UserError, match=r"^no such thing$"):
        apart.measure(_source(Refused), "propagation", 2, None)
    with pytest.raises(UserError, match=r"the propagation was not compiled.*status 1"):
        apart.measure(_source(Refused, error=RuntimeError), "propagation", 2, None)
    assert "RuntimeError: no such thing" in capfd.readouterr().err


def test_a_compiler_does_not_outlive_who_asked_for_it(tmp_path):
    """Killed without a word, as by a scheduler: no process goes on for half an hour."""
    path = tmp_path / "process"
    code = (
        "from tests import test_preflight as t\n"
        "if __name__ == '__main__':\n"
        f"    t.apart.measure(t._source(t.Endless, path={str(path)!r}), 'propagation', 2, None)\n"
    )
    asked = subprocess.Popen([sys.executable, "-c", code])
    try:
        _until(lambda: path.exists() and path.read_text(), 120)
        child = pathlib.Path(f"/proc/{path.read_text()}")
        assert child.exists()
    finally:
        asked.kill()
        asked.wait()
    _until(lambda: not child.exists() or "State:\tZ" in (child / "status").read_text(), 20)


def _until(true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def test_figures_are_written_as_they_come_and_a_search_may_be_stopped(
    tmp_path, monkeypatch, capsys, caplog
):
    config = tiny_config.get_config()
    config.data.data_dir = str(tmp_path / "none")
    asked = []

    def measured(self: Programs, name: str, rows: int, limit: float) -> Footprint:
        asked.append(name)
        if name == last:
            raise stop
        return Footprint(rows, 1e6, limit, flops=1.0)

    monkeypatch.setattr(Programs, "measure", measured)
    last, stop = "propagation", UserError("too much for this machine")
    with pytest.raises(UserError, match="too much"):
        run.run(config, tmp_path, "auto")
    found = json.loads((tmp_path / "preflight.json").read_text())["programs"]
    assert list(found) == asked[:-1] == ["training step", "eval step"]
    asked.clear()
    monkeypatch.setattr(run, "largest", _interrupted)
    last = ""
    monkeypatch.setattr(run.chips, "compiler_fault", lambda device: "a compiler that fails")
    with caplog.at_level("WARNING", logger="absl"):
        report = run.run(config, tmp_path, "auto")
    assert caplog.messages == ["a compiler that fails"]
    assert list(report["programs"]) == ["training step", "eval step", "propagation"]
    assert report == json.loads((tmp_path / "preflight.json").read_text())
    assert "without the largest batch" in capsys.readouterr().out


def _interrupted(*_):
    raise KeyboardInterrupt


@needs_libtpu
def test_an_impossible_slice_of_a_known_kind_is_refused():
    with pytest.raises(ValueError, match="no such slice"):
        chips.devices("v5e:3x5")


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count", "chip", "gib"),
    [
        ("v5e:4x4", 16, "TPU v5e", 15.75),
        ("v5e:1x1", 1, "TPU v5e", 15.75),
        ("v4:2x2x1", 4, "TPU v4", 30.75),
        ("v5p:2x2x2", 8, "TPU v5p", 95.7),
        ("v6e:2x2", 4, "TPU v6e", 31.25),
    ],
)
def test_the_compiler_says_how_much_memory_a_chip_has(name, count, chip, gib):
    found = chips.devices(name)
    assert len(found) == count
    assert chips.of(found[0]).name == chip
    assert footprint.available(found[0]) / chips.GIB == pytest.approx(gib, rel=0.02)


@needs_libtpu
def test_a_run_is_compiled_for_a_slice_that_is_not_there(tmp_path, capsys):
    config = tiny_config.get_config()
    config.data.data_dir = str(tmp_path / "none")
    report = run.run(config, tmp_path, "v5e:2x2", search=False)
    assert report == json.loads((tmp_path / "preflight.json").read_text())
    assert report["devices"] == 4
    step, evaluation, refinement = report["programs"].values()
    assert (step["rows"], evaluation["rows"]) == (1, 1)
    for program in (step, evaluation, refinement):
        assert program["fits"]
        assert program["temporaries"] < program["memory"] < program["limit"]
        assert min(program["flops"], program["traffic"]) > 0
        assert program["images_per_second_per_device_at_best"] > 0
    # Gradients are summed over the devices, the counts of an evaluation too; propagation is local.
    assert step["collectives"][0]["kind"] == "all-reduce"
    assert sum(c["bytes"] for c in step["collectives"]) >= 4 * _parameters(config)
    assert evaluation["collectives"]
    assert not refinement["collectives"]
    printed = capsys.readouterr().out
    assert "4 x TPU v5e" in printed
    assert "training step" in printed


def _parameters(config: ml_collections.ConfigDict) -> int:
    devices = Devices("shard_map")
    state = Programs(config, 5, (32, 32), devices)._state
    return sum(x.size for x in jax.tree.leaves(state.params))


def test_a_state_in_pieces_takes_less_of_each_device(tmp_path):
    """Of four devices each holds a quarter of what is cut, and gathers what it computes with."""
    config = tiny_config.get_config()
    config.model.decoder = "upernet"
    config.model.decoder_options = {"width": 32, "bins": (1,)}
    config.optim.name = "adamw"
    found = {}
    for mode in ("shard_map", "fsdp"):
        devices = Devices(mode, compile_for=jax.local_devices()[:4])
        programs = Programs(config, 5, (32, 32), devices)
        found[mode] = footprint.measure(programs.train_step, 1, None)
    state = programs._state
    cut = sum(
        4 * x.size
        for tree in (state.params, state.opt_state, state.average["params"])
        for x in jax.tree.leaves(tree)
        if x.size >= 4096 and any(n % 4 == 0 for n in x.shape)
    )
    assert cut > 500_000
    assert found["shard_map"].arguments - found["fsdp"].arguments == pytest.approx(3 * cut / 4)
    assert "all-gather" in {c.kind for c in found["fsdp"].collectives}
    assert "all-gather" not in {c.kind for c in found["shard_map"].collectives}


FUSED = """
HloModule program

%step.1 (p: f32[8,4]) -> f32[8,16] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %g.1 = f32[8,16]{1,0} all-gather(%p), channel_id=7, dimensions={1}
}

%step.2 (q: f32[8,4]) -> f32[8,16] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %g.2 = f32[8,16]{1,0} all-gather(%q), channel_id=7, dimensions={1}
}

ENTRY %main (a: f32[8,4]) -> f32[8,16] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[8,16]{1,0} fusion(%a), kind=kCustom, calls=%step.1
  %c = f32[8,16]{1,0} fusion(%a), kind=kCustom, calls=%step.2
  %d = f32[8,16]{1,0} all-gather(%a), channel_id=9, dimensions={1}
  ROOT %e = f32[8,16]{1,0} add(%c, %d)
}
"""


def test_a_collective_in_steps_beside_arithmetic_counts_once():
    assert hlo.Program(FUSED).collectives() == [hlo.Collective("all-gather", 2, 2 * 8 * 16 * 4)]


@needs_libtpu
def test_pieces_are_gathered_and_nothing_of_a_cpu_is_in_the_program_for_a_tpu(tmp_path):
    """Layers are chosen by the devices that the program is for, not by this machine's."""
    config = tiny_config.get_config()
    config.parallel.update({"mode": "fsdp", "min_size": 64})
    config.data.data_dir = str(tmp_path / "none")
    jax.config.update("jax_platforms", "cpu")
    devices = Devices("fsdp", compile_for=chips.devices("v5e:2x2"), min_size=64)
    program = Programs(config, 5, (32, 32), devices).train_step(1)
    assert "materialize" not in program.as_text()
    found = {c.kind: c for c in hlo.Program(program.compile().as_text()).collectives()}
    assert found["all-gather"].bytes > _parameters(config)
