"""Whether a config fits a machine, and what it can reach there at best, before it is rented.

run.py         says what the programs of a run need, and the largest batch
programs.py    the programs of a run, for devices that need not be there
apart.py       a program compiled in a process of its own
footprint.py   memory, traffic and floor of a compiled program
hlo.py         reads XLA's text of a compiled program
"""
