"""A checkpoint as the published CoNe code writes it, with random weights, and the network that it came from."""

from __future__ import annotations

import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Published(nn.Module):
    """torchvision's ResNet, a head of two layers, a classifier: written from the paper's description."""

    def __init__(self, depth=18, hidden=96, embedding=16, classes=7, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = getattr(torchvision.models, f"resnet{depth}")()
        width = self.net.fc.in_features
        self.net.fc = nn.Identity()
        layers = (nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.head = nn.Module()
        self.head.head = nn.Sequential(*layers, nn.Linear(hidden, embedding))
        self.fc = nn.Linear(embedding, classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.2)
                nn.init.normal_(module.bias, std=0.1)
        nn.init.normal_(layers[0].bias, std=0.5)
        self.eval()

    @torch.no_grad()
    def forward(self, images):
        """uint8 `[N, 3, H, W]` -> logits."""
        pixels = v2.functional.normalize(images.float() / 255, MEAN, STD)
        return self.fc(self.head.head(self.net(pixels)))

    def view(self, image):
        """The usual look at an image: short side 256, centre 224."""
        return v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(image)

    def tensors(self, prefix="module."):
        """The entries of a checkpoint: student, teacher, queues."""
        student = self.state_dict()
        classes, embedding = self.fc.weight.shape
        queues = {
            "queue": torch.randn(embedding, 32),
            "queue_ptr": torch.zeros(1, dtype=torch.long),
            "queue_label_prob": torch.randn(classes, 32),
            "queue_label": torch.zeros(32, dtype=torch.long),
        }
        entries = {f"encoder_q.{name}": value for name, value in student.items()}
        entries |= {f"encoder_k.{name}": torch.full_like(v, 9) for name, v in student.items()}
        return {prefix + name: value for name, value in (entries | queues).items()}


def save(path, tensors):
    torch.save({"model": tensors, "epoch": 100}, path)
    return path


def pictures(count, side=64, seed=5):
    return torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)
    ).byte()
