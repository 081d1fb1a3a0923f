"""Every command of docs/tutorial.md, in its order, in an empty folder: on little data, few steps."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import cv2
import numpy as np
import pytest

from dilaff_jax.data import shapes

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
# What makes a command small here: it only follows what is written on the page.
LITTLE = {
    "--dataset shapes": ["--size", "32", "--train", "12", "--validation", "4", "--test", "3"],
    "--config ": [
        "--config.num_steps=2",
        "--config.eval_every=2",
        "--config.optim.warmup_steps=0",
        "--config.batch_size=4",
        "--config.data.crop_size=(32,32)",
        "--config.model.encoder_options.widths=(4,6,8)",
        "--config.model.decoder_options.widths=(6,)",
        "--config.model.affinity.width=4",
        "--config.resume_changed=True",
    ],
}


def commands():
    """The commands of the page, whole, without those that install."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    told = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in told if not re.match(r"(pip|python3 -m venv)\b", line)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """An empty folder with what a reader brings: pictures, and images with masks."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("my_pictures", "mine/images", "mine/labels"):
        (folder / name).mkdir(parents=True)
    for i in range(12):
        image, label = shapes.draw(np.random.default_rng(i), 48)
        if not i:
            cv2.imwrite(str(folder / "my_pictures" / "drawn.png"), image[..., ::-1])
        cv2.imwrite(str(folder / f"mine/images/{i}.png"), image[..., ::-1])
        cv2.imwrite(str(folder / f"mine/labels/{i}.png"), np.where(label < 255, label // 4, 255))
    (folder / "mine" / "classes.txt").write_text("texture\nobject\n")
    return folder


def test_the_page_has_the_commands_that_are_run_here():
    found = commands()
    assert len(found) == 14
    assert sum("--mode" in c or "dilaff_jax.main" in c for c in found) >= 8


def test_every_command_runs_and_leaves_what_the_page_says(reader):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in commands():
        arguments = shlex.split(command)
        if arguments[0] == "dilaff":
            arguments[:1] = ["python", "-m", "dilaff_jax.main"]
        for part, little in LITTLE.items():
            arguments += little if part in command else []
        ran = subprocess.run(
            [sys.executable, *arguments[1:]],
            cwd=reader,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    for left in (
        "result.png",
        "workdirs/joint/refine.json",
        "workdirs/joint/README.md",
        "joint.json",
        "found/overlays/drawn.png",
        "found/labels/drawn.png",
        "found_mine/labels/0.png",
    ):
        assert (reader / left).is_file(), left
    assert cv2.imread(str(reader / "result.png")).shape[1] >= 1200
    for what in re.findall(r"^\| `([\w./]+)` \|", PAGE, re.MULTILINE):
        assert list((reader / "workdirs" / "joint").glob(what.replace("STEP", "*"))), what
