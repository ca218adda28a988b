"""Random generators as pure functions of whole numbers: seed, purpose, step, rank. No global generator is used."""

import numpy as np


def generator(*seeds: int) -> np.random.Generator:
    """Return an independent random generator that is a pure function of the given whole numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([len(seeds), *(seed & 0xFFFFFFFF for seed in seeds)])))
