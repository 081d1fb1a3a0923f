"""Does it work? Arms over seeds, selected on one split and reported on another.

    python -m dilaff_jax.main --config configs/NAME.py --workdir DIR --mode ablate

What decides the gain? Changes of the config, compared on the selection split alone: --mode study.

What lies where:
    config.py      every key of `config.ablate`, its default and its check
    arms.py        the runs: (baseline, joint, aaf) × seeds, trained once, resumed, verified
    outputs.py     what a trained network says of a split, computed once and kept
    candidates.py  what may be done with it: the grid of operators, swept in compiled batches
    colour.py      the rivals that are guided by colour: DenseCRF and PAMR
    selection.py   which candidate is taken, by the selection split alone
    counts.py      counts image by image, and all figures from weighted sums of them
    statistics.py  mean ± std, paired differences, intervals over seeds and over images
    summary.py     the numbers of `ablation.json`
    showcase.py    best, median and worst images
    expense.py     parameters, FLOPs, memory and time of head, propagation and rivals
    run.py         the whole, read top to bottom
    study.py       changes of the config, each beside the baseline and the config as it is
    agreement.py   whether affinities err where the segmentation does

Every result between is kept under the run it belongs to, so that a stopped ablation goes on where
it was, and deleting a run's folder deletes all that followed from it.
"""
