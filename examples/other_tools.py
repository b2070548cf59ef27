"""Judge the points of another tool on noise that it has not seen.

python examples/other_tools.py
"""

import foolbox
import torch

import rush
from rush.evaluation.attack import verdict

smoothed = rush.load("cifar10-small", device="cpu")
x = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255  # put your images here
y, threat = smoothed.predict(x, num_samples=100).clamp(min=0), rush.ThreatModel("linf", 8 / 255)

# docs/attacks.md has the same for AutoAttack and the Adversarial Robustness Toolbox.
module = smoothed.as_module(num_samples=8, generator=rush.stream(0, "foolbox"))
attack = foolbox.attacks.LinfPGD(steps=5, rel_stepsize=0.25)
_, points, success = attack(foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu"), x, y, epsilons=threat.epsilon)

points = threat.on_grid(points, x)  # this classifier is smoothed by discrete noise, which takes 8-bit images
judged = verdict(smoothed, (x, y), points, threat)
print(f"foolbox counts {int(success.sum())} of {len(x)} as broken, on one random pass")
print(judged.summary())
