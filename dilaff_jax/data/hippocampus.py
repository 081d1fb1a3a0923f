r"""hippocampus: MRI volumes, Task04 of the Medical Segmentation Decathlon.

    python -m dilaff_jax.data.prepare --dataset hippocampus --source Task04_Hippocampus \\
        --data_dir data

Antonelli et al. 2022 (https://arxiv.org/abs/2106.05735), CC BY-SA 4.0. --source holds imagesTr/
and labelsTr/ as the archive does, or images/ and labels/; the unlabelled test volumes are not used.
There is no official split: 60 % train, 15 % validation, 25 % test, by a hash of the names, unless
--counts says otherwise.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dilaff_jax.data import folders, volume_folder
from dilaff_jax.data.folders import Pair

_SHARES = (0.6, 0.15, 0.25)


class Builder(volume_folder.Builder):
    """The labelled volumes in three splits; see the module's docstring."""

    name = "hippocampus"
    class_names = ("background", "anterior", "posterior")

    def _class_list(self) -> list[tuple[str, tuple[int, int, int] | None]]:
        return [(name, None) for name in Builder.class_names]

    def splits(self) -> Mapping[str, Sequence[Pair]]:
        """Three, by a hash of the names."""
        found = (folders.folder(self.source, kind + "Tr", kind) for kind in ("images", "labels"))
        image_dir, label_dir = (folder.name for folder in found)
        return self._divided(self._pairs(image_dir, label_dir))

    def counts(self, total: int) -> tuple[int, ...]:
        """As --counts says, else 60, 15 and 25 %."""
        if self.options.counts:
            return super().counts(total)
        ends = np.rint(np.cumsum([0, *_SHARES]) * total).astype(int)
        return tuple(np.diff(ends).tolist())
