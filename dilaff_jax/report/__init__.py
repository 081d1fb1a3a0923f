"""Finished runs, to be read.

python -m dilaff_jax.report WORKDIR                          # the page of an ablation
python -m dilaff_jax.report.compare_runs WORKDIR [WORKDIR ...]
python -m dilaff_jax.report.run_summary WORKDIR FILE.json
"""
