import numpy as np
import pytest

from w2v2.errors import UserError
from w2v2.evaluate.verification import Trial, cosine_scores, draw_trials, read_trials, write_trials

SPEAKERS = {f"{speaker}{take}": speaker for speaker in "abcd" for take in range(5)}


def test_a_list_is_read_as_it_was_written(tmp_path):
    trials = [Trial(1, "a/1.wav", "a/2.wav"), Trial(0, "a/1.wav", "b/1.wav")]
    write_trials(tmp_path / "trials.txt", trials)
    assert (tmp_path / "trials.txt").read_text() == "1 a/1.wav a/2.wav\n0 a/1.wav b/1.wav\n"
    assert read_trials(tmp_path / "trials.txt") == trials


@pytest.mark.parametrize(("text", "message"), [("1 a b\n2 a c\n", "line 2"), ("1 a b\n\n0 a\n", "line 3"),
                                              ("1 a b\n", "needs pairs"), ("", "needs pairs")])  # fmt: skip
def test_what_is_no_list_of_trials_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "trials.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_trials(tmp_path / "trials.txt")
    with pytest.raises(UserError, match="absent.txt: cannot be read"):
        read_trials(tmp_path / "absent.txt")


def test_drawn_trials_are_true_and_never_twice():
    trials = draw_trials(SPEAKERS, 60, seed=1)
    assert sum(trial.target for trial in trials) == 30 and len(trials) == 60
    assert all(trial.target == (SPEAKERS[trial.first] == SPEAKERS[trial.second]) for trial in trials)
    assert len({frozenset((trial.first, trial.second)) for trial in trials}) == 60
    assert all(trial.first != trial.second for trial in trials)
    assert draw_trials(SPEAKERS, 60, seed=1) == trials != draw_trials(SPEAKERS, 60, seed=2)
    every = draw_trials(SPEAKERS, 10_000)  # all pairs that there are
    assert [sum(trial.target == kind for trial in every) for kind in (1, 0)] == [4 * 10, 6 * 25]


@pytest.mark.parametrize("speakers", [{"a": "x", "b": "y"}, {"a": "x", "b": "x"}, {"a": "", "b": ""}])
def test_utterances_without_both_kinds_of_pairs_are_refused(speakers):
    with pytest.raises(UserError, match="no pair of"):
        draw_trials(speakers, 10)


def test_scores_are_cosines():
    vectors = {"a": np.array([3.0, 0.0]), "b": np.array([5.0, 5.0]), "c": np.array([-1.0, 0.0])}
    scores = cosine_scores([Trial(1, "a", "b"), Trial(0, "a", "c")], vectors)
    np.testing.assert_allclose(scores, [2**-0.5, -1.0])
