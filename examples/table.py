"""A paper's table of certified accuracies from several runs, with intervals and paired differences.

python examples/table.py results/cifar10-small-trainings/gaussian-0 results/cifar10-small-trainings/simclr-0
"""

import sys
from pathlib import Path

from rush.records.read_run import read_run

RADII = (0.0, 0.25, 0.5)
print("| run | " + " | ".join(f"certified at l2 {radius:g}" for radius in RADII) + " |")
print("| --- |" + " --- |" * len(RADII))
for folder in map(Path, sys.argv[1:]):
    results = read_run(folder)
    certificates = results.certificates
    if certificates is None:
        raise SystemExit(f"{folder} has no certificates; run `rush certify {folder}` first")
    cells = [str(certificates.accuracy_interval(radius)) for radius in RADII]
    print(f"| {folder.name} | {' | '.join(cells)} |")
print("\n`rush compare RUN RUN` tests the differences, paired on the same images.")
