"""What the losses cost, how exact they are and how noisy, measured side by side in one run.

``python -m fmd.benchmark losses|precision|variance|step`` writes
``results/benchmarks/<name>.json``. Functions that are compared take turns, so that a busy machine
slows all of them alike; each row holds the median time and, against its yardstick, the median ratio
with the lowest and the highest.
"""
