"""What a run needs around its numbers: processes and devices, checkpoints, reports, locks, signals.

parallel.py     processes and devices; mapping a per-device program over them
checkpoint.py   saving and restoring; the only file that knows Orbax
reporting.py    metrics.jsonl, progress, tables; trackers.py: TensorBoard, W&B, MLflow
files.py        files that are replaced at once, or not at all
locks.py        who works in a folder is alone
preemption.py   requests to stop: what is done is saved first
provenance.py   with what and where a number was made
cost.py         parameters, FLOPs, memory and time of a program
chips.py        what chips have: memory, FLOP/s, bandwidth; slices to compile for
machine.py      its memory; processes that end with the one that started them
sharding.py     which pieces of a state lie where, in the mode "fsdp"
goodput.py      where the time of a run goes
"""
