"""SAAD: sample-wise adaptive adversarial distillation, Lee and Chung 2026 (TMLR, arXiv 2512.10275).

    x' = argmax_{x' in B(x, eps)}  KL(T~(x') || S(x'))      10 steps, start 0.001 N(0, 1), batch norm in eval mode
    min_S  w [KL(T(x') || S(x')) + alpha r KL(T(x') - T(x^) || S(x') - S(x^))] + beta (1 - w / max w) KL(T(x) || S(x))

    w = scale (H(T(x')) - min H(T(x'))),      r = how much of the run is done,      x^ = x - (x' - x)

    code             here                     code             here
    teacher_plus     v["t_adv"]               student_plus     v["s_adv"]
    teacher_minus    v["t_mirror"]            student_minus    v["s_mirror"]
    teacher_clean    v["t_nat"]               student_clean    v["s_nat"]
    entropy_scale    scale                    igdm_alpha       alpha

T~(x') is T(x) whose logit of y moves by its slope at x: the attack asks the teacher for one gradient in place of ten. H
is the entropy, and min and max run over the joined batch: a sample counts where the teacher is unsure of x', which is
where the student's x' moves the teacher too. Differences of predictions match input gradients (IGDM, arXiv 2312.03286).

Differs from its paper: the equations are those of the authors' code, in which "normalised" weights are (w - min w) /
(max w - min w), with min w = 0. Where all of a batch's weights are 0, they are 0. No gradient goes through weights. The
student looks at x even at beta 0, as in the code, so that its batch norm sees natural images. The code also averages
weights from epoch 95 of 200, which is a setting of the run.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from crdnd.losses import gradient_match, kl
from crdnd.objectives._base import LossTerms, Objective, ObjectiveSettings, TrainingAttack, Views


def entropy(logits: Tensor) -> Tensor:
    """H(softmax(logits)) in nats, 0 to log K. (B, K) -> (B,)."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


class Settings(ObjectiveSettings):
    """SAAD's settings."""

    scale: float = Field(default=5.0, gt=0, description="Weight of a sample for each nat of entropy above the least.")
    alpha: float = Field(
        default=1.0, ge=0, description="Weight of the matching of input gradients; 10 for 100 classes and more."
    )
    beta: float = Field(default=0.0, ge=0, description="Weight of the natural term, on what the rest leaves out.")


class SAAD(Objective):
    """Distillation that counts where the student's adversarial images make the teacher unsure."""

    paper = "Lee and Chung 2026, arXiv 2512.10275"
    needs = frozenset({"s_nat", "s_adv", "s_mirror", "t_nat", "t_adv", "t_mirror"})
    attack = TrainingAttack(loss="linear_teacher", start="gaussian", mode="eval")
    relates_samples = True
    repairable = False  # T(x') - T(x^) stands for its slope
    settings: Settings
    settings_class = Settings

    def terms(self, v: Views) -> LossTerms:
        """The weighted divergence on x', the weighted match of gradients, and the natural term."""
        unsure = entropy(v["t_adv"]).detach()
        in_batch = self.processes.gather(unsure)
        above, width = unsure - in_batch.min(), in_batch.max() - in_batch.min()
        weight, normalised = self.settings.scale * above, above / width.clamp(min=1e-8)
        match = gradient_match(v["t_adv"], v["t_mirror"], v["s_adv"], v["s_mirror"])
        return LossTerms(
            kl_adv=weight * kl(v["t_adv"], v["s_adv"]),
            match=self.settings.alpha * v.progress * weight * match,
            kl_nat=self.settings.beta * (1 - normalised) * kl(v["t_nat"], v["s_nat"]),
        )


METHOD = SAAD
