"""Train one's own network under noise, certify it and attack it inside its certificates.

python examples/own_network.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import rush

torch.manual_seed(0)
train, test = (rush.load_images("digits", split=split) for split in ("train", "test"))  # or a folder of your own
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
x, y = train.pixels(), train.labels
for _ in range(40):
    for rows in torch.randperm(len(x)).split(64):
        noisy = x[rows] + 0.25 * torch.randn_like(x[rows])  # the noise that smooths the network later
        loss = F.cross_entropy(network(noisy), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

smoothed = rush.SmoothedClassifier(network.eval(), sigma=0.25, num_classes=10)
certificates = rush.certify(smoothed, test[:100], num_estimation=1000)
print(certificates.summary())

attacked = rush.attack(smoothed, test[:20], rush.ThreatModel("l2", 0.25), "pgd", steps=10, eot_samples=8)
print(attacked.summary())
rush.save(smoothed, "own-network")  # rush.load("own-network", classifier=network) loads it
