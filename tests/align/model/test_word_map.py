"""The closed-form map: equal to a textbook ridge regression, found again from texts alone, and never worse with more captions."""

import torch

from align.model.word_map import LEAST_JUDGED, Choice, Fitting, Moments, _factor

E, F, V = 6, 9, 12


def rows(n, seed, width=E):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said(n, seed, share=0.3):
    return rows(n, seed, V) > torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - share))


def test_moments_of_batches_are_those_of_the_whole():
    x, e = rows(50, 0) + 3, rows(50, 1, V) - 2
    moments = Moments(E, V)
    for start, stop in ((0, 7), (7, 30), (30, 50)):
        moments.add(x[start:stop], e[start:stop])
    gram, cross = moments.centered()
    torch.testing.assert_close(gram, (x - x.mean(0)).T @ (x - x.mean(0)))
    torch.testing.assert_close(cross, (x - x.mean(0)).T @ (e - e.mean(0)))
    assert moments.count == 50 and torch.allclose(moments.target_mean, e.mean(0))


def test_captions_alone_are_a_ridge_regression_on_standardized_words_with_a_penalty_for_each_block():
    x, r, words = rows(40, 0), rows(40, 1, F) * 5, said(40, 2)
    shares = words.double().mean(0)
    fitting = Fitting([E, F], torch.cat([x, r], 1).float(), words, shares)
    standard = (words.double() - shares) / words.double().std(0, correction=0)
    torch.testing.assert_close(fitting.targets(torch.arange(40)), standard)
    design = torch.cat([(x - x.mean(0)) / x.std(0, correction=0), (r - r.mean(0)) / r.std(0, correction=0)], 1)
    cross = fitting._cross(design, torch.arange(40))
    found = torch.cholesky_solve(cross, _factor(design.T @ design, Choice(0.0, (0.3, 2.0)), [E, F]))
    penalties = torch.cat([torch.full((E,), 0.3 * 40.0), torch.full((F,), 2.0 * 40.0)]).double()  # the mean diagonal is the number of rows
    stacked = torch.cat([design, penalties.sqrt().diag()])
    wanted = torch.linalg.lstsq(stacked, torch.cat([standard, torch.zeros(E + F, V, dtype=torch.float64)])).solution
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def world(texts, images, captions, seed=0):
    """Return a fitting in a world where words lie in directions of a shared space that images see moved, stretched and noisy; a judge."""
    directions, shared = rows(E, 9, V), rows(texts, seed)
    speak = lambda z: z @ directions > 2.0  # noqa: E731
    moments = Moments(E, V)
    moments.add(shared + 4.0, speak(shared))
    stretch = torch.tensor([1.8, 0.6, 1.0, 1.4, 0.5, 1.0], dtype=torch.float64)
    view = lambda z, s: torch.cat([z * stretch - 7.0 + 0.05 * rows(len(z), s), z @ rows(E, 8, F) + 0.05 * rows(len(z), s + 1, F)], 1)  # noqa: E731
    labelled, unlabelled, test = rows(captions, seed + 2), rows(images, seed + 1), rows(200, seed + 3)
    shares = (speak(labelled).sum(0) + speak(shared).sum(0)).double() / (captions + texts)
    fitting = Fitting([E, F], view(labelled, 20).float(), speak(labelled), shares, view(unlabelled, 30).float(), moments, seed=seed)

    def judge(solved):
        """Return the mean correlation of a word's scores with what it stands for."""
        scores, wanted = solved(list(view(test, 40).split([E, F], 1))), test @ directions
        return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(scores.T, wanted.T, strict=True)]).mean())

    return fitting, judge


def test_texts_alone_find_the_words_of_images():
    fitting, judge = world(texts=2000, images=300, captions=0)
    solved = fitting.solve()
    assert judge(solved) > 0.9, "images are not brought to where the texts are"
    assert solved.weights[1].abs().max() == 0, "nothing tells what the raw block means"
    unmoved, _ = world(texts=2000, images=300, captions=0)
    unmoved._coordinates = lambda seen: [torch.eye(E, dtype=torch.float64), torch.eye(F, dtype=torch.float64)]
    assert judge(unmoved.solve()) < judge(solved) - 0.02, "the spread of the two modalities is not matched"


def test_more_captions_do_not_make_it_worse():
    found = []
    for captions in (0, LEAST_JUDGED, 50, 200, 2000):
        fitting, judge = world(texts=500, images=300, captions=captions)
        found.append(judge(fitting.solve()))
    assert all(later >= earlier - 0.01 for earlier, later in zip(found, found[1:], strict=False)), found


def test_what_is_chosen_beats_the_default_by_more_than_the_noise():
    fitting, _ = world(texts=500, images=300, captions=300)
    seen = []
    judged = fitting._judged

    def spied(*arguments):
        seen.append(judged(*arguments))
        return seen[-1]

    fitting._judged = spied
    chosen = fitting.solve().choice
    assert chosen is seen[0] or chosen.beats(seen[0])
    assert len({choice.text_weight for choice in seen}) > 2 and 0 <= chosen.found <= 1
    noisy = Choice(0.0, (1.0,), torch.tensor([1.0, 0.5, 0.2, 1.0]))
    assert not Choice(1.0, (1.0,), torch.tensor([1.0, 1.0, 0.2, 0.9])).beats(noisy)
    assert Choice(1.0, (1.0,), torch.tensor([1.0, 0.8, 0.5, 1.0])).beats(noisy)


def test_equal_captions_are_no_competitors():
    fitting, _ = world(texts=500, images=300, captions=100)
    fitting.said = fitting.said[:4].repeat(25, 1)
    assert fitting.solve().choice.found > 0.1
