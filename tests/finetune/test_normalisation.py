"""Letters of every script stay whole and apart; what is dropped is counted."""

import unicodedata

import pytest

from w2v2.finetune.normalisation import TextRules, count_tags, describe_unit, find_case, lacks_spaces

KEPT = TextRules(case="keep")


@pytest.mark.parametrize("text, expected", [
    ("  Hello,\tworld! ", "HELLO WORLD"),
    ("don’t l´eau rock‘n‘roll", "DON'T L'EAU ROCK'N'ROLL"),
    ("‘quoted’ word, ‘don’t go’ dogs’", "QUOTED WORD DON'T GO DOGS'"),
    ("well-known, and/or wait…what", "WELL KNOWN AND OR WAIT WHAT"),
    ("a|b", "A B"),
    ("1,000 at 12:30, COVID-19", "1000 AT 12 30 COVID 19"),
    ("?!", ""),
])  # fmt: skip
def test_text_is_normalised(text, expected):
    rules = TextRules()
    assert rules(text) == rules(expected) == expected
    assert TextRules(case="lower")(text) == expected.lower()


@pytest.mark.parametrize("text", [
    "ㅎㅏㄴㄱㅜㄱ 한국", "น้ำ ทำ กำลัง", "tʰɪn kʼa ma˥˩ ɚ˞ ˈbaː", "ﬁne Ａ", "ქართული", "ısı isi", "Straße Maße", "σας", "और क्षेत्र",
    "യും അവന്\u200d", "ක්\u200dය", "র\u200d্যাব", "ג׳ירפה צה״ל", "col·lecció", "が ガ", "мой её їжак", "مُعَلِّم",
])  # fmt: skip
def test_nothing_that_a_script_needs_is_taken_apart(text):
    expected = unicodedata.normalize("NFC", text).replace("ʼ", "'")
    assert KEPT(text) == KEPT(unicodedata.normalize("NFD", text)) == expected


@pytest.mark.parametrize("text, expected, dropped", [
    ("می\u200cخواهم سلام\u200f \ufeffبله", "میخواهم سلام بله", {"\u200c": 1, "\u200f": 1, "\ufeff": 1}),
    ("a\u00adb a\u200db c\u200b \ufe0f", "ab ab c", {"\u00ad": 1, "\u200d": 1, "\u200b": 1, "\ufe0f": 1}),
    ("नमस्ते।हाँ। مرحبا، كيف؟ 你好。是、不", "नमस्ते हाँ مرحبا كيف 你好 是 不", {"।": 2, "،": 1, "؟": 1, "。": 1, "、": 1}),
    ("ինչո՞ւ ՞", "ինչու", {"՞": 2}),
    ("‘a’ dogs’", "a dogs'", {"‘": 1, "’": 1}),
    ("don’t (3.5)", "don't 35", {"(": 1, ")": 1, ".": 1}),
])  # fmt: skip
def test_what_is_dropped_is_counted(text, expected, dropped):
    assert KEPT(text) == expected
    assert KEPT.count_dropped([text, ""]) == dropped


def test_flags_choose_what_is_dropped_and_folded():
    assert TextRules(drop_characters="!")("a.b c!") == "A.B C"
    assert TextRules(drop_characters="E")("seen, the") == "SN, TH"
    assert TextRules(case="keep", keep_characters="\u200c-")("می\u200cروم a-b c.d") == "می\u200cروم a-b c d"
    assert TextRules(case="keep", fold_compatibility=True)("ﬁne Ａ l´eau") == "fine A l'eau"


@pytest.mark.parametrize("text, expected", [
    ("Żółć über Ångström café", "Zołc uber Angstrom cafe"),
    ("ά ΐ", "α ι"),
    ("한국 が น้ำ क़ مُعَلِّم", "한국 が น้ำ क़ مُعَلِّم"),
    ("Да́ша мой её ѓ", "Даша мой её ѓ"),
])  # fmt: skip
def test_accents_are_folded_where_a_script_has_them(text, expected):
    rules = TextRules(case="keep", fold_accents=True)
    assert rules(text) == rules(unicodedata.normalize("NFD", text)) == unicodedata.normalize("NFC", expected)


@pytest.mark.parametrize(
    ("case", "expected"), [("turkish_upper", "ISPARTA IZMIR KOY"), ("turkish_lower", "ısparta izmir koy")]
)
def test_a_folded_turkish_word_has_one_spelling(case, expected):
    rules = TextRules(case=case, fold_accents=True)
    assert rules("ISPARTA İZMİR KÖY") == rules("ısparta izmir köy") == expected


@pytest.mark.parametrize("texts, case", [
    (["Hello you"], "upper"), (["HELLO"], "upper"), (["hello"], "lower"), (["漢字 ქართული"], "keep"),
    (["ქართული ᲥᲐᲠᲗᲣᲚᲘ"], "upper"), (["ısı isi kış"], "turkish_lower"), (["KIŞ KİŞ"], "turkish_upper"),
    (["Yıldız", *["this is his visit"] * 9], "upper"), (["SHE LIVES IN İSTANBUL", *["THIS IS HIS VISIT"] * 9], "upper"),
    ([], "keep"),
])  # fmt: skip
def test_case_is_folded_only_where_the_text_has_both(texts, case):
    assert find_case(texts) == case
    if case != "upper":
        assert [TextRules(case=case)(text) for text in texts] == texts


@pytest.mark.parametrize("case, text, expected", [
    ("upper", "Straße Masse σας ΐ և ქარ ᲥᲐᲠ ǆ", "STRAẞE MASSE ΣΑΣ ΐ և ქარ ქარ Ǆ"),
    ("lower", "STRAẞE ΣΑΣ ΟΔΟΣ ᲥᲐᲠ İT", "straße σας οδος ქარ it"),
    ("turkish_upper", "ısı isi İ I", "ISI İSİ İ I"),
    ("turkish_lower", "ISI İSİ", "ısı isi"),
])  # fmt: skip
def test_folding_keeps_the_letters(case, text, expected):
    rules = TextRules(case=case)
    assert rules(text) == rules(expected) == expected


def test_tokens_stay_but_for_those_that_are_dropped():
    rules = TextRules(unit="tokens", drop_tokens=("sil",))
    assert rules(" sil HH  AH0 | l. ow1\u200e sil") == "HH AH0 l. ow1"
    assert rules.count_dropped([" sil HH  AH0 | l. ow1\u200e sil"]) == {"sil": 2, "|": 1, "\u200e": 1}


def test_marks_among_the_words_are_counted():
    assert count_tags(["a <noise> b [laughter]", "x < y > z, [ a ]", "R&amp;D <noise>"]) == {
        "<noise>": 2, "[laughter]": 1, "&amp;": 1
    }  # fmt: skip


@pytest.mark.parametrize("texts, expected", [
    (["天地人", "山水 火"], True), (["กำลัง ทำ"], True), (["yes", "no"], True), (["yes I am"], False),
    (["안녕 하세요"], False), ([], False),
])  # fmt: skip
def test_scripts_without_spaces_are_known(texts, expected):
    assert lacks_spaces(texts) == expected


def test_units_without_a_shape_are_shown_by_code_point():
    assert [describe_unit(unit) for unit in ("a", "AH0", "\u200d", " ")] == [
        "a", "AH0", "U+200D ZERO WIDTH JOINER", "U+0020 SPACE"
    ]  # fmt: skip
    assert describe_unit("\u094d") == "◌\u094d (U+094D DEVANAGARI SIGN VIRAMA)"
