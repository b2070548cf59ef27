"""Audit an evaluation of somebody's stochastic defence: is the robustness that it reports there?

python examples/audit_defence.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import rush


class NoisyDefence(nn.Module):
    """A network that adds noise to its input at every call, which is what makes single gradients useless."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x + 0.3 * torch.randn_like(x))


torch.manual_seed(0)
train, test = (rush.load_images("digits", split=split) for split in ("train", "test"))
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
for _ in range(60):
    loss = F.cross_entropy(network(train.pixels() + 0.3 * torch.randn(len(train), 1, 8, 8)), train.labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

defence, images, threat = NoisyDefence(network).eval(), test[:60], rush.ThreatModel("linf", 0.2)
# Their evaluation: one step along the gradient of one draw of the noise.
reported = rush.attack(defence, images, threat, "fgsm", decision="vote", eot_samples=1)
report = rush.audit(defence, images, threat, reported, decision="vote", max_votes=1000)
print("\n".join(report.summary()))
