"""The closed-form map: equal to a textbook ridge regression, found again from texts alone, and never worse with more captions."""

import torch

from mllm.assembly.solve import LEAST_JUDGED, Choice, Fitting, Moments

E, F, H = 6, 9, 5


def rows(n, seed, width=E):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_of_batches_are_those_of_the_whole():
    x, e = rows(50, 0) + 3, rows(50, 1, H) - 2
    moments = Moments(E, H)
    for start in (0, 7, 30):
        moments.add(x[start : {0: 7, 7: 30, 30: 50}[start]], e[start : {0: 7, 7: 30, 30: 50}[start]])
    gram, cross = moments.centered()
    torch.testing.assert_close(gram, (x - x.mean(0)).T @ (x - x.mean(0)))
    torch.testing.assert_close(cross, (x - x.mean(0)).T @ (e - e.mean(0)))
    assert moments.count == 50 and torch.allclose(moments.target_mean, e.mean(0))


def test_captions_alone_are_a_ridge_regression_with_a_penalty_for_each_block():
    x, r, e = rows(40, 0), rows(40, 1, F) * 5, rows(40, 2, H)
    choice = Choice(0.0, (0.3, 2.0))
    fitting = Fitting([E, F], torch.cat([x, r], 1).float(), e.float())
    blocks = [(x - x.mean(0)) / x.std(0, correction=0), (r - r.mean(0)) / r.std(0, correction=0)]
    design = torch.cat(blocks, 1)
    found = fitting._ridge(design.T @ design, design.T @ (e - e.mean(0)), choice)
    penalties = torch.cat([torch.full((E,), 0.3 * 40.0), torch.full((F,), 2.0 * 40.0)]).double()  # the mean diagonal is the number of rows
    stacked = torch.cat([design, penalties.sqrt().diag()])
    wanted = torch.linalg.lstsq(stacked, torch.cat([e - e.mean(0), torch.zeros(E + F, H, dtype=torch.float64)])).solution
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def world(texts, images, captions, seed=0):
    """Return a fitting in a world where words are linear in a shared space that images see moved, stretched and noisy; and a judge."""
    shared, truth = rows(texts, seed), rows(E, 9, H)
    moments = Moments(E, H)
    moments.add(shared + 4.0, shared @ truth)
    stretch = torch.tensor([1.8, 0.6, 1.0, 1.4, 0.5, 1.0], dtype=torch.float64)
    seen = rows(images, seed + 1)
    view = lambda z, s: torch.cat([z * stretch - 7.0 + 0.05 * rows(len(z), s), z @ rows(E, 8, F) + 0.05 * rows(len(z), s + 1, F)], 1)  # noqa: E731
    labelled = rows(captions, seed + 2)
    fitting = Fitting([E, F], view(labelled, 20).float(), (labelled @ truth).float(), view(seen, 30).float(), moments, seed=seed)
    test = rows(60, seed + 3)

    def judge(solved):
        predicted = solved(list(view(test, 40).split([E, F], 1))) - solved.offset
        scores = torch.nn.functional.normalize(predicted, dim=1) @ torch.nn.functional.normalize(test @ truth, dim=1).T
        return float((scores.argmax(1) == torch.arange(len(test))).double().mean())

    return fitting, judge


def test_texts_alone_find_the_words_of_images():
    fitting, judge = world(texts=500, images=300, captions=0)
    solved = fitting.solve()
    assert judge(solved) > 0.6, "images are not brought to where the texts are"
    assert solved.weights[1].abs().max() == 0, "nothing tells what the raw block means"
    unmoved = Fitting([E, F], fitting.images, fitting.targets, fitting.unlabelled, None)
    unmoved.texts = fitting.texts
    unmoved._coordinates = lambda seen: [torch.eye(E, dtype=torch.float64), torch.eye(F, dtype=torch.float64)]
    assert judge(unmoved.solve()) < judge(solved), "the spread of the two modalities is not matched"


def test_more_captions_do_not_make_it_worse():
    found = []
    for captions in (0, LEAST_JUDGED, 100, 400):
        fitting, judge = world(texts=500, images=300, captions=captions)
        found.append(judge(fitting.solve()))
    assert all(later >= earlier - 0.03 for earlier, later in zip(found, found[1:], strict=False)) and found[-1] > found[0], found


def test_what_is_chosen_is_the_best_of_what_was_tried():
    fitting, _ = world(texts=500, images=300, captions=100)
    seen = []
    judged = fitting._judged

    def spied(choice, folds, targets):
        seen.append(judged(choice, folds, targets))
        return seen[-1]

    fitting._judged = spied
    chosen = fitting.solve().choice
    assert chosen.rank == max(choice.rank for choice in seen) and len({choice.text_weight for choice in seen}) > 2
    assert chosen.rank > 0 and 0 <= chosen.found <= 1


def test_equal_captions_are_no_competitors():
    fitting, _ = world(texts=500, images=300, captions=100)
    fitting.targets = fitting.targets[:1].expand(100, H).clone() + torch.arange(100)[:, None].div(25, rounding_mode="floor")
    assert fitting.solve().choice.found > 0.1
