"""The data of `para-jax quickstart`: three tenants with different tasks on the same one-sentence stories."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

# Words that are common in the novels the tiny backbone was trained on.
FEELINGS = {
    "joy": ("happy", "glad", "smiling", "pleased", "laughing", "delighted", "cheerful", "merry"),
    "sorrow": ("sorry", "sad", "unhappy", "miserable", "crying", "wretched", "disappointed", "gloomy"),
    "anger": ("angry", "cross", "bitter", "violent", "offended", "jealous", "vexed", "furious"),
    "fear": ("anxious", "frightened", "trembling", "uneasy", "nervous", "timid", "alarmed", "startled"),
}
PEOPLE = (
    "prince", "princess", "lady", "doctor", "boy", "girl", "gentleman", "countess", "officer", "colonel", "soldier",
    "servant", "king", "judge", "captain", "peasant", "nurse", "maid", "stranger", "coachman", "clerk", "governess",
    "cook", "general",
)  # fmt: skip
PLACES = (
    "town", "road", "street", "garden", "church", "court", "village", "hall", "sea", "river", "school", "office",
    "field", "bridge", "hill", "bank", "kitchen", "shop", "station", "prison", "forest", "castle", "park", "inn",
)  # fmt: skip


class Tense(NamedTuple):
    """Words of one tense, and the question about a person that goes with it."""

    times: tuple[str, ...]
    verbs: tuple[str, ...]
    question: str


TENSES = (
    Tense(
        ("yesterday", "last night", "last week", "long ago"),
        ("walked", "went", "came", "ran", "returned", "hurried"),
        "Where was the {}?",
    ),
    Tense(
        ("now", "today", "once more", "at this moment"),
        ("walks", "goes", "comes", "runs", "returns", "hurries"),
        "Where is the {}?",
    ),
    Tense(
        ("tomorrow", "soon", "next week", "one day"),
        ("will walk", "will go", "will come", "will run", "will return", "will hurry"),
        "Where will the {} be?",
    ),
)


class Story(NamedTuple):
    feeling: str
    how: str
    person: str
    place: str
    tense: Tense
    time: str
    verb: str
    time_first: bool

    @property
    def text(self) -> str:
        text = f"the {self.how} {self.person} {self.verb} to the {self.place}"
        text = f"{self.time} {text}" if self.time_first else f"{text} {self.time}"
        return text[0].upper() + text[1:] + "."


# The task of each tenant: it names the feeling, copies the place, or turns the story into a question.
JOBS: dict[str, Callable[[Story], str]] = {
    "mood": lambda story: story.feeling,
    "place": lambda story: f"the {story.place}",
    "question": lambda story: story.tense.question.format(story.person),
}

Rows = dict[str, list[dict[str, str]]]


def quickstart_rows(seed: int = 0, train: int = 1500, held_out: int = 100) -> tuple[Rows, Rows]:
    """Training and held-out rows of every tenant; row i has the same prompt for all tenants.

    Each word for a feeling is paired with two of the 24 people in held-out rows only, so these pairs are never trained
    on. All prompts are different. The rows depend only on the arguments.

    >>> rows, held_out = quickstart_rows()
    >>> held_out["mood"][0]["prompt"]
    'The vexed maid runs to the prison at this moment.'
    >>> [held_out[tenant][0]["response"] for tenant in held_out]
    ['anger', 'the prison', 'Where is the maid?']
    """
    rng = random.Random(seed)
    train_words: list[tuple[str, str, str]] = []
    held_out_words: list[tuple[str, str, str]] = []
    for feeling, words in FEELINGS.items():
        for how in words:
            held_out_people = rng.sample(PEOPLE, len(PEOPLE) // 10)
            for person in PEOPLE:
                (held_out_words if person in held_out_people else train_words).append((feeling, how, person))
    return _rows(rng, train_words, train), _rows(rng, held_out_words, held_out)


def _rows(rng: random.Random, words: list[tuple[str, str, str]], count: int) -> Rows:
    stories: dict[str, Story] = {}
    while len(stories) < count:
        tense = rng.choice(TENSES)
        story = Story(
            *rng.choice(words), rng.choice(PLACES), tense, rng.choice(tense.times), rng.choice(tense.verbs),
            time_first=rng.random() < 0.5,
        )  # fmt: skip
        stories[story.text] = story
    return {
        tenant: [{"prompt": text, "response": job(story)} for text, story in stories.items()]
        for tenant, job in JOBS.items()
    }
