"""Runs columns of attacks over samples: survivors in full batches, one round after the other."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crdnd.attacks import PROBE, Classifier, Round, attack_stream, frozen, true_float32
from crdnd.data import ImageData
from crdnd.engine.memory import out_of_memory
from crdnd.errors import RunError, first_line
from crdnd.evaluation._plan import Column
from crdnd.evaluation._progress import Chunk, Progress

FELL, STANDS, NOT_RUN = 0, 1, -1

log = logging.getLogger("crdnd")


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
        batch_size: how many samples are attacked at once; fewer from where memory runs out.
        progress: what was found before, and where to keep what is found now.
        keep_adversarial: whether to keep the images that fooled the model.
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
        listener: Listener | None = None,
    ) -> None:
        self.model, self.data, self.ids, self.num_classes = model, data, ids, num_classes
        self.seed, self.batch_size, self.progress = seed, batch_size, progress
        self.keep_adversarial, self.listener = keep_adversarial, listener
        self.verdicts: dict[str, Tensor] = {}
        """For 'clean', every column and every part of one: int8 (N,), FELL, STANDS or NOT_RUN."""

    def clean(self) -> Tensor:
        """Natural predictions: which of this process's samples are right, as ids."""
        with true_float32(), frozen(self.model, self._probe()) as plain:

            def right(ids: Tensor) -> Chunk:
                x, y = self.data.batch(ids)
                return Chunk("clean", ids.cpu(), (plain(x).argmax(1) == y).cpu())

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
                goes_on = number < len(rounds) and rounds[number].go_on is not None
                before, step = standing, _step(column, part)
                attacked = self._attacked(column, part, plain, goes_on=goes_on)
                standing = self._round(column.name, part.attack, step, number, len(rounds), before, attacked)
                if part.go_on is not None:
                    self.progress.forget(_step(column, rounds[number - 2]), self.ids)
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

    def _attacked(self, column: Column, part: Round, plain: Classifier, *, goes_on: bool) -> Callable[[Tensor], Chunk]:
        """One batch under one round; `goes_on` says whether the next one begins where this one leaves the samples."""
        step, before = _step(column, part), _step(column, part, block=part.block - 1)

        def look(ids: Tensor) -> Chunk:
            x, y = self.data.batch(ids)
            task = (self.model, x, y, column.threat, attack_stream(self.seed, ids).child(part.attack, part.index))
            last = self.progress.left(before, ids) if part.go_on else None
            x_adv = part.search(*task) if part.go_on is None or last is None else part.go_on(*task, last)
            if not bool(column.threat.allows(x_adv, x).all()):
                raise RunError(f"{part.attack}: made an image outside {column.threat}; this is an error of the attack.")
            # The model as it is has the last word, whatever helped to compute the attack.
            stands = plain(x_adv).argmax(1) == y
            return Chunk(
                step, ids.cpu(), stands.cpu(),
                x_adv[~stands] if self.keep_adversarial else None, x_adv[stands].cpu() if goes_on else None,
            )  # fmt: skip

        return look

    def _round(
        self,
        column: str,
        name: str,
        step: str,
        number: int,
        rounds: int,
        ids: Tensor,
        look: Callable[[Tensor], Chunk],
    ) -> Tensor:
        """One round on these samples, without those that it saw before a kill; returns the ids of what stands."""
        known = self._known(step)
        todo = ids[known[ids] == NOT_RUN]
        while len(todo):
            chunk = self._within_memory(look, todo)
            batch, todo = todo.tensor_split([len(chunk.ids)])
            self.progress.add(chunk)
            known[batch] = chunk.stands.to(known)
            if self.listener:
                done = int((known[ids] != NOT_RUN).sum())
                self.listener(Step(column, name, number, rounds, done, len(ids)))
        return ids[known[ids] == STANDS]

    def _within_memory(self, look: Callable[[Tensor], Chunk], ids: Tensor) -> Chunk:
        """The first batch of these samples; where it needs more memory than there is, batches are smaller from here."""
        while True:
            batch = ids[: self.batch_size]
            try:
                return look(batch)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or len(batch) == 1:
                    raise
                why = first_line(error)
            # Here and not above, where the error still holds the tensors of the attack.
            if batch.device.type == "cuda":
                torch.cuda.empty_cache()
            self.batch_size = len(batch) // 2
            log.warning("out of memory: %s; going on with %d images at once", why, self.batch_size)

    def _known(self, step: str) -> Tensor:
        known = self._unknown()
        for chunk in self.progress.found.get(step, []):
            known[chunk.ids.to(known.device)] = chunk.stands.to(known.device, torch.int8)
        return known

    def _unknown(self) -> Tensor:
        return torch.full((len(self.data),), NOT_RUN, dtype=torch.int8, device=self.data.device)

    def _probe(self) -> Tensor:
        return self.data.batch(torch.arange(min(PROBE, len(self.data)), device=self.data.device))[0]


def _step(column: Column, part: Round, block: int | None = None) -> str:
    """What a round is called in a work folder."""
    block = part.block if block is None else block
    return f"{column.name}/{part.attack}/{part.index}" + (f"/{block}" if block > 0 else "")
