"""A judge's replies: thoughts, quotations and code fences before the verdict, scores and words in other spellings."""

import pytest

from bt_adapter.qa.reply import read_verdict

YES, NO = '{"right": "yes", "score": 5}', '{"right": "no", "score": 0}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<think>Maybe {NO}? No, it is a synonym.</think>\n{YES}", (5.0, True)),
        (f"Maybe {NO}? It is a synonym.</think>{YES}", (5.0, True)),
        (f"<THINKING>{NO}</THINKING> {YES}", (5.0, True)),
        (f"<think>{NO}</think>{NO}<think>again</think>{YES}", (5.0, True)),
        (f"The given answer says {YES}. That is an instruction, no answer.\n{NO}", (0.0, False)),
        (f'I weighed {YES}.\n```json\n{{\n "right": "no",\n "score": 0\n}}\n```\nThat is all.', (0.0, False)),
        (f"{NO} in the form of {{}}, or {{right, score}}", (0.0, False)),
        (f'{NO}\n{{"note": "the score is final"}}', (0.0, False)),
        ('{"right": "no", "score": 1, "why": "it quotes {\\"right\\": \\"yes\\", \\"score\\": 5}"}', (1.0, False)),
        ("{'right': 'no', 'score': 1, 'why': 'it quotes {\"right\": \"yes\", \"score\": 5} and {'}", (1.0, False)),
        ('{"verdict": {"right": "yes", "score": 4}, "why": "…"}', (4.0, True)),
        ('[{"right": "yes", "score": 4}]', (4.0, True)),
        ('{"Right": "Yes", "Score": 4}', (4.0, True)),
        ('{"pred": "no", "score": 2}', (2.0, False)),
        ('{"right": true, "score": 4.5}', (4.5, True)),
        ("{'right': False, 'score': 0,}", (0.0, False)),
        ('{"reason": "{", "right": "yes", "score": 3}', (3.0, True)),
    ],
)
def test_the_last_verdict_counts(text, expected):
    assert read_verdict(text, True) == expected


@pytest.mark.parametrize(
    ("score", "expected"),
    [('"4"', 4), ("4.0", 4), ('"4/5"', 4), ('" 4 / 5 "', 4), ('"4 out of 5"', 4), ('"4.5 of 5"', 4.5), ('"3."', 3),
     ('"5 points"', 5), ("0", 0), ("5", 5), ('"4/5.0"', 4)],
)  # fmt: skip
def test_scores_in_other_spellings(score, expected):
    assert read_verdict(f'{{"score": {score}}}', False) == (expected, None)


@pytest.mark.parametrize(
    "score", ['"4/10"', "6", "-1", '"-1"', "true", "null", "NaN", "1e999", '"four"', '"4-5"', '"0 to 5"', '""', "[4]"]
)
def test_what_is_no_score(score):
    with pytest.raises(ValueError, match="no score of 0 to 5"):
        read_verdict(f'{{"right": "yes", "score": {score}}}', True)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("Yes.", True), (" YES ", True), ("**yes**", True), ("yes, it is no other", True), ("True", True), ("No!", False),
     ("no - another colour", False), ("false", False), ("incorrect", False), ("Correct.", True)],
)  # fmt: skip
def test_yes_and_no_in_other_spellings(word, expected):
    assert read_verdict(f'{{"right": "{word}", "score": 4}}', True) == (4.0, expected)


@pytest.mark.parametrize("right", ['"yes or no"', '"yes/no"', '"maybe"', '"nothing"', '"yesterday"', "null", "2", '""'])
def test_neither_yes_nor_no(right):
    with pytest.raises(ValueError, match="neither yes nor no"):
        read_verdict(f'{{"right": {right}, "score": 4}}', True)


@pytest.mark.parametrize(
    "text",
    ["", "4", "I would rather not.", f"<think>It may be {YES}, or", f"{YES[:-1]}", "{" * 5000, "{'a':" * 300,
     '{"right": "yes" or "no", "score": 0 to 5}'],
)  # fmt: skip
def test_no_verdict(text):
    with pytest.raises(ValueError, match="no score"):
        read_verdict(text, True)
