"""Text metrics: exact match, token F1, corpus BLEU."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from para_jax.errors import ParaJaxError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squeezed(text: str) -> str:
    r"""The text with each run of white space replaced by one space, and stripped.

    >>> squeezed(" two \n words\t")
    'two words'
    """
    return " ".join(text.split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    r"""1.0 if the prediction is one of the references, ignoring white space; else 0.0. Case and punctuation count.

    >>> exact_match(" I_JUMP  I_RUN\n", ["I_JUMP I_RUN"]), exact_match("Happy", ["happy", "glad"])
    (1.0, 0.0)
    """
    return float(squeezed(prediction) in map(squeezed, references))


def words(text: str) -> list[str]:
    """The words of a text, normalized as in SQuAD: lower case, without ASCII punctuation and English articles.

    >>> words("The captain's ship, a frigate.")
    ['captains', 'ship', 'frigate']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the `words` of the prediction, against the best reference.

    Rajpurkar et al., SQuAD, arXiv 1606.05250. If either has no words, it is 1.0 if both have none, else 0.0.

    >>> token_f1("The old sea captain", ["the captain", "a sailor"])
    0.5
    >>> token_f1("the", ["a"]), token_f1("", ["captain"])
    (1.0, 0.0)
    """
    return max(_f1(words(prediction), words(reference)) for reference in references)


def _f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    shared = (Counter(prediction) & Counter(reference)).total()
    return 2 * shared / (len(prediction) + len(reference))


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (Papineni et al., 2002), 0 to 100, with sacrebleu's defaults.

    `references` holds one or more for each prediction; rows may have different numbers of them. Raises
    ParaJaxError if there is no prediction, or a row without a reference.

    >>> round(corpus_bleu(["the cat sat on the mat"], [["a dog", "the cat sat on the mat"]]), 6)
    100.0
    """
    from sacrebleu.metrics import BLEU

    if not predictions or len(predictions) != len(references) or not all(references):
        raise ParaJaxError(
            f"BLEU takes one or more predictions and at least one reference for each; got {len(predictions)} "
            f"predictions, {len(references)} lists of references, {sum(not row for row in references)} of them empty"
        )
    # sacrebleu expects the same number of references for every row. None (which its types do not allow) marks a missing
    # one; an empty text would count as a reference without words and change the brevity penalty.
    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    # `force` only silences a warning about text that looks tokenised.
    return float(BLEU(force=True).corpus_score(list(predictions), streams).score)  # type: ignore[arg-type]


def majority(responses: Sequence[str]) -> float:
    """The share of the most frequent response: the accuracy of always giving that answer.

    >>> majority(["happy", "sad", "happy ", "angry"])
    0.5
    """
    return Counter(map(squeezed, responses)).most_common(1)[0][1] / len(responses)
