"""SupCon beside cross-entropy in a loop of Hugging Face Accelerate, on a small convolutional network from timm."""

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from nearkin.network import Network
from nearkin.objectives import SupCon
from nearkin.types import Batch, Progress

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
pixels, digits = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(digits)
train, test = torch.randperm(len(images)).split(1437)
loader = DataLoader(
    TensorDataset(images[train], labels[train], train), batch_size=64, shuffle=True, drop_last=True
)

backbone = timm.create_model("test_resnet", in_chans=1, num_classes=0)
options = SupCon.Config(views=1, weight=0.3)
objective = SupCon(options, dim=backbone.num_features, classes=10).to(accelerator.device)
network = Network(backbone, objective.heads, dim=backbone.num_features, mean=[0.5], std=[0.5])
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
stage, epochs = objective.stages()[0], 4

for epoch in range(epochs):
    for number, (pictures, classes, ids) in enumerate(loader):
        step, steps = epoch * len(loader) + number, epochs * len(loader)
        progress = Progress(stage.name, step, steps, epoch, epochs)
        # With several processes each contrasts the images of its own batch.
        loss = objective(Batch(pictures[None], classes, ids), network(pictures), None, progress)
        optimizer.zero_grad()
        accelerator.backward(loss.total)
        optimizer.step()

accuracy = (network.eval()(images[test]).logits.argmax(1) == labels[test]).float().mean()
print(f"loss {loss.total:.3f}, test top-1 {accuracy:.3f}")  # noqa: T201
