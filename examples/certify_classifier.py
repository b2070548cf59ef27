"""Certify an existing classifier: what is proved, image by image, within an l2 ball.

python examples/certify_classifier.py
"""

import torch

import rush

# Any torch.nn.Module from pixels in [0, 1] to logits. Normalization belongs inside. This one comes with the package.
classifier = rush.load("cifar10-small", device="cpu").classifier
classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

smoothed = rush.SmoothedClassifier(classifier, sigma=0.25, num_classes=10)
images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # put your images here
labels = torch.zeros(4, dtype=torch.int64)

certificates = rush.certify(smoothed, (images, labels), "sequential", num_estimation=1000)
for prediction, radius in zip(certificates.prediction, certificates.radius, strict=True):
    name = "no class" if prediction == rush.ABSTAIN else classes[prediction]
    print(f"{name}, proved within l2 {radius:.3f}")
print(certificates.summary())
