"""MART: misclassification-aware adversarial training, Wang et al. 2020 (ICLR, openreview.net/forum?id=rklOg6EFwS).

    x' = argmax_{x' in B(x, eps)}  CE(S(x'), y)      10 steps, start 0.001 N(0, 1), batch norm in eval mode
    min_S  BCE(S(x'), y) + beta (1 - p_y(x)) KL(p(x) || p(x'))

    BCE(S(x'), y) = CE(S(x'), y) - log(1 - max_{j != y} p_j(x')),      p = softmax(S)

    paper           here             paper        here
    h(x)            v["s_nat"]       lambda       beta
    h(x')           v["s_adv"]

The boosted cross-entropy also pushes the strongest wrong class down; the divergence counts where the natural prediction
is not sure of the label. Nothing is detached: gradients reach the student through p(x) in both of its places.

Differs from its paper: nothing in the loss, which stands in log space. The authors' code keeps its logarithms finite by
adding 1e-4 to 1e-12 to the probabilities; here log(1 - p_j) is exact, the log-sum-exp over the other classes minus that
over all. Where augmentation mixes labels, the cross-entropy compares with the mixed ones, everything else with y.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from crdnd.losses import cross_entropy, kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, TrainingAttack, Views


def against_rival(logits: Tensor, y: Tensor) -> Tensor:
    """-log(1 - max_{j != y} p_j), in log space. (B, K), (B,) -> (B,)."""
    rival = logits.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    others = logits.scatter(1, rival, -torch.inf)
    return logits.logsumexp(1) - others.logsumexp(1)


class Settings(ObjectiveSettings):
    """MART's settings."""

    beta: float = Field(
        default=5.0,
        ge=0,
        description="Weight of the divergence, lambda in the paper: 5 for its ResNet-18, 6 for its WideResNet.",
    )


class MART(Objective):
    """Boosted cross-entropy under attack, and stability where the natural prediction is unsure of the label."""

    paper = "Wang et al. 2020, ICLR"
    needs = frozenset({"s_nat", "s_adv"})
    attack = TrainingAttack(loss="ce", start="gaussian", mode="eval")
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """The two halves of BCE(S(x'), y), and beta (1 - p_y(x)) KL(p(x) || p(x'))."""
        unsure = 1 - F.softmax(v["s_nat"], dim=1).gather(1, v.y[:, None])[:, 0]
        return LossTerms(
            ce_adv=cross_entropy(v["s_adv"], v.target),
            rival_adv=against_rival(v["s_adv"], v.y),
            kl_adv=self.settings.beta * unsure * kl(v["s_nat"], v["s_adv"]),
        )


METHOD = MART
