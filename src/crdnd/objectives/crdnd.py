"""CRDND: contrastive relationship denoise distillation, Wang et al., ICASSP 2023 (arXiv 2302.08764), as published.

    x' = argmax_{x' in B(x, eps)}  KL(T(x) || S(x'))      10 steps, start 0.001 N(0, 1), batch norm in eval mode
    min_S  lambda L_nat + (1 - lambda) L_adv

    L_nat = -mean_a log( exp(cos(a, a+) / tau) / sum_{q in Q(a)} exp(cos(a, q) / tau) )

Adaptive compensation: u_i = M f_S(x_i) stands beside v_i = f_T(x_i). Column i of M holds the teacher's accuracy a_i on
class i on the diagonal and (1 - a_i) / (K - 1) elsewhere, so M times a right prediction looks like the noisy teacher's.
Contrastive relation: an anchor a and its positive a+ are the two predictions on one image; the pool Q(a) is all 2N
predictions of the batch but a itself. L_adv is the same on x', which passes through both networks, with its own M.

    paper         here                         paper           here
    f_S(x), (x')  v["s_nat"], v["s_adv"]       M_1, M_2        compensate(..., a_nat), compensate(..., a_adv)
    f_T(x), (x')  v["t_nat"], v["t_adv"]       a_i             accuracies("nat"), accuracies("adv")
    lambda        weight_nat                   tau_1, tau_2    tau
    K             num_classes                  N               the batch

Differs from its paper: nothing that the sources pin down. They leave open the training attack, logits or probabilities
under M, what the 2N runs over, one side or both, whether the positive stands in the denominator, and where a_i comes
from; each is a setting, and the form that its choices name first is the default. The accuracies are kept at
or above 1/K + 0.001, because below 1/K the mixing would turn the prediction over.

What to know before you use it: the loss is blind to the scale of the logits, and pushes examples of one class apart. On
the published tables and here PGD_SAT reads about 10 points better than margin attacks do. Report both.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, Sizes, TrainingAttack, Views

Kind = Literal["nat", "adv"]


def compensate(predictions: Tensor, accuracies: Tensor) -> Tensor:
    """M v for every row v of `predictions`, in O(N K) and without the matrix. (N, K), (K,) -> (N, K).

    (M v)_i = (a_i - b_i) v_i + sum_j b_j v_j  with  b_i = (1 - a_i) / (K - 1).
    """
    b = (1 - accuracies) / (predictions.shape[1] - 1)
    return (accuracies - b) * predictions + (predictions @ b)[:, None]


def contrast(similarity: Tensor, positive: Tensor, own: Tensor | None, *, with_positive: bool) -> Tensor:
    """-log of the share that the positive has among the pool, for each anchor. -> (A,).

    Args:
        similarity: cos / tau of every anchor with the pool, (A, P).
        positive: the place of each anchor's positive in the pool, int64 (A,).
        own: the place of each anchor itself, which does not count, int64 (A,); None where anchors are not in the pool.
        with_positive: whether the positive stands in the denominator too.
    """
    # One number a row, and no mask: on a CPU a masked fill costs many times the rest of the loss.
    others = similarity if own is None else similarity.scatter(1, own[:, None], -torch.inf)
    if with_positive:
        return F.cross_entropy(others, positive, reduction="none")
    chosen = similarity.gather(1, positive[:, None])[:, 0]
    return torch.logsumexp(others.scatter(1, positive[:, None], -torch.inf), dim=1) - chosen


class Settings(ObjectiveSettings):
    """CRDND's settings."""

    weight_nat: float = Field(
        default=0.2, ge=0, le=1, description="lambda of the paper: weight of L_nat; L_adv gets the rest."
    )
    tau: float = Field(default=0.5, gt=0, description="Temperature of the contrast, on x and on x'.")
    space: Literal["logits", "probabilities"] = Field(default="logits", description="What f stands for.")
    centre: bool = Field(default=False, description="Subtract each prediction's mean over the classes first.")
    denominator: Literal["with_positive", "without_positive", "other_classes"] = Field(
        default="with_positive",
        description="What stands in the denominator: the whole pool, all but the positive, or the positive and what is "
        "of another class, so that no example is pushed away from its own class (not in the paper).",
    )
    views: Literal["student_teacher", "natural_adversarial"] = Field(
        default="student_teacher",
        description="What the 2N runs over. student_teacher: both networks' predictions on one kind of image "
        "(NT-Xent). natural_adversarial: one network's predictions on x and x', anchored at the other network's.",
    )
    sides: Literal["symmetric", "one_sided"] = Field(
        default="symmetric", description="Anchors: both networks' predictions, or the teacher's alone as in equation 4."
    )
    acm: Literal["on", "off", "global"] = Field(
        default="on", description="Compensation by class accuracies, none, or by one accuracy over all classes."
    )
    accuracy: Literal["previous_epoch", "running", "one"] = Field(
        default="previous_epoch",
        description="Where a_i comes from: the epoch before (1 in the first), this epoch so far, or always 1.",
    )


class CRDND(Objective):
    """Contrast between the compensated student's and the teacher's predictions, on x and on x'."""

    paper = "Wang et al. 2023, arXiv 2302.08764"
    needs = frozenset({"s_nat", "s_adv", "t_nat", "t_adv"})
    attack = TrainingAttack(loss="kl_teacher", start="gaussian", mode="eval")
    summed = ("counts",)
    relates_samples = True
    repairable = False  # a_i counts its errors
    settings: Settings
    settings_class = Settings
    counts: Tensor
    previous: Tensor

    def __init__(self, num_classes: int, *, sizes: Sizes | None = None, **settings: object) -> None:
        super().__init__(num_classes, sizes=sizes, **settings)
        # [nat or adv, seen or right, class]
        self.register_buffer("counts", torch.zeros(2, 2, num_classes, dtype=torch.float64))
        self.register_buffer("previous", torch.zeros(2, 2, num_classes, dtype=torch.float64))

    def terms(self, v: Views) -> LossTerms:
        """lambda L_nat and (1 - lambda) L_adv, averaged over a sample's anchors."""
        student = {
            "nat": self._embed(v["s_nat"], self.accuracies("nat")),
            "adv": self._embed(v["s_adv"], self.accuracies("adv")),
        }
        teacher = {"nat": self._embed(v["t_nat"]), "adv": self._embed(v["t_adv"])}
        weight = self.settings.weight_nat
        return LossTerms(
            contrast_nat=weight * self._relation("nat", v.y, student, teacher),
            contrast_adv=(1 - weight) * self._relation("adv", v.y, student, teacher),
        )

    def accuracies(self, kind: Kind) -> Tensor | None:
        """a_i of the teacher on natural or adversarial images, (K,), or None when nothing is compensated."""
        chosen = self.settings
        if chosen.acm == "off":
            return None
        counts = self.previous
        if chosen.accuracy == "running":  # each process has counted its own share of the epoch so far
            counts = self.processes.gather(self.counts[None]).sum(dim=0)
        seen, right = counts[0 if kind == "nat" else 1]
        if chosen.acm == "global":
            seen, right = seen.sum().expand_as(seen), right.sum().expand_as(right)
        if chosen.accuracy == "one":
            seen = torch.zeros_like(seen)
        accuracies = torch.where(seen > 0, right / seen.clamp(min=1), 1.0)
        return accuracies.clamp(min=1 / self.num_classes + 1e-3)

    def observe(self, v: Views) -> None:
        """Count the teacher's right answers on this batch, class by class."""
        # Not `one_hot`, which looks at its labels.
        classes = (v.y[:, None] == torch.arange(self.num_classes, device=v.y.device)).to(self.counts)
        for index, view in enumerate((v["t_nat"], v["t_adv"])):
            right = (view.argmax(1) == v.y).to(self.counts)
            self.counts[index, 0] += classes.sum(0)
            self.counts[index, 1] += right @ classes

    def end_epoch(self) -> None:
        """Make this epoch's accuracies the previous ones."""
        self.previous.copy_(self.counts)
        self.counts.zero_()

    def _embed(self, logits: Tensor, accuracies: Tensor | None = None) -> Tensor:
        """A prediction as a point on the sphere, compensated where accuracies are given. (N, K) -> (N, K)."""
        points = logits if self.settings.space == "logits" else F.softmax(logits, dim=1)
        if self.settings.centre:
            points = points - points.mean(dim=1, keepdim=True)
        if accuracies is not None:
            points = compensate(points, accuracies.to(points))
        return F.normalize(points, dim=1)

    def _relation(self, kind: Kind, y: Tensor, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """The contrast on one kind of image, averaged over each sample's anchors. -> (N,)."""
        u, v = student[kind], teacher[kind]
        # The pool is that of the joined batch; the anchors are this process's own.
        gather = self.processes.gather
        place = self.processes.index * len(u) + torch.arange(len(u), device=u.device)
        classes = gather(y).repeat(2) if self.settings.denominator == "other_classes" else None
        if self.settings.views == "student_teacher":
            pool = torch.cat([gather(u), gather(v)])
            there = place + len(pool) // 2
            if self.settings.sides == "one_sided":
                return self._anchored(v, pool, classes, place, there)
            positive, own = torch.cat([place, there]), torch.cat([there, place])
            both = self._anchored(torch.cat([v, u]), pool, classes, positive, own)
            return both.reshape(2, len(u)).mean(dim=0)
        pool = torch.cat([gather(student["nat"]), gather(student["adv"])])
        place = place + (0 if kind == "nat" else len(pool) // 2)
        found = self._anchored(v, pool, classes, place, None)
        if self.settings.sides == "one_sided":
            return found
        pool = torch.cat([gather(teacher["nat"]), gather(teacher["adv"])])
        return (found + self._anchored(u, pool, classes, place, None)) / 2

    def _anchored(
        self, anchors: Tensor, pool: Tensor, classes: Tensor | None, positive: Tensor, own: Tensor | None
    ) -> Tensor:
        """The contrast of `anchors` with `pool`, whose own class is left out where `classes` of the pool are given.

        `own` is where an anchor itself stands in the pool, if it does.
        """
        similarity = (anchors / self.settings.tau) @ pool.T
        if classes is not None:
            pairs = similarity.gather(1, positive[:, None])
            alike = classes[positive][:, None] == classes
            similarity = similarity.masked_fill(alike, -torch.inf).scatter(1, positive[:, None], pairs)
        return contrast(similarity, positive, own, with_positive=self.settings.denominator != "without_positive")


METHOD = CRDND
