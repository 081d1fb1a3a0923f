"""Cards of runs, and runs on a hub: against a stand-in on this machine."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import dilaff_jax
from dilaff_jax import evaluate
from dilaff_jax.interop import hub
from dilaff_jax.report import model_card
from dilaff_jax.runtime import checkpoint
from tests import hub_server, tiny_run

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
ADDRESS = "hf://somebody/tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with an evaluation, and the rest that a training leaves."""
    workdir = tiny_run.write(
        tmp_path_factory.mktemp("runs") / "tiny",
        encoder="unet",
        encoder_options={"widths": (4, 6, 8, 8)},
    )
    scalars = {"plain/miou": 0.5, "refined/miou": 0.625, "plain/boundary_f": float("nan")}
    evaluate._write_results(
        evaluate.result_folder(workdir, 3), evaluate.Results(3, scalars, "a table", {}, {})
    )
    start = {
        "step": 0,
        "time": "2026-01-02T03:04:05+00:00",
        "processor": "a processor",
        "devices": ["cpu"],
        "versions": {"jax": "0.10.2"},
    }
    (workdir / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (workdir / "metrics.jsonl").write_text("")
    (workdir / "compilation_cache").mkdir()
    (workdir / "compilation_cache" / "large").write_text("no business of others")
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The stand-in, and a function that runs a command with it."""
    pytest.importorskip("huggingface_hub")
    with hub_server.serving() as (repositories, url):
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environment.pop("HF_TOKEN", None)

        def command(*arguments, token="hf_secret"):
            return subprocess.run(
                [sys.executable, *map(str, arguments)],
                env=environment | ({"HF_TOKEN": token} if token else {}),
                cwd=pathlib.Path(__file__).parents[1],
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )

        yield repositories, command


def front(card):
    """The head of a card, as a reader of YAML sees it."""
    yaml = pytest.importorskip("yaml")
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_a_card_says_what_the_run_is_how_good_and_how_it_is_used(run):
    assert model_card.main([str(run), "--license", "cc-by-4.0"]) == 0
    card = (run / "README.md").read_text()
    head = front(card)
    assert head["license"] == "cc-by-4.0"
    (entry,) = head["model-index"][0]["results"]
    assert [(m["name"], m["value"]) for m in entry["metrics"]] == [
        ("mean IoU (plain)", 50.0),
        ("mean IoU (refined)", 62.5),
    ]  # what is undefined is left out
    for said in (
        "ground, tree, car",
        "a table",
        "a processor",
        "2026-01-02",
        "cc-by-4.0",
        "step 3",
    ):
        assert said in card, said
    code = card.split("```python\n")[1].split("```")[0].replace('"run"', repr(str(run)))
    code = code.replace('"photo.jpg"', "IMAGE")
    exec(code, {"IMAGE": IMAGE})


def test_a_card_that_the_hub_reads_is_valid(run):
    hub_library = pytest.importorskip("huggingface_hub")
    model_card.main([str(run), "--license", "mit"])
    card = hub_library.ModelCard.load(run / "README.md")
    assert card.data.license == "mit"
    assert [r.metric_value for r in card.data.eval_results] == [50.0, 62.5]


def test_weights_that_a_run_began_with_are_named_with_their_licence(run):
    config = json.loads((run / "config.json").read_text())
    config["init"]["encoder"] = "resnet50.pth"
    (run / "config.json").write_text(json.dumps(config))
    model_card.main([str(run)])
    card = (run / "README.md").read_text()
    assert front(card)["license"] == "unknown"
    assert "Not stated by whoever trained it." in card
    assert "began as `resnet50.pth`, whose own licence goes on to hold" in card


def test_a_card_is_written_anew_but_not_over_somebodys_words(run, capsys):
    model_card.main([str(run)])
    model_card.main([str(run), "--license", "mit"])
    path = run / "README.md"
    path.write_text(path.read_text().replace("## Use", "It likes cats.\n\n## Use"))
    with pytest.raises(SystemExit, match=r"README.md was changed by hand and stays; rename it"):
        model_card.main([str(run)])
    assert "It likes cats." in path.read_text()


def test_a_run_goes_to_the_hub_and_comes_back_the_same(run, served, tmp_path):
    repositories, command = served
    done = command("-m", "dilaff_jax.report.model_card", run, "--license=mit", "--push", ADDRESS)
    assert done.returncode == 0, done.stderr
    stored = repositories.repositories["somebody/tiny"]["main"]
    names = set(stored)
    assert {"README.md", "config.json", "classes.json", "evaluation/3/results.json"} <= names
    assert any(name.startswith("checkpoints/3/state/") for name in names)
    assert not any("compilation_cache" in name or "metrics.jsonl" in name for name in names)
    assert f'dilaff_jax.load("{ADDRESS}")' in stored["README.md"].decode()

    got = tmp_path / "got"
    fetched = command("-m", "dilaff_jax.interop.hub", ADDRESS, got, token="")
    assert fetched.returncode == 0, fetched.stderr
    expected = dilaff_jax.load(run)(IMAGE)
    np.testing.assert_array_equal(dilaff_jax.load(got)(IMAGE).probs, expected.probs)

    # As a path where a model is wanted: in Python and in the command. Files that no run has are
    # left where they are.
    stored["evil.pkl"] = b"\x80\x04."
    np.save(tmp_path / "image.npy", IMAGE)
    code = (
        "import sys, numpy as np, dilaff_jax\n"
        "m = dilaff_jax.load(sys.argv[1]); np.save(sys.argv[3], m(np.load(sys.argv[2])).probs)"
    )
    loaded = command("-c", code, ADDRESS, tmp_path / "image.npy", tmp_path / "p.npy", token="")
    assert loaded.returncode == 0, loaded.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), expected.probs)
    assert not list(tmp_path.rglob("evil.pkl"))
    (tmp_path / "images").mkdir()
    dilaff_jax.visualize._write_png(tmp_path / "images", "photo", IMAGE)
    predicted = command(
        *("-m", "dilaff_jax.main", "predict", f"--model={ADDRESS}"),
        *(f"--input={tmp_path / 'images'}", f"--output={tmp_path / 'out'}"),
    )
    assert predicted.returncode == 0, predicted.stderr
    assert list((tmp_path / "out").rglob("photo.png"))

    # What is there stays.
    again = command("-m", "dilaff_jax.interop.hub", ADDRESS, got)
    assert again.returncode == 1
    assert "holds a run already; give another folder" in again.stderr


def test_a_revision_is_what_it_was(run, served, tmp_path):
    repositories, command = served
    command("-m", "dilaff_jax.report.model_card", run, "--push", ADDRESS)
    files = repositories.repositories["somebody/tiny"]
    files["v1"] = dict(files["main"])
    files["main"].pop("config.json")
    old = command("-m", "dilaff_jax.interop.hub", f"{ADDRESS}@v1", tmp_path / "old")
    assert old.returncode == 0, old.stderr
    new = command("-m", "dilaff_jax.interop.hub", ADDRESS, tmp_path / "new")
    assert "holds no run of this project: it has no config.json" in new.stderr


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", ("model", "encoder"), "subprocess:run"),
        ("config.json", ("model", "decoder"), "os:abort"),
        ("config.json", ("refine", "name"), "builtins:exec"),
        ("refine.json", ("refine", "name"), "builtins:exec"),
    ],
)
def test_a_stranger_does_not_choose_what_code_is_called(file, change, named, run, served, tmp_path):
    _, command = served
    (run / "refine.json").write_text('{"refine": {"name": "identity"}}')
    content = json.loads((run / file).read_text())
    content[change[0]][change[1]] = named
    command("-m", "dilaff_jax.report.model_card", run, "--push", ADDRESS)
    (run / file).write_text(json.dumps(content))
    push = "from dilaff_jax.interop import hub; import sys, pathlib; hub.upload(pathlib.Path(sys.argv[1]), sys.argv[2], 3)"
    assert command("-c", push, run, ADDRESS).returncode == 0
    code = "import dilaff_jax, sys; dilaff_jax.load(sys.argv[1])"
    ran = command("-c", code, ADDRESS)
    assert ran.returncode == 1
    assert f"asks for code that is not this package's: {named}. If you trust" in ran.stderr
    # Who looks at it first may have it.
    got = command("-m", "dilaff_jax.interop.hub", ADDRESS, tmp_path / "got")
    assert got.returncode == 0, got.stderr


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("hf://nobody/nothing", "Is the name right?"),
        ("hf://somebody", "give hf://OWNER/NAME"),
        ("hf://somebody/tiny/deep/er", "give hf://OWNER/NAME"),
        ("hf://somebody/tiny@v9", "Is the name right?"),
    ],
)
def test_what_is_not_there_is_said_without_a_traceback(url, says, served, tmp_path):
    repositories, command = served
    repositories.repositories["somebody/tiny"] = {"main": {"config.json": b"{}"}}
    ran = command("-m", "dilaff_jax.interop.hub", url, tmp_path / "got")
    assert ran.returncode == 1
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "got" / "config.json").exists()


def test_who_may_not_write_is_told_how_to_log_in(run, served):
    repositories, command = served
    ran = command("-m", "dilaff_jax.report.model_card", run, "--push", ADDRESS, token="hf_wrong")
    assert ran.returncode == 1
    assert "hf auth login, or HF_TOKEN" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not repositories.repositories


def test_a_private_run_is_shown_to_its_owner_alone(run, served, tmp_path):
    _, command = served
    command("-m", "dilaff_jax.report.model_card", run, "--push", ADDRESS, "--private")
    other = command("-m", "dilaff_jax.interop.hub", ADDRESS, tmp_path / "other", token="")
    assert "Is the name right? For a private one" in other.stderr
    own = command("-m", "dilaff_jax.interop.hub", ADDRESS, tmp_path / "own")
    assert own.returncode == 0, own.stderr


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", "dilaff_jax.interop.hub", ADDRESS, str(tmp_path / "got")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "the hub cannot be reached, or failed" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_without_the_library_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(dilaff_jax.UserError, match=r"pip install 'dilaff-jax\[hub\]'"):
        hub.download(ADDRESS)


WEIGHTS = {
    "safetensors": ("model.safetensors", {"model.safetensors", "config.json", "pytorch_model.bin"}),
    "index": (
        "model.safetensors.index.json",
        {"model.safetensors.index.json", "model-00001-of-00001.safetensors", "tf_model.h5"},
    ),
    "bin": ("pytorch_model.bin", {"pytorch_model.bin", "tf_model.h5", "README.md"}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weights_of_a_network_are_fetched_and_nothing_else(kind, served):
    wanted, there = WEIGHTS[kind]
    repositories, command = served
    repositories.repositories["lab/net"] = {"main": {name: name.encode() for name in there}}
    program = "from dilaff_jax import initialise; print(initialise.weight_file('hf://lab/net'))"
    ran = command("-c", program)
    assert ran.returncode == 0, ran.stderr
    path = pathlib.Path(ran.stdout.strip().splitlines()[-1])
    assert path.name == wanted
    assert path.read_bytes() == wanted.encode()
    fetched = {
        p.rpartition("/")[2] for method, p in repositories.log if method == "GET" and "resolve" in p
    }
    assert fetched == {n for n in there if n.startswith("model")} or fetched == {wanted}


def test_a_repository_without_weights_is_said(served):
    repositories, command = served
    repositories.repositories["lab/net"] = {"main": {"README.md": b"soon"}}
    program = "from dilaff_jax.interop import hub; hub.weights('hf://lab/net')"
    ran = command("-c", program)
    assert "hf://lab/net holds no weights; looked for model.safetensors" in ran.stderr


def test_a_run_begins_with_weights_of_the_hub(served, tmp_path):
    """As recipes write it: config.init.encoder=hf://OWNER/NAME."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers", reason="needs the extra [huggingface]")
    from tests import data_files, test_transformer_weights

    test_transformer_weights.make_hugging_face("mit").save_pretrained(tmp_path / "mit")
    weights = (tmp_path / "mit" / "model.safetensors").read_bytes()
    repositories, command = served
    repositories.repositories["lab/mit"] = {"main": {"model.safetensors": weights}}
    data_files.tiny_shapes(tmp_path / "data")
    options = str(test_transformer_weights.MIT)
    ran = command(
        *("-m", "dilaff_jax.main", "--config", "configs/shapes_segformer.py"),
        *("--workdir", tmp_path / "run", f"--config.data.data_dir={tmp_path / 'data'}"),
        *(
            "--config.data.dataset=shapes/tiny",
            "--config.num_steps=1",
            "--config.optim.warmup_steps=0",
        ),
        *("--config.init.encoder=hf://lab/mit", f"--config.model.encoder_options={options}"),
        *("--config.optim.frozen=('encoder',)", "--config.parallel.devices=1"),
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    _, variables = test_transformer_weights.ours("mit")
    _, trained = checkpoint.read_variables(
        tmp_path / "run",
        {"params": {"encoder": variables["params"]["encoder"]}},
        drop=("decoder/*", "affinity_head/*"),
    )
    kernel = trained["params"]["encoder"]["patch_embed_0"]["kernel"]
    expected = test_transformer_weights.files.read(tmp_path / "mit" / "model.safetensors")
    name = "segformer.encoder.patch_embeddings.0.proj.weight"
    np.testing.assert_array_equal(kernel, expected[name].transpose(2, 3, 1, 0))
