"""Pairing files, and keeping inside the folder that was given."""

import io
import os
import tarfile
import zipfile

import pytest

from dilaff_jax.data import folders
from dilaff_jax.data.images import DataError
from tests.data_files import image_folder, picture, save


def pair_up(root, **kwargs):
    return folders.pair_up(root, root / "train/images", root / "train/labels", **kwargs)


def test_images_pair_with_masks_of_their_name_in_order(tmp_path):
    pairs = pair_up(image_folder(tmp_path, ("b", "a")))
    assert [p.name for p in pairs] == ["a", "b"]
    assert pairs[0].image.name == "a.jpg"
    assert pairs[0].label.name == "a.png"


def test_subfolders_are_part_of_the_name(tmp_path):
    pairs = pair_up(image_folder(tmp_path, ("x/1", "y/1")))
    assert [p.name for p in pairs] == ["x/1", "y/1"]


def test_suffixes_are_no_part_of_the_name(tmp_path):
    save(picture(), tmp_path / "train/images/a_left.png")
    save(picture(), tmp_path / "train/labels/a_ids.png")
    assert pair_up(tmp_path, image_suffix="_left", label_suffix="_ids")[0].name == "a"


def test_other_files_are_passed_over(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "train/images/.DS_Store").write_text("x")
    (tmp_path / "train/images/notes.txt").write_text("x")
    assert len(pair_up(tmp_path)) == 3


def test_missing_masks_are_named(tmp_path):
    image_folder(tmp_path)
    (tmp_path / "train/labels/b.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images have no mask: .*labels/b\.\* for .*b\.jpg"):
        pair_up(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "train/images").mkdir(parents=True)
    (tmp_path / "train/labels").mkdir()
    with pytest.raises(DataError, match="no images named"):
        pair_up(tmp_path)


def test_two_images_of_one_name_are_refused(tmp_path):
    image_folder(tmp_path)
    save(picture(), tmp_path / "train/images/a.png")
    with pytest.raises(DataError, match="have one name"):
        pair_up(tmp_path)


def test_links_that_leave_the_folder_are_refused(tmp_path):
    root = image_folder(tmp_path / "set")
    secret = save(picture(), tmp_path / "secret.jpg")
    (root / "train/images/a.jpg").unlink()
    (root / "train/images/a.jpg").symlink_to(secret)
    with pytest.raises(DataError, match="symbolic link, or behind one, that leaves"):
        pair_up(root)


def test_linked_folders_that_leave_are_refused(tmp_path):
    root = image_folder(tmp_path / "set")
    save(picture(), tmp_path / "elsewhere/z.jpg")
    (root / "train/images/more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(DataError, match="symbolic link, or behind one, that leaves"):
        pair_up(root)


def test_links_within_the_folder_are_followed(tmp_path):
    root = image_folder(tmp_path / "set")
    (root / "train/images/a.jpg").rename(root / "real.jpg")
    (root / "train/images/a.jpg").symlink_to(root / "real.jpg")
    assert len(pair_up(root)) == 3


def test_a_source_that_is_itself_a_link_is_fine(tmp_path):
    image_folder(tmp_path / "set")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert len(pair_up(tmp_path / "link")) == 3


def tar_with(path, info, data=b""):
    with tarfile.open(path, "w") as tar:
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return path


def evil_tars(folder):
    link = tarfile.TarInfo("set/link")
    link.type, link.linkname = tarfile.SYMTYPE, "../../outside"
    absolute_link = tarfile.TarInfo("set/link")
    absolute_link.type, absolute_link.linkname = tarfile.SYMTYPE, "/etc"
    device = tarfile.TarInfo("set/null")
    device.type = tarfile.CHRTYPE
    infos = [tarfile.TarInfo("../outside.txt"), link, absolute_link, device]
    for number, info in enumerate(infos):
        data = b"x" if info.isreg() else b""
        yield tar_with(folder / f"{number}.tar", info, data)


def test_tar_members_that_leave_are_refused(tmp_path):
    for archive in evil_tars(tmp_path):
        with pytest.raises(DataError, match="nothing of it is used"):
            folders.extract(archive, tmp_path / "deep" / "target")
    assert not (tmp_path / "deep/outside.txt").exists()


def test_tar_members_with_absolute_names_stay_inside(tmp_path):
    archive = tar_with(tmp_path / "a.tar", tarfile.TarInfo("/abs.txt"), b"x")
    folders.extract(archive, tmp_path / "target")
    assert (tmp_path / "target/abs.txt").read_bytes() == b"x"
    assert not os.path.exists("/abs.txt")


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside.txt", "a/../../outside.txt"])
def test_zip_members_that_leave_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(name, "x")
    with pytest.raises(DataError, match="would leave the folder"):
        folders.extract(tmp_path / "a.zip", tmp_path / "deep" / "target")
    assert not list(tmp_path.rglob("outside.txt"))


def test_damaged_archives_are_refused(tmp_path):
    image_folder(tmp_path / "set")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "set", "set")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.tar").write_bytes(b"no archive at all")
    for name in ("half.tar.gz", "none.tar"):
        with pytest.raises(DataError, match="damaged or incomplete archive"):
            folders.extract(tmp_path / name, tmp_path / "target")


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(DataError, match=r"neither the folder x nor the archive x\.zip"):
        folders.unpacked(tmp_path, tmp_path / "scratch", "x", ["x.zip"])


def test_links_that_go_in_circles_are_refused(tmp_path):
    root = image_folder(tmp_path / "set")
    (root / "train/images/again").symlink_to(root / "train/images", target_is_directory=True)
    with pytest.raises(DataError, match="a second time"):
        pair_up(root)
