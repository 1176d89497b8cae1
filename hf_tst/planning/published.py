"""What the paper published of its runs. Its numbers only; nothing here is computed or extended."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2605.06546"


@dataclass(frozen=True)
class PublishedRun:
    """A TST run of the paper, and the baselines it is compared with.

    Args:
        name (`str`): The model, as the paper calls it.
        hidden_size, layers (`int`): What tells the model; of 10B-A1B the recipe's, as the paper gives none.
        steps (`int`): Optimizer steps of the TST run, N.
        tokens_per_step (`int`): Latent tokens a step.
        bag_size (`int`), phase_ratio (`float`): s and r.
        loss (`float`): Final loss with TST.
        baseline_loss (`float`, *optional*): Final loss of a baseline of as many steps.
        equal_loss_steps (`int`, *optional*): Steps of a baseline of about the TST run's loss.
        equal_loss (`float`, *optional*): The loss of that baseline.
        gpu_hours, equal_loss_gpu_hours (`float`, *optional*): B200-hours of the TST run and of that baseline.
    """

    name: str
    hidden_size: int
    layers: int
    steps: int
    tokens_per_step: int
    bag_size: int
    phase_ratio: float
    loss: float
    baseline_loss: float | None = None
    equal_loss_steps: int | None = None
    equal_loss: float | None = None
    gpu_hours: float | None = None
    equal_loss_gpu_hours: float | None = None


PUBLISHED = (
    # The baseline reaches 3.142 with 105B instead of 42B tokens, which is 50 000 steps of 2 097 152.
    PublishedRun("270M", 576, 30, 20_000, 2**21, 6, 0.3, 3.142, 3.212, 50_000, 3.142),
    PublishedRun("270M", 576, 30, 100_000, 2**21, 6, 0.3, 3.048, 3.092),
    PublishedRun("600M", 960, 32, 20_000, 2**21, 6, 0.3, 2.943, 3.019),
    PublishedRun("3B", 2048, 36, 20_000, 2**21, 6, 0.3, 2.676, 2.808, 36_000, 2.677),
    PublishedRun("10B-A1B", 1536, 30, 49_983, 2**23, 16, 0.24975, 2.236, None, 125_000, 2.252, 4768, 12_311),
)


def find_published(vocab_size: int, **settings: float) -> PublishedRun | None:
    """The published run of exactly these `settings`, the fields of [`PublishedRun`] that tell runs apart; else `None`."""
    matching = (
        run for run in PUBLISHED if all(getattr(run, name) == value for name, value in settings.items())
    )
    return next(matching, None) if vocab_size == 128_256 else None
