"""`--mode fit`: the choice, what uses it from then on, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.optimize
from absl import flags
from absl.testing import flagsaver

import dilaff_jax
from dilaff_jax import affinity, commands, evaluate, metrics, train
from dilaff_jax.ablation import ablate_config, fit, foreign_outputs
from dilaff_jax.data import datasets, images
from dilaff_jax.errors import UserError
from dilaff_jax.export import stablehlo
from dilaff_jax.runtime import checkpoint
from dilaff_jax.serving import network
from dilaff_jax.serving.foreign_files import Form
from tests import data_files
from tests.running import make_config
from tests.test_affinity_network import alone

GRID = {
    "signed": {"steps": (3,), "strength": (0.05, 0.3), "bias": ("fitted", "fitted*0.5", 0.0)},
    "signed_weak_repulsion": {"name": "signed", "steps": (2,), "repulsion": (0.0, 0.5)},
    "random_walk": {"steps": (1,), "sharpness": (4.0,)},
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_files.tiny_shapes(tmp_path_factory.mktemp("data"), train=10, validation=7)


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "own"
    train.train_and_evaluate(make_config(data_dir), workdir)
    # What is kept of a fit beside its result: the copies need not make it again.
    fit.fit_run(with_grid(workdir), workdir)
    (workdir / "refine.json").unlink()
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A copy, for refine.json and what is kept beside it."""
    return shutil.copytree(trained, tmp_path / "run")


def with_grid(workdir, grid=None):
    config = network.read_config(workdir)
    config.ablate = ablate_config.default()
    with config.ignore_type():
        config.ablate.grid = ml_collections.ConfigDict(GRID if grid is None else grid)
    return config


@pytest.mark.parametrize("criterion", ["miou", "boundary_f", "trimap_miou", "smaller_gain"])
def test_the_choice_is_the_best_by_its_criterion_and_never_below_identity(criterion, run):
    content = fit.fit_run(with_grid(run), run, criterion=criterion)
    rows = content["candidates"]
    assert len(rows) == 1 + 6 + 2 + 1
    [identity] = [row for row in rows if row["operator"] == "identity"]
    best = max(row["score"] for row in rows)
    assert rows[0]["score"] == best >= identity["score"]
    if criterion in content["after"]:
        assert content["after"][criterion] >= content["before"][criterion]
    else:
        gains = [content["after"][k] - content["before"][k] for k in ("miou", "boundary_f")]
        assert min(gains) >= 0
    assert json.loads((run / "refine.json").read_text()) == json.loads(json.dumps(content))


def test_the_figures_are_those_of_an_evaluation_with_the_choice(run):
    """By other code: the evaluation step, on the same split."""
    content = fit.fit_run(with_grid(run), run)
    results = evaluate.evaluate_run(network.read_config(run), run)
    assert results.scalars["refined/miou"] == pytest.approx(content["after"]["miou"], abs=2e-3)
    assert results.scalars["plain/miou"] == pytest.approx(content["before"]["miou"], abs=1e-6)


def test_the_bias_calibrates(run):
    """Against the minimum that scipy finds of the cross-entropy over all edges."""
    content = fit.fit_run(with_grid(run), run)
    net, model, _ = network.from_run(run)
    source = datasets.load(network.read_config(run).data, "validation")
    logits, same = [], []
    for example in (source[i] for i in range(len(source))):
        image = jnp.asarray(example["image"])[None]
        found = jax.jit(net.apply)(net.variables, image)[1]
        coarse = affinity.downsample_labels(jnp.asarray(example["label"])[None], found.shape[1:3])
        target, valid = affinity.targets(coarse, model.offsets)
        of_first = affinity.dilation_of(model.offsets) == 1
        keep = np.asarray(valid)[..., of_first]
        logits.append(np.asarray(found)[..., of_first][keep])
        same.append(np.asarray(target)[..., of_first][keep])
    x, t = np.concatenate(logits).astype(np.float64), np.concatenate(same)

    def loss(b):
        return np.mean(np.logaddexp(0, x - b) - t * (x - b))

    found = scipy.optimize.minimize_scalar(loss, bracket=(-1, 1))
    assert content["bias"]["1"] == pytest.approx(found.x, abs=0.05)


def test_everything_that_uses_the_run_uses_the_choice(run, tmp_path):
    before = dilaff_jax.load(run).network.refine
    content = fit.fit_run(with_grid(run, {"signed": GRID["signed"]}), run, criterion="boundary_f")
    refine = content["refine"]
    assert dilaff_jax.load(run).network.refine == refine != before
    assert dilaff_jax.load(run, refine="config").network.refine == before
    assert dilaff_jax.load(run, refine="none").network.refine == {"name": "identity"}
    assert dilaff_jax.load(run, refine={"name": "random_walk"}).network.refine == {
        "name": "random_walk"
    }
    metadata = stablehlo.write(network.from_run(run)[0], tmp_path / "file.zip", size=(32, 32))
    assert metadata["refine"] == refine
    image = datasets.load(network.read_config(run).data, "validation")[0]["image"]
    file, own = dilaff_jax.load(tmp_path / "file.zip"), dilaff_jax.load(run)
    np.testing.assert_array_equal(file(image).labels, own(image).labels)
    plain = dilaff_jax.load(tmp_path / "file.zip", refine="none")(image)
    np.testing.assert_array_equal(plain.labels, plain.plain)
    config = network.read_config(run)
    none = evaluate.evaluate_run(config, run, "none").scalars
    assert none["refined/miou"] == none["plain/miou"]


def test_other_weights_than_those_it_was_fitted_to_are_refused(run):
    fit.fit_run(with_grid(run), run)
    content = json.loads((run / "refine.json").read_text())
    (run / "refine.json").write_text(json.dumps(content | {"step": 1}))
    with pytest.raises(UserError, match=r"fitted to the weights of step 1, and those of step \d"):
        dilaff_jax.load(run)
    (run / "refine.json").write_text("{")
    with pytest.raises(UserError, match=r"refine.json is damaged .*--refine=config does without"):
        dilaff_jax.load(run)
    dilaff_jax.load(run, refine="config")


def test_images_that_were_trained_on_are_refused(run):
    with pytest.raises(UserError, match=r"the run was trained on train: .* such as validation"):
        fit.fit_run(None, run, "train")
    with pytest.raises(UserError, match="the criterion is 'iou'; allowed: miou, boundary_f"):
        fit.fit_run(None, run, criterion="iou")


def test_a_run_without_affinities_has_nothing_to_fit(tmp_path, data_dir):
    config = make_config(data_dir, num_steps=1)
    config.loss.affinity = 0.0
    train.train_and_evaluate(config, tmp_path)
    with pytest.raises(UserError, match="has no affinity head, so there is nothing to refine"):
        fit.fit_run(None, tmp_path)


@pytest.fixture(scope="module")
def files(data_dir, tmp_path_factory):
    """Images of two sizes, truths, and logits that are right but for noise, as files."""
    folder = tmp_path_factory.mktemp("files")
    source = datasets.load(make_config(data_dir).data, "validation")
    rng = np.random.default_rng(0)
    for i in range(5):
        example = source[i]
        height = 32 - 8 * (i % 2)
        image, label = example["image"][:height], example["label"][:height]
        data_files.save(image, folder / "images" / f"{i}.png")
        data_files.save(label, folder / "truth" / f"{i}.png")
        right = np.eye(8)[np.where(label == 255, 0, label)]
        logits = 2 * right + rng.normal(0, 2, right.shape)
        path = folder / "results" / f"{i}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, logits.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def affinities(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    train.train_and_evaluate(alone(data_dir), workdir)
    return workdir


def inputs(folder):
    return foreign_outputs.Inputs(folder / "images", folder / "results", folder / "truth")


def test_another_networks_results_are_fitted_by_affinities_alone(affinities, files, tmp_path):
    workdir = shutil.copytree(affinities, tmp_path / "run")
    with pytest.raises(UserError, match="has no segmentation of its own; give another network's"):
        fit.fit_run(None, workdir)
    content = fit.fit_files(with_grid(workdir), workdir, inputs(files), Form(), "miou")
    assert content["images"] == 5
    assert content["after"]["miou"] >= content["before"]["miou"]
    confusion = np.zeros((8, 8), np.int64)
    for i in range(5):
        logits = np.load(files / "results" / f"{i}.npy")
        truth = images.load_label(files / "truth" / f"{i}.png")
        confusion += np.asarray(metrics.confusion(logits.argmax(-1), truth, 8))
    plain = metrics.segmentation_summary(confusion)["miou"]
    assert content["before"]["miou"] == pytest.approx(plain, abs=1e-6)
    assert dilaff_jax.load(workdir).network.refine == content["refine"]


def test_the_command_fits_and_takes_all_of_its_files_or_none(
    run, affinities, files, tmp_path, capsys
):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    commands.fit(with_grid(run), run)
    assert "written: " in capsys.readouterr().out
    with (
        flagsaver.flagsaver(logits=str(files / "results")),
        pytest.raises(UserError, match="takes --input, --logits and --truth together"),
    ):
        commands.fit(None, run)
    workdir = shutil.copytree(affinities, tmp_path / "alone")
    with flagsaver.flagsaver(
        input=str(files / "images"), logits=str(files / "results"), truth=str(files / "truth")
    ):
        commands.fit(with_grid(workdir), workdir)
    assert (workdir / "refine.json").exists()
    assert "identity" in capsys.readouterr().out
    assert checkpoint.latest_step(workdir) == 6
