"""Randomness is a pure function of seeds."""

from align.common.seeds import generator


def test_random_generators_are_pure_functions_of_their_seeds():
    assert generator(1, 2, 3).random() == generator(1, 2, 3).random()
    assert len({generator(*seeds).random() for seeds in ((1, 2), (2, 1), (1, 2, 0), (-1, 2))}) == 4
