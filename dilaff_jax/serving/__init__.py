"""A trained network at work: on arrays, on files, on videos, on a local page.

network.py       what runs and exported files have in common: images in, logits out
exported.py      reads exported files
predictor.py     an image of any size in, labels of that size out
refine.py        refinement of anybody's logits, in NumPy, JAX or torch
predict_files.py images, folders of them, and videos; writer.py writes what comes out
reach.py         how far a result depends on its surroundings
tile_files.py    images that do not fit into memory, in tiles (tiles.py)
volume_slabs.py  volumes whose affinities do not fit into memory
video.py         frames, and propagation in time
view_page.py     a local page; view_state.py is what it shows
"""
