"""Runs columns of attacks over samples: survivors in full batches, one round after the other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crdnd.attacks import Classifier, Round, attack_stream, frozen, true_float32
from crdnd.data import ImageData
from crdnd.engine.signals import StopRequest
from crdnd.errors import Interrupted, RunError
from crdnd.evaluation._plan import Column
from crdnd.evaluation._progress import Chunk, Progress

PROBE = 8
"""Images on which the faster computation must agree with the plain one."""

FELL, STANDS, NOT_RUN = 0, 1, -1


@dataclass(frozen=True)
class Step:
    """How far an evaluation is; what a listener is told after every batch."""

    column: str
    attack: str
    """The column's own, or the part of it that is running."""
    number: int
    """Which round of the column, from 1."""
    rounds: int
    done: int
    """Samples that this round has attacked."""
    samples: int
    """Samples that it attacks in all."""


Listener = Callable[[Step], None]


class Runner:
    """Verdicts of one model on some samples, under whatever is asked for.

    Args:
        model: images in [0, 1] -> logits.
        data: all samples, on the model's device.
        ids: which of them this process attacks, int64.
        num_classes: of the model's logits.
        seed: of the attacks' draws.
        batch_size: how many samples are attacked at once.
        progress: what was found before, and where to keep what is found now.
        keep_adversarial: whether to keep the images that fooled the model.
        request: set when a signal asks to stop.
        listener: told how far it is.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        ids: Tensor,
        *,
        num_classes: int,
        seed: int,
        batch_size: int,
        progress: Progress,
        keep_adversarial: bool = False,
        request: StopRequest | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.model, self.data, self.ids, self.num_classes = model, data, ids, num_classes
        self.seed, self.batch_size, self.progress = seed, batch_size, progress
        self.keep_adversarial, self.request, self.listener = keep_adversarial, request, listener
        self.verdicts: dict[str, Tensor] = {}
        """For 'clean', every column and every part of one: int8 (N,), FELL, STANDS or NOT_RUN."""

    def clean(self) -> Tensor:
        """Natural predictions: which of this process's samples are right, as ids."""
        with true_float32(), frozen(self.model, self._probe()) as plain:

            def right(ids: Tensor) -> tuple[Tensor, None]:
                x, y = self.data.batch(ids)
                return plain(x).argmax(1) == y, None

            standing = self._round("clean", "clean", "clean", 1, 1, self.ids, right)
        self.verdicts["clean"] = self._unknown()
        self.verdicts["clean"][self.ids] = FELL
        self.verdicts["clean"][standing] = STANDS
        return standing

    def run(self, column: Column, start: Tensor | None = None) -> Tensor:
        """Attack; returns the ids of what stands. `start` are ids instead of what `column.after` leaves standing."""
        standing = self.standing(column.after) if start is None else start
        if column.name in self.verdicts:
            return standing[self.verdicts[column.name][standing] == STANDS]
        rounds = column.attack.rounds(self.num_classes)
        total = self._unknown()
        total[standing] = STANDS
        with true_float32(), frozen(self.model, self._probe()) as plain:
            for number, part in enumerate(rounds, 1):
                step = f"{column.name}/{part.attack}/{part.index}"
                before = standing
                standing = self._round(
                    column.name, part.attack, step, number, len(rounds), before, self._attacked(column, part, plain)
                )
                for verdicts in [total, *self._of_part(column, part)]:
                    verdicts[before] = FELL
                    verdicts[standing] = STANDS
        self.verdicts[column.name] = total
        return standing

    def _of_part(self, column: Column, part: Round) -> list[Tensor]:
        """Where the verdicts of an attack's part are kept, such as 'autoattack/square'."""
        if part.attack == column.attack.name:
            return []
        return [self.verdicts.setdefault(f"{column.name}/{part.attack}", self._unknown())]

    def standing(self, names: tuple[str, ...]) -> Tensor:
        """Ids of this process's samples that are right under all of these."""
        stands = torch.ones(len(self.ids), dtype=torch.bool, device=self.ids.device)
        for name in names:
            stands &= self.verdicts[name][self.ids] == STANDS
        return self.ids[stands]

    def _attacked(
        self, column: Column, part: Round, plain: Classifier
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        def look(ids: Tensor) -> tuple[Tensor, Tensor | None]:
            x, y = self.data.batch(ids)
            stream = attack_stream(self.seed, ids).child(part.attack, part.index)
            x_adv = part.search(self.model, x, y, column.threat, stream)
            if not bool(column.threat.allows(x_adv, x).all()):
                raise RunError(f"{part.attack}: made an image outside {column.threat}; this is an error of the attack.")
            # The model as it is has the last word, whatever helped to compute the attack.
            stands = plain(x_adv).argmax(1) == y
            return stands, x_adv[~stands] if self.keep_adversarial else None

        return look

    def _round(
        self,
        column: str,
        name: str,
        step: str,
        number: int,
        rounds: int,
        ids: Tensor,
        look: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        """One round on these samples, without those that it saw before a kill; returns the ids of what stands."""
        known = self._known(step)
        todo = ids[known[ids] == NOT_RUN]
        for batch in todo.split(self.batch_size) if len(todo) else ():
            stands, images = look(batch)
            self.progress.add(Chunk(step, batch.cpu(), stands.cpu(), images))
            known[batch] = stands.to(torch.int8)
            if self.listener:
                done = int((known[ids] != NOT_RUN).sum())
                self.listener(Step(column, name, number, rounds, done, len(ids)))
            if self.request is not None and self.request.exit_code is not None:
                raise Interrupted("", self.request.exit_code)
        return ids[known[ids] == STANDS]

    def _known(self, step: str) -> Tensor:
        known = self._unknown()
        for chunk in self.progress.found.get(step, []):
            known[chunk.ids.to(known.device)] = chunk.stands.to(known.device, torch.int8)
        return known

    def _unknown(self) -> Tensor:
        return torch.full((len(self.data),), NOT_RUN, dtype=torch.int8, device=self.data.x.device)

    def _probe(self) -> Tensor:
        return self.data.batch(torch.arange(min(PROBE, len(self.data)), device=self.data.x.device))[0]
