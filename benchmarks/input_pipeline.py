r"""Images per second of the input pipeline against torch's DataLoader.

    python -m benchmarks.input_pipeline --camvid DIR      # CamVid's pictures; without: drawn ones

Two recipes: CamVid (480 × 360, crop 360 × 480, batch 12) and PASCAL VOC's sizes (500 × 375, crop
512 × 512, batch 16), each with scale 0.5–2, cat_max_ratio 0.75, flip and photometric distortion.
Both sides decode the same bytes (ours from ArrayRecord, torch's from files) with the same OpenCV
calls, augment with the same function, and every batch is copied once, as a transfer to a device
would. Both start their workers by "spawn". Measurements are interleaved: in every round each
contestant is measured once, in another order, and the medians over the rounds are compared. The
floor is decoding alone, in 1 and in 2 threads.

Needs the extra `torch`. Writes results/input_pipeline.json.
"""

import contextlib
import functools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import cv2
import numpy as np
import torch
from absl import app, flags
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import timing
from dilaff_jax.data import data_config, datasets, image_folder, images, pipeline, prepare, shapes
from dilaff_jax.data.augment import Augmentation

_CAMVID = flags.DEFINE_string("camvid", None, "Folder of CamVid, for its pictures.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds; the median over them is reported.")
_BATCHES = flags.DEFINE_integer("batches", 20, "Batches a measurement.")

PREFETCH = 2
WORKERS = (0, 1, 2)
RECIPES = {
    "camvid": {"size": (360, 480), "crop": (360, 480), "batch": 12, "images": 120},
    "voc": {"size": (375, 500), "crop": (512, 512), "batch": 16, "images": 120},
}


def _pictures(size: tuple[int, int], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of one size: CamVid's if given, else drawn."""
    if _CAMVID.value:
        train = pathlib.Path(_CAMVID.value) / "train"
        for file in sorted((train / "images").iterdir())[:count]:
            image = images.decode_image(images.load_image(file)[0])
            label = images.load_label(train / "labels" / f"{file.stem}.png").astype(np.uint8)
            yield (
                cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA),
                cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT),
            )
        return
    for number in range(count):
        image, label = shapes.draw(np.random.default_rng(number), max(size))
        yield image[: size[0]], label[: size[0]]


def _write(folder: pathlib.Path, recipe: dict[str, Any]) -> datasets.Source:
    """Writes the recipe's pictures as files, and prepares them as ArrayRecord; the same bytes."""
    for name in ("images", "labels"):
        (folder / "train" / name).mkdir(parents=True)
    for number, (image, label) in enumerate(_pictures(recipe["size"], recipe["images"])):
        jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (folder / f"train/images/{number:04d}.jpg").write_bytes(jpeg.tobytes())
        (folder / f"train/labels/{number:04d}.png").write_bytes(images.encode_png(label))
    options = image_folder.FolderOptions(classes=",".join(f"class{i}" for i in range(11)))
    prepare.prepare("image_folder/bench", folder / "out", folder, options)
    return datasets.load(_config(folder, recipe, 0), "train")


def _config(folder: pathlib.Path, recipe: dict[str, Any], workers: int) -> Any:
    return data_config.default(
        dataset="image_folder/bench",
        data_dir=str(folder / "out"),
        crop_size=recipe["crop"],
        workers=workers,
        prefetch=PREFETCH,
    )


class Files(torch.utils.data.Dataset):
    """What a user of torch writes: files, OpenCV, the same augmentation."""

    def __init__(self, folder: pathlib.Path, augmentation: Augmentation) -> None:
        self.images = sorted((folder / "train/images").iterdir())
        self.labels = sorted((folder / "train/labels").iterdir())
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image = images.decode_image(self.images[index].read_bytes())
        label = images.decode_label(self.labels[index].read_bytes())
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        image, label = self.augmentation(image, label, rng)
        return {"image": image, "label": label}


class Endless(torch.utils.data.Sampler):
    """Shuffled epochs without end, so that no epoch's start is measured."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.length).tolist()


def _one_thread(_: int) -> None:
    cv2.setNumThreads(1)


def _torch_batches(folder: pathlib.Path, recipe: dict[str, Any], workers: int) -> Any:
    dataset = Files(folder, Augmentation.from_config(_config(folder, recipe, 0)))
    several: dict[str, Any] = {}
    if workers:
        # Forked workers can hang: this process has threads, torch's own among them.
        several = {"multiprocessing_context": "spawn", "persistent_workers": True}
        several |= {"prefetch_factor": PREFETCH, "worker_init_fn": _one_thread}
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=recipe["batch"],
        sampler=Endless(len(dataset)),
        num_workers=workers,
        **several,
    )


def _rate(iterator: Iterator[dict[str, Any]], recipe: dict[str, Any]) -> float:
    """Images per second; what was made ahead while others were measured is taken first."""
    crop, batch = recipe["crop"], recipe["batch"]
    device = {
        "image": np.empty((batch, *crop, 3), np.uint8),
        "label": np.empty((batch, *crop), np.uint8),
    }

    def take(count: int) -> None:
        for _ in range(count):
            for key, value in next(iterator).items():
                np.copyto(device[key], np.asarray(value))

    take((PREFETCH + 2) * max(WORKERS))
    start = time.perf_counter()
    take(_BATCHES.value)
    return _BATCHES.value * batch / (time.perf_counter() - start)


def _decode_rate(source: datasets.Source, threads: int) -> float:
    """Images per second of decoding image and label, and nothing else."""
    count = 2 * len(source)
    cv2.setNumThreads(1)
    with futures.ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for _ in pool.map(lambda i: source[i % len(source)]["label"].shape, range(count)):
            pass
        seconds = time.perf_counter() - start
    cv2.setNumThreads(-1)
    return count / seconds


def measure(name: str, recipe: dict[str, Any], folder: pathlib.Path) -> dict[str, list[float]]:
    """Rates of every contestant in every round, images per second."""
    source = _write(folder, recipe)
    contestants: dict[str, Callable[[], float]] = {}
    with contextlib.ExitStack() as stack:
        for workers in WORKERS:
            ours = stack.enter_context(
                pipeline.train_batches(
                    _config(folder, recipe, workers), source, batch_size=recipe["batch"], seed=0
                )
            )
            theirs = iter(_torch_batches(folder, recipe, workers))
            for who, it in (("ours", ours), ("torch", theirs)):
                contestants[f"{who}, {workers} workers"] = functools.partial(_rate, it, recipe)
        for threads in (1, 2):
            key = f"decode alone, {threads} threads"
            contestants[key] = functools.partial(_decode_rate, source, threads)
        rates: dict[str, list[float]] = {key: [] for key in contestants}
        order = list(contestants)
        for number in tqdm(range(_ROUNDS.value), desc=name, unit="round"):
            for key in order[number % len(order) :] + order[: number % len(order)]:
                rates[key].append(contestants[key]())
    return rates


def _table(name: str, medians: dict[str, float]) -> Table:
    table = Table(title=f"{name}: images per second, median", title_justify="left")
    for heading in ("workers", "ours", "torch", "ours / torch", "decode alone"):
        table.add_column(heading, justify="right")
    for workers in WORKERS:
        ours, theirs = (medians[f"{who}, {workers} workers"] for who in ("ours", "torch"))
        floor = medians[f"decode alone, {max(1, workers)} threads"]
        row = (f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}", f"{floor:.0f}")
        table.add_row(str(workers), *row)
    return table


def main(argv: list[str]) -> None:
    """Measures both recipes, prints tables and writes the figures."""
    del argv
    report: dict[str, Any] = {
        **timing.provenance("grain", "torch", "opencv-python-headless", "numpy"),
        "load_average_at_start": os.getloadavg()[0],
        "pictures": "CamVid train" if _CAMVID.value else "drawn",
        "batches_a_measurement": _BATCHES.value,
        "recipes": {},
    }
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            rates = measure(name, recipe, pathlib.Path(folder))
        medians = {key: statistics.median(values) for key, values in rates.items()}
        ratios = {
            str(w): medians[f"ours, {w} workers"] / medians[f"torch, {w} workers"] for w in WORKERS
        }
        report["recipes"][name] = {
            "recipe": recipe,
            "images_per_second": medians,
            "ours_over_torch_by_workers": ratios,
            "rounds": rates,
        }
        Console().print(_table(name, medians))
    print(timing.write("input_pipeline", report))


if __name__ == "__main__":
    app.run(main)
