"""Questions about scenes: answers true to the geometry, names and relations balanced, and no turn that gives a later one away."""

import itertools
import re
from collections import Counter, defaultdict

import pytest

from align.demo.absence import surely_absent
from align.demo.questions import DESCRIBE, Shown, conversations, is_one_thing, single_questions
from align.demo.scenes import Sprite, SpriteScenes
from tests.support.synthetic_sprites import make_sprites

AXIS = {"left of": 0, "right of": 0, "above": 1, "below": 1}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    made = SpriteScenes(make_sprites(tmp_path_factory.mktemp("sprites") / "folder"), seed=3, size=96)
    return [made.scene(index) for index in range(600)]


@pytest.fixture(scope="module")
def shown(scenes):
    return [Shown.of(scene) for scene in scenes]


@pytest.fixture(scope="module")
def trained(shown):
    return conversations(shown, seed=0)


@pytest.fixture(scope="module")
def tested(shown):
    return single_questions(shown, seed=0)


@pytest.fixture(params=["trained", "tested"])
def rows(request):
    return request.getfixturevalue(request.param)


def of_kind(rows, kind):
    return [question for asked in rows for question in asked if question.kind == kind]


def named(question, sprites):
    """The sprite names in a text, in order; longer names first, so that "ice lolly" is not cut."""
    names = sorted({re.escape(sprite.name) for sprite in sprites}, key=len, reverse=True)
    return re.findall(rf"\b({'|'.join(names)})\b", question)


def lies(one, other, word):
    """The meaning of a relation word, written down a second time: on the right side, and mostly along that axis."""
    axis = AXIS[word]
    middle = [[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] for box in (one, other)]
    along, across = (middle[1][k] - middle[0][k] for k in (axis, 1 - axis))
    return (along if word in ("left of", "above") else -along) > abs(across)


def place(box, size):
    """The words that must be in a place, by the center of the box in a picture cut in three both ways; None near a line."""
    words = []
    for center, low, high in (((box[0] + box[2]) / 2, "left", "right"), ((box[1] + box[3]) / 2, "top", "bottom")):
        words += [low] if center < 0.4 * size else [high] if center > 0.6 * size else []
    return words


def test_every_answer_is_true(scenes, rows):
    sprites = {placed.sprite for scene in scenes for placed in scene.objects}
    for scene, asked in zip(scenes, rows, strict=True):
        boxes = {placed.sprite.name: placed.box for placed in scene.objects}
        for question in asked:
            mentioned = named(question.question, sprites)
            if question.kind == "exists":
                assert (mentioned[0] in boxes) == (question.answer == "yes")
            elif question.kind == "relation":
                [word] = [word for word in AXIS if word in question.question]
                assert lies(boxes[mentioned[0]], boxes[mentioned[1]], word) == (question.answer == "yes")
                assert question.answer == "yes" or lies(boxes[mentioned[1]], boxes[mentioned[0]], word)
            elif question.kind == "what" and mentioned:
                [word] = [word for word in AXIS if word in question.question]
                assert len(boxes) == 2 and lies(boxes[question.answer], boxes[mentioned[0]], word)
            elif question.kind == "what":
                assert question.question == "What is it?" and list(boxes) == [question.answer]
            elif question.kind == "where":
                assert all(word in question.answer for word in place(boxes[mentioned[0]], 96)), (question, boxes)
                assert question.answer == "in the center" or place(boxes[mentioned[0]], 96)
            elif question.kind == "count":
                assert int(question.answer) == len(boxes)
                assert not {placed.sprite.group for placed in scene.objects} & {"person", "place"} and "cup and spoon" not in boxes
            else:
                assert (question.kind, question.question, question.answer) == ("caption", DESCRIBE, scene.short)
            assert set(mentioned) & set(boxes) <= question.names <= set(boxes)
    assert {question.kind for asked in rows for question in asked} == {"exists", "relation", "what", "where", "count", "caption"}


def test_a_name_is_asked_about_as_often_when_it_is_absent(rows):
    by_name = defaultdict(Counter)
    for question in of_kind(rows, "exists"):
        by_name[question.question][question.answer] += 1
    assert len(by_name) >= 8 and sum(sum(answers.values()) for answers in by_name.values()) > 300
    assert all(answers["yes"] == answers["no"] for answers in by_name.values())


def test_a_relation_is_as_often_true_as_false(rows):
    by_word = defaultdict(Counter)
    for question in of_kind(rows, "relation"):
        by_word[next(word for word in AXIS if word in question.question)][question.answer] += 1
    assert set(by_word) == set(AXIS) and all(answers["yes"] == answers["no"] > 5 for answers in by_word.values())


@pytest.mark.parametrize(("kind", "answers", "share"), [("where", 9, 0.2), ("count", 4, 0.34)])
def test_no_answer_is_a_good_guess(rows, kind, answers, share):
    counts = Counter(question.answer for question in of_kind(rows, kind))
    assert len(counts) == answers
    assert max(counts.values()) <= share * counts.total() + 1
    assert max(counts.values()) <= sorted(counts.values())[(answers - 1) // 2], "more often than the median answer"


def test_absent_sprites_can_be_of_a_kind_that_is_there_but_no_person_or_view(scenes, rows):
    groups = {placed.sprite.name: placed.sprite.group for scene in scenes for placed in scene.objects}
    near = 0
    for scene, asked in zip(scenes, rows, strict=True):
        there = {placed.sprite.group for placed in scene.objects}
        for question in asked:
            if question.kind == "exists" and question.answer == "no":
                name = re.match(r"Is there an? (.*)\?$", question.question)[1]
                near += groups[name] in there
                assert name not in {placed.sprite.name for placed in scene.objects} and name != "bell"
                assert not ("place" in there and groups[name] not in {"food", "animal"})
                assert groups[name] not in {"person", "place"} or not there & {"object", "person", "place"}
    assert near > 0.2 * len(of_kind(rows, "exists")) / 2, "the kind alone would tell"


def test_no_turn_tells_the_answer_of_a_later_one(scenes, trained):
    for scene, asked in zip(scenes, trained, strict=True):
        known, kinds = set(), []
        for question in asked:
            if question.kind == "exists":
                assert not question.names & known and not {"what", "where", "relation"} & set(kinds) - {"where"}
            elif question.kind == "what":
                assert question.answer not in known and "relation" not in kinds
            elif question.kind == "relation":
                assert not {"what", "where", "relation"} & set(kinds)
            elif question.kind == "where":
                assert "relation" not in kinds and (len(scene.objects) != 2 or not {"what", "where"} & set(kinds))
            elif question.kind == "count":
                assert not {"what", "relation", "exists"} & set(kinds)
            known |= question.names
            kinds.append(question.kind)
        assert kinds.count("caption") <= 1 and "caption" not in kinds[:-1]
        answers = [question.answer for question in asked if question.kind == "exists"]
        assert len(answers) <= 4 and answers.count("yes") <= len(scene.objects)
        assert answers.count("yes") < len(scene.objects) or answers[-1] == "yes", "after all are named, it would have to be a no"
        assert len({question.question for question in asked}) == len(asked)


def test_what_came_before_says_nothing_about_existence(trained):
    after = defaultdict(Counter)
    for asked in trained:
        before = ()
        for question in asked:
            if question.kind == "exists":
                after[before][question.answer] += 1
            before = (*before, question.answer if question.kind == "exists" else question.kind)
    often = {before: answers for before, answers in after.items() if answers.total() >= 60}
    assert len(often) >= 4
    for before, answers in often.items():  # four standard deviations of a fair coin
        assert abs(answers["yes"] / answers.total() - 0.5) < 2 / answers.total() ** 0.5, before


def test_a_conversation_has_many_turns_in_many_orders(trained):
    assert {"exists", "what", "where", "count"} <= {asked[0].kind for asked in trained}
    captions = sum(asked[-1].kind == "caption" for asked in trained)
    assert len(trained) / 8 <= captions <= len(trained) / 6, "every eighth, and where nothing else could be asked"
    assert len({tuple(question.kind for question in asked) for asked in trained}) > 30
    turns = sorted(map(len, trained))
    assert 3 < sum(turns) / len(turns) < 6 and turns[len(turns) // 2] >= 3
    existence = [sum(question.kind == "exists" for question in asked) for asked in trained]
    assert max(existence) == 4 and sum(existence) / len(existence) > 2


def test_the_same_scenes_and_seed_give_the_same_questions(shown, trained, tested):
    assert conversations(shown, seed=0) == trained and single_questions(shown, seed=0) == tested
    assert conversations(shown, seed=1) != trained and single_questions(shown, seed=1) != tested


def test_test_scenes_are_paired_about_their_own_sprites(tested):
    asked = [[question for question in questions if question.kind == "exists"] for questions in tested]
    assert Counter(map(len, asked)).keys() == {0, 2}
    yes = Counter(question.question for pair in asked for question in pair if question.answer == "yes")
    assert yes == Counter(question.question for pair in asked for question in pair if question.answer == "no")


def test_few_scenes_give_few_questions(shown):
    for count in (0, 1, 2, 3):
        assert all(asked for asked in conversations(shown[:count], 0))
        assert [asked[-1].kind for asked in single_questions(shown[:count], 0)] == ["caption"] * count
        for made in (conversations(shown[:count], 0), single_questions(shown[:count], 0)):
            answers = Counter(question.answer for question in of_kind(made, "exists"))
            assert answers["yes"] == answers["no"]


def test_what_could_be_taken_for_a_sprite_is_not_called_absent():
    kinds = {"animal": "dog fish lion wolf", "vehicle": "car taxi bicycle motorcycle", "object": "hammer axe wheel", "face": "ghost robot"}
    made = {name: Sprite(name, "", group, name) for group, names in kinds.items() for name in names.split()}
    made |= {"hot dog": Sprite("hot dog", "", "food", "hot dog"), "cyclist": Sprite("p", "", "person", "cyclist")}
    made |= {"red heart": Sprite("s", "", "shape", "red heart"), "city": Sprite("c", "", "place", "city")}

    def absent(name, *there):
        return surely_absent(made[name], [made[other] for other in there])

    assert absent("dog", "car") and absent("car", "dog", "hammer") and absent("hot dog", "cyclist") and absent("hammer", "dog")
    assert absent("lion", "dog") and absent("bicycle", "car"), "the same kind, but nobody mixes them up"
    assert not absent("hot dog", "dog"), "a shared word"
    assert not absent("dog", "wolf") and not absent("taxi", "car") and not absent("hammer", "axe"), "look-alikes"
    assert not absent("ghost", "robot"), "faces are all alike"
    assert (
        not absent("bicycle", "cyclist") and not absent("car", "city") and not absent("hammer", "city") and not absent("hammer", "cyclist")
    ), "rides, shows, holds"
    assert not absent("fish", "car") and not absent("wheel", "dog") and not absent("red heart", "dog"), "drawn into other sprites"
    assert not absent("dog", "car", "wolf") and not absent("dog", "dog")


def test_only_single_things_are_counted():
    made = [Sprite(name, "", group, name) for name, group in itertools.product(["bell", "cup and spoon", "sun behind a cloud"], ["object"])]
    assert [is_one_thing(sprite) for sprite in made] == [True, False, False]
    assert not is_one_thing(Sprite("x", "", "person", "juggler"))
