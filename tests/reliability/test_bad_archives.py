"""Archives that are damaged, or would write elsewhere, are refused."""

import tarfile
import zipfile

import pytest

from dilaff_jax.data import images, prepare
from tests.reliability import bad_files
from tests.reliability.place import cases, contents

# Archives that would write elsewhere.

OUTSIDE = "this is not the official archive, nothing of it is used"
VOC, CITY = "VOCtrainval_11-May-2012.tar", "leftImg8bit_trainvaltest.zip"


def leaves_zip(name, shown=None):
    return f"member {shown or name!r} would leave the folder it is unpacked to; {OUTSIDE}"


ARCHIVES = cases(
    ("tar to the parent", "voc2012_seg", lambda at: [("../../../evil", b"x")], OUTSIDE),
    ("tar to a root", "voc2012_seg", lambda at: [(f"{at}/evil", b"x")], "not found"),
    ("tar link out", "voc2012_seg", lambda at: [(bad_files.tar_link("a", at), None)], OUTSIDE),
    (
        "tar link out by steps",
        "voc2012_seg",
        lambda at: [(bad_files.tar_link("a", "../../.."), None), ("a/evil", b"x")],
        OUTSIDE,
    ),
    (
        "tar hard link out",
        "voc2012_seg",
        lambda at: [(bad_files.tar_link("a", "../../../source/b", tarfile.LNKTYPE), None)],
        OUTSIDE,
    ),
    (
        "tar device",
        "voc2012_seg",
        lambda at: [(bad_files.tar_link("a", "", tarfile.CHRTYPE), None)],
        OUTSIDE,
    ),
    ("zip to the parent", "cityscapes", lambda at: [("../../../evil", b"x")], OUTSIDE),
    ("zip to a root", "cityscapes", lambda at: [(f"{at}/evil", b"x")], OUTSIDE),
    ("zip to the parent, as Windows", "cityscapes", lambda at: [("..\\..\\evil", b"x")], OUTSIDE),
    ("zip to a drive", "cityscapes", lambda at: [("C:\\evil", b"x")], OUTSIDE),
    ("zip to the folder itself", "cityscapes", lambda at: [("./", b"")], "no folder"),
    (
        "zip link out",
        "cityscapes",
        lambda at: [(zip_link("leftImg8bit/a", at), str(at)), ("leftImg8bit/a/evil", b"x")],
        "damaged",
    ),
)


def zip_link(name, target):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(("dataset", "members", "kind"), ARCHIVES)
def test_an_archive_cannot_write_elsewhere(dataset, members, kind, place):
    is_tar = dataset == "voc2012_seg"
    path = place.source / (VOC if is_tar else CITY)
    (bad_files.tar if is_tar else bad_files.zip_of)(path, *members(place.at))
    before = contents(place)
    with pytest.raises(images.DataError) as caught:
        prepare.prepare(dataset, place.data, place.source)
    message = str(caught.value)
    if kind == OUTSIDE:
        assert message.startswith(f"{path}: ")
        assert message.endswith(f"; {OUTSIDE}")
    elif kind == "damaged":
        assert message.startswith(f"{path}: damaged or incomplete archive: ")
        assert message.endswith("; download it again")
    else:  # a leading slash is taken off: it is in the scratch folder, which is removed
        folder = "VOCdevkit/VOC2012" if is_tar else "leftImg8bit"
        assert message == f"{path.name}: unpacked, but there is no folder {folder} in it"
    assert contents(place) == before
    assert not list(place.at.rglob("evil"))


@pytest.mark.parametrize("keep", [0, 1, 100, -30])
@pytest.mark.parametrize("dataset", ["voc2012_seg", "cityscapes"])
def test_a_truncated_archive_is_refused(dataset, keep, place):
    is_tar = dataset == "voc2012_seg"
    path = place.source / (VOC if is_tar else CITY)
    if is_tar:
        bad_files.tar(path, *[(f"VOCdevkit/VOC2012/{n}", bytes(3000)) for n in "ab"], kind="w:gz")
    else:
        bad_files.zip_of(path, *[(f"leftImg8bit/{n}", bytes(3000)) for n in "ab"])
    path.write_bytes(path.read_bytes()[: keep or 0])
    with pytest.raises(images.DataError) as caught:
        prepare.prepare(dataset, place.data, place.source)
    assert str(caught.value).startswith(f"{path}: damaged or incomplete archive: ")
    assert str(caught.value).endswith("; download it again")
