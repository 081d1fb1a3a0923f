"""Does it work? Arms over seeds, selected on one split and reported on another.

    python -m dilaff_jax.main --config configs/NAME.py --workdir DIR --mode ablate

What decides the gain? Changes of the config, compared on the selection split alone: --mode study.

What is where:
    ablate_config.py    every key of `config.ablate`: default, rule and meaning
    arms.py             the runs: (baseline, joint, aaf) × seeds, trained once, resumed, verified
    network_outputs.py  what a trained network says of a split, computed once and kept
    operators.py        what may be done with it: the grid of operators, swept in compiled batches
    baseline_outputs.py the baselines that are guided by colour: DenseCRF and PAMR
    class_losses.py     what an operator does to each class, and the gate that keeps it from losing
    selection.py        which candidate is taken, by the selection split alone
    counts.py           counts image by image, and all figures from weighted sums of them
    statistics.py       mean ± std, paired differences, intervals over seeds and over images
    analysis.py         selection and counts, the whole of it
    summary.py          the numbers of `ablation.json`
    qualitative.py      best, median and worst images
    cost_table.py       parameters, FLOPs, memory and time of head, propagation and rivals
    run.py              the whole, read top to bottom
    config_study.py     changes of the config, each beside the baseline and the config as it is
    evaluations.py      the same where nothing is selected, by the last evaluation of each
    agreement.py        whether affinities err where the segmentation does
    cache.py            results between, kept on disk with what they were made from
    report/             the page of an ablation

Every result between is kept under the run it belongs to, so that a stopped ablation goes on where
it was, and deleting a run's folder deletes all that followed from it.
"""
