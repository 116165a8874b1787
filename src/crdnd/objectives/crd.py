"""CRD: contrastive representation distillation, Tian et al. 2020 (ICLR, arXiv 1910.10699).

    min_S, heads  CE(S(x), y) + weight (L(s, bank of t) + L(t, bank of s))

    L(a, b) = -log D(a, b_i) - sum_{j of m} log(1 - D(a, b_j)),    D(a, b) = P(a, b) / (P(a, b) + m / n)
    P(a, b) = exp(<a, b> / tau) / Z

    paper            here                       paper    here
    f^S(x)           v["s_nat_features"]        g^S      student.embed: linear, then of length 1
    f^T(x)           v["t_nat_features"]        g^T      teacher.embed: the same
    N                negatives, m               M        sizes.samples, n

Nothing is maximised. For sample i the bank holds b_i, what the other network's head made of it when it was last seen;
that is the positive. The m negatives are other samples' entries, drawn anew for every sample and epoch, with repeats;
m is at most n - 1. Banks carry no gradient, so L(s, bank of t) trains student and student's head, and L(t, bank of s)
the teacher's head alone. After the update the batch's entries move: b_i <- b_i / 2 + embed(x_i) / 2, then length 1.
Z, one for each side, is what the first batch gives, and stays: the mean over its samples of the sum over all n entries
of exp(<a, b_j> / tau).

Differs from its paper: in the authors' code the negatives come from other classes and, where there are enough, without
repeats; here they are any other samples, as where labels are not used. It estimates Z from the drawn pairs; here all
pairs are taken, which has the same mean. It moves the banks before the update, here the heads are one step further.
Banks start at random points of length 1, there at points whose length is 1 on average.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from crdnd.errors import InputError
from crdnd.losses import cross_entropy
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, Sizes, Views
from crdnd.random import Stream


def other_samples(draws: Stream, samples: int, count: int) -> Tensor:
    """Ids below `samples` that are not the own one, drawn with repeats, int64 (B, count)."""
    drawn = draws.integers(0, samples - 1, (count,))
    return drawn + (drawn >= draws.ids[:, None])


class Side(nn.Module):
    """One network's head, its bank of points (n, dimensions), and log Z of its points against the other's bank."""

    bank: Tensor
    log_z: Tensor

    def __init__(self, name: str, features: int, sizes: Sizes, dimensions: int) -> None:
        super().__init__()
        # Uniform on +-1/sqrt(features), as a linear layer begins; the last column is the bias.
        draws = Stream.of("crd", name, "head", sizes.seed, ids=torch.arange(dimensions)).uniform((features + 1,))
        self.head = nn.Parameter((2 * draws - 1) / math.sqrt(features))
        points = Stream.of("crd", name, "bank", sizes.seed, ids=torch.arange(sizes.samples)).normal((dimensions,))
        self.register_buffer("bank", F.normalize(points, dim=1))
        self.register_buffer("log_z", torch.zeros(()))

    def embed(self, features: Tensor) -> Tensor:
        """Points on the sphere. (B, D) -> (B, dimensions)."""
        head = self.head.to(features)
        return F.normalize(F.linear(features, head[:, :-1], head[:, -1]), dim=1)


class Settings(ObjectiveSettings):
    """CRD's settings."""

    weight: float = Field(default=0.8, ge=0, description="Weight of the contrast beside the cross-entropy.")
    tau: float = Field(default=0.07, gt=0, description="Temperature of the contrast.")
    negatives: int = Field(default=16384, ge=1, description="m: negatives for each sample, at most n - 1.")
    dimensions: int = Field(default=128, ge=1, description="Width of the heads.")
    momentum: float = Field(default=0.5, ge=0, lt=1, description="Part of a bank's entry that stays at an update.")


class CRD(Objective):
    """Student's and teacher's features of a sample are told from those of other samples."""

    paper = "Tian et al. 2020, arXiv 1910.10699"
    needs = frozenset({"s_nat", "s_nat_features", "t_nat_features"})
    attack = None
    relates_samples = True  # in the first batch, which gives both Z
    settings: Settings
    settings_class = Settings
    started: Tensor

    def __init__(self, num_classes: int, *, sizes: Sizes | None = None, **settings: object) -> None:
        super().__init__(num_classes, sizes=sizes, **settings)
        if sizes is None or sizes.samples < 2:
            raise InputError("objective crd: needs `sizes`, with 2 samples or more; give sizes=Sizes(...).")
        self.samples = sizes.samples
        self.student = Side("student", sizes.student_features, sizes, self.settings.dimensions)
        self.teacher = Side("teacher", sizes.teacher_features, sizes, self.settings.dimensions)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def terms(self, v: Views) -> LossTerms:
        """CE(S(x), y) and the contrast from both sides."""
        m = min(self.settings.negatives, self.samples - 1)
        own, negatives = v.draws.ids[:, None], other_samples(v.draws.child("crd"), self.samples, m)
        log_noise = math.log(m / self.samples)
        contrasts = []
        for side, scores in self._scores(v):
            log_ratio = scores - self._log_z(side, scores) - log_noise
            positive, others = log_ratio.gather(1, own)[:, 0], log_ratio.gather(1, negatives)
            contrasts.append(-F.logsigmoid(positive) - F.logsigmoid(-others).sum(1))
        weight = self.settings.weight
        return LossTerms(
            ce_nat=cross_entropy(v["s_nat"], v.target),
            contrast_student=weight * contrasts[0],
            contrast_teacher=weight * contrasts[1],
        )

    def observe(self, v: Views) -> None:
        """Move the banks' entries of the batch; the first batch also gives both Z."""
        for side, scores in self._scores(v):
            side.log_z.copy_(self._log_z(side, scores))
        self.started.fill_(True)
        gather = self.processes.gather
        ids, keep = gather(v.draws.ids), self.settings.momentum
        for side, features in ((self.student, v["s_nat_features"]), (self.teacher, v["t_nat_features"])):
            points = gather(side.embed(features)).to(side.bank)
            side.bank[ids] = F.normalize(keep * side.bank[ids] + (1 - keep) * points, dim=1)

    def _scores(self, v: Views) -> list[tuple[Side, Tensor]]:
        """<a, b_j> / tau of each side's points with all of the other's bank, (B, n)."""
        student, teacher = self.student.embed(v["s_nat_features"]), self.teacher.embed(v["t_nat_features"])
        tau = self.settings.tau
        return [
            (self.student, student @ self.teacher.bank.to(student).T / tau),
            (self.teacher, teacher @ self.student.bank.to(teacher).T / tau),
        ]

    def _log_z(self, side: Side, scores: Tensor) -> Tensor:
        """log Z of a side: the stored one, or that of this batch, shared by processes, as long as there is none."""
        sums = self.processes.gather(scores.detach().logsumexp(1))
        # A choice on the device: asking in Python would stop its queue in every step.
        return torch.where(self.started, side.log_z.to(sums), sums.logsumexp(0) - math.log(len(sums)))


METHOD = CRD
