"""Whether a config fits a machine, and what it can reach there at best, before it is rented.

run.py         compiles the programs of a run and says what they need
footprint.py   memory, traffic and floor of a compiled program
hlo.py         reads XLA's text of a compiled program
"""
