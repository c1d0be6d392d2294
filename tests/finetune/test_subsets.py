"""Few labels: draws that nest, share evenly and do not depend on the order of rows; lists in the forms that exist."""

import numpy as np
import pytest
from conftest import tiny_config
from datasets import Dataset

from w2v2.errors import UserError
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.subsets import draw_hours, select_training, take_listed
from w2v2.finetune.text import CTCArguments


def corpus(num=300, speakers=12, seed=0):
    random = np.random.default_rng(seed)
    names = random.integers(0, speakers, num)
    return Dataset.from_list([
        {"id": f"{s}-{i}", "audio": f"/audio/{s}/{s}-{i}.flac", "num_samples": int(random.integers(16_000, 400_000)), "speaker": f"s{s}"}
        for i, s in enumerate(names)
    ])  # fmt: skip


@pytest.mark.parametrize("without", [[], ["speaker"]])
def test_draws_nest_within_one_utterance_of_the_hours(without):
    table, longest = corpus().remove_columns(without), 400_000 / 16_000 / 3600
    drawn = [draw_hours(table, wanted, seed=1) for wanted in (0.05, 0.2, 0.6)]
    for found, wanted in zip(drawn, (0.05, 0.2, 0.6), strict=True):
        assert wanted - longest < sum(found["num_samples"]) / 16_000 / 3600 <= wanted
    small, middle, large = (set(found["id"]) for found in drawn)
    assert small < middle < large
    assert set(draw_hours(table, 0.2, seed=2)["id"]) != middle


def test_the_order_of_rows_does_not_matter_and_is_kept():
    table = corpus()
    turned = table.select(range(len(table) - 1, -1, -1))
    assert draw_hours(table, 0.2, seed=3)["id"][:] == draw_hours(turned, 0.2, seed=3)["id"][::-1]


def test_speakers_share_evenly():
    drawn = draw_hours(corpus(), 0.4, seed=4).to_pandas()
    seconds = drawn.groupby("speaker")["num_samples"].sum() / 16_000
    assert len(seconds) == 12 and np.ptp(seconds) <= 2 * 25  # an utterance has up to 25 s


def test_training_leaves_out_what_it_cannot_learn_from(tmp_path, capsys):
    # CTC needs three frames for LL, and 800 samples make two.
    rows = [("AB", 16_000), ("LL", 800), ("A", 100), ("A", 10**6)]
    table = Dataset.from_list([{"id": f"u{i}", "text": text, "num_samples": n} for i, (text, n) in enumerate(rows)])
    args = FineTuningArguments(output_dir=str(tmp_path), train_data=["t"], validation_data=["v"], config_name="c",
                               use_cpu=True, min_seconds=0.01, max_seconds=10.0)  # fmt: skip
    kept, dropped = select_training(table, tiny_config(), args, CTCArguments())
    assert kept["id"][:] == ["u0"]
    assert dropped == {"by their length": 2, "with a text longer than their audio": 1}
    assert "2 by their length, 1 with a text longer than their audio" in capsys.readouterr().out
    with pytest.raises(UserError, match="every utterance was dropped"):
        select_training(table.select([1]), tiny_config(), args, CTCArguments())


LISTS = {
    "ids": "{0}\n\n{1}\n",
    "paths": "/elsewhere/{0}.flac\nfar/away/{1}.M4A\n",
    "wav2letter": "{0} /elsewhere/{0}.flac 4075 chapter one\n{1} /elsewhere/{1}.flac 2740 not a word\n",
    "fairseq": "/root/of all\n3/{0}.flac\t4075\n4/{1}.flac\t2740\n",
    "transcripts": "{0} CHAPTER ONE\n{1} NOT A WORD\n",
}


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_every_form_name_their_utterances(form, tmp_path):
    table = corpus()
    wanted = [table["id"][200], table["id"][7]]
    (tmp_path / "list").write_text(LISTS[form].format(*wanted))
    assert take_listed(table, str(tmp_path / "list"))["id"][:] == wanted[::-1]  # in the table's order


def test_a_folder_of_audio_is_a_list(tmp_path):
    table = corpus()
    (tmp_path / "1h/3/clean/12").mkdir(parents=True)
    for name in (*table["id"][5:9], "12.trans"):
        (tmp_path / "1h/3/clean/12" / f"{name}{'.txt' if 'trans' in name else '.flac'}").touch()
    assert take_listed(table, str(tmp_path / "1h"))["id"][:] == table["id"][5:9]


def test_hours_and_lists_that_do_not_fit_are_refused(tmp_path):
    for hours, message in ((9.0, "--train_hours 9: .* hold"), (1e-6, "shorter than one utterance")):
        with pytest.raises(UserError, match=message):
            draw_hours(corpus(), hours, seed=0)
    table = corpus()
    path = tmp_path / "list"
    for text, message in (("", "names no utterance"), (f"{table['id'][0]}\nabsent-1\n", "1 of its 2 .* absent-1")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            take_listed(table, str(path))
    with pytest.raises(UserError, match="cannot be read.*No such file"):
        take_listed(table, str(tmp_path / "nowhere"))
    twins = Dataset.from_list([{"id": f"{x}/1", "audio": f"/{x}/1.wav", "num_samples": 1} for x in "ab"])
    path.write_text("1\n")
    with pytest.raises(UserError, match="1 stands for several utterances"):
        take_listed(twins, str(path))
    assert take_listed(twins.select([1]), str(path))["id"][:] == ["b/1"]  # known by its last part
