import math
from collections import Counter

import pytest

from para_jax.errors import ParaJaxError
from para_jax.evaluation.metrics import corpus_bleu, exact_match, majority, token_f1, words


def plain_bleu(predictions, references):
    """BLEU-4 with the closest reference length, from its definition; for text of plain words, without smoothing."""

    def grams(text, n):
        tokens = text.split()
        return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))

    log_precision = 0.0
    for n in range(1, 5):
        right = total = 0
        for prediction, row in zip(predictions, references, strict=True):
            most = Counter()
            for reference in row:
                most |= grams(reference, n)
            right += (grams(prediction, n) & most).total()
            total += grams(prediction, n).total()
        log_precision += math.log(right / total) / 4
    length = sum(len(p.split()) for p in predictions)
    closest = sum(
        min((abs(len(r.split()) - len(p.split())), len(r.split())) for r in row)[1]
        for p, row in zip(predictions, references, strict=True)
    )
    return 100 * math.exp(min(0.0, 1 - closest / length) + log_precision)


PREDICTIONS = ["the inn by the river is cheap and cheerful", "a coffee shop in the old town", "good food near the sea"]
REFERENCES = [
    ["the inn by the river is cheap"],
    ["there is a coffee shop in the old town square", "a coffee shop in town", "in the old town a coffee shop"],
    ["good food at the sea", "very good food near the sea and the harbour"],
]


def test_bleu_of_rows_with_unequal_numbers_of_references():
    assert corpus_bleu(PREDICTIONS, REFERENCES) == pytest.approx(plain_bleu(PREDICTIONS, REFERENCES), rel=1e-6)
    assert 30 < corpus_bleu(PREDICTIONS, REFERENCES) < 95


def test_a_lacking_reference_is_not_an_empty_one():
    """Padding with empty texts would give short predictions a reference length of zero to be close to."""
    short, references = ["the inn by the river", "good food near the sea"], [[REFERENCES[1][0]], REFERENCES[2]]
    references[0] = ["the inn by the river is cheap and open every day of the week"]
    padded = [[references[0][0], ""], references[1]]
    assert corpus_bleu(short, references) == pytest.approx(plain_bleu(short, references), rel=1e-6)
    assert corpus_bleu(short, references) < corpus_bleu(short, padded)


def test_bleu_is_of_the_corpus_and_not_a_mean_of_rows():
    both = corpus_bleu(PREDICTIONS, REFERENCES)
    alone = [corpus_bleu([p], [r]) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert both != pytest.approx(sum(alone) / 3, rel=1e-3)


@pytest.mark.parametrize("references", [[], [["a"]], [["a"], []]])
def test_bleu_without_a_reference_is_an_error(references):
    with pytest.raises(ParaJaxError, match="at least one reference"):
        corpus_bleu(["a", "b"], references)


def test_bleu_of_nothing_is_an_error():
    with pytest.raises(ParaJaxError, match="0 predictions"):
        corpus_bleu([], [])


def test_the_best_reference_counts():
    assert token_f1("a red house", ["the blue house", "red houses", "house"]) == pytest.approx(2 / 3)
    assert exact_match("house", ["red", " house"]) == 1.0


def test_f1_counts_repeated_words_once_each():
    assert token_f1("jump jump jump", ["jump jump walk walk"]) == pytest.approx(2 * 2 / 7)


def test_f1_strips_articles_only_as_whole_words():
    assert words("An aunt ate the theatre's apple -- a treat!") == ["aunt", "ate", "theatres", "apple", "treat"]


def test_exact_match_keeps_case_and_punctuation():
    assert exact_match("I_TURN_LEFT", ["i turn left"]) == 0.0
    assert exact_match("yes.", ["yes"]) == 0.0
    assert exact_match("\n yes   sir ", ["yes sir"]) == 1.0


def test_majority_takes_the_most_frequent():
    assert majority(["a", "b", "b", "c", "b "]) == pytest.approx(0.6)
