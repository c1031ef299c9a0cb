"""CoNe in a plain PyTorch loop: the network, its teacher and the bank, on scikit-learn's digits (seconds on a CPU)."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from nearkin.network import Network
from nearkin.objectives import CoNe
from nearkin.teacher import Teacher, momentum_at
from nearkin.types import Batch, Progress

torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(digits)
train, test = torch.randperm(len(images)).split(1437)
batch_size, epochs = 64, 5
per_epoch = len(train) // batch_size

backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 128))
config = CoNe.Config(teacher_crop="same")  # both networks read one view
objective = CoNe(config, dim=128, classes=10, images=len(train), batch_size=batch_size)
network = Network(backbone, objective.heads, dim=128, mean=[0.5], std=[0.5])
stage = objective.stages()[0]
teacher = Teacher(network, batchnorm="own")
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)

for step in range(epochs * per_epoch):
    rows = train[torch.randint(len(train), (batch_size,))]
    batch = Batch(images[rows][None], labels[rows], rows)  # one view; rows are sample ids
    progress = Progress(stage.name, step, epochs * per_epoch, step // per_epoch, epochs)
    student, target = network(batch.images[0]), teacher(batch.images[0])
    loss = objective(batch, student, target, progress)
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    objective.update(batch, student, target)  # writes the teacher's keys to the bank
    teacher.update(network, momentum_at(stage.teacher, step + 1, progress.steps, per_epoch))

accuracy = (network.eval()(images[test]).logits.argmax(1) == labels[test]).float().mean()
print(f"loss {loss.total:.3f}, test top-1 {accuracy:.3f}")  # noqa: T201
