"""Text as the index has it: words in one form, on both databases and in every ranking.

Leans on PyStemmer. Refuses to know databases: both are given these words and split nothing
themselves, so that they find the same. Words are lower case, without accents, and stemmed by
English rules, irregular forms by a list; Chinese, Japanese, Korean and Thai, which write no spaces,
are cut into characters and pairs of characters; a symbol such as an emoji is a word of its own.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from Stemmer import Stemmer  # type: ignore[import-not-found]  # ships no types

MAX_WORD = 64
MAX_QUERY_CHARS = 20_000
"""Of a longer query the rest is passed over: by then it has more words than are looked for."""
FACET = "="
"""How a word begins that stands for one value of a memory's metadata."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_SYMBOLS = "\u2600-\u27bf\U0001f000-\U0001faff"
_WORD = re.compile(f"[{_UNSPACED}]+|[{_SYMBOLS}]|[^\\W_{_UNSPACED}]+")
_ASCII_WORD = re.compile("[a-z0-9]+")
_UNSPACED_START = re.compile(f"[{_UNSPACED}]")
_MARKS = re.compile("[\u0300-\u036f\ufe0f]+")

_ASKING = re.compile("[?\uff1f\u061f]")
_SENTENCE_END = re.compile("(?<=[.!?\u061f])\\s+|(?<=[\u3002\uff01\uff1f])|\\n")
_QUOTES = "\"')]}*_»”’ "

STOP_WORDS = frozenset(
    """a about above after again against all also am an and any are aren as at be because been
    before being below between both but by can cannot could couldn d did didn do does doesn doing
    don down during each ever few for from further had hadn has hasn have haven having he her here
    hers herself him himself his how i if in into is isn it its itself just ll m me might more
    most must mustn my myself no nor not now of off on once only or other our ours ourselves out
    over own re s same shan she should shouldn so some such t than that the their theirs them
    themselves then there these they this those through to too under until up ve very was wasn we
    were weren what when where which while who whom whose why will with won would wouldn you your
    yours yourself yourselves""".split()
)


IRREGULAR: dict[str, str] = {
    form: base
    for base, *forms in (
        entry.split()
        for entry in """become became, begin began begun, bend bent, bite bit bitten, blow blew blown,
        break broke broken, bring brought, build built, burn burnt, buy bought, catch caught,
        child children, choose chose chosen, come came, deal dealt, dig dug, do did done,
        draw drew drawn, dream dreamt, drink drank drunk, drive drove driven, eat ate eaten,
        fall fell fallen, feed fed, feel felt, fight fought, find found, fly flew flown, foot feet,
        forget forgot forgotten, forgive forgave forgiven, freeze froze frozen, get got gotten,
        give gave given, go went gone, grow grew grown, hang hung, hear heard, hide hid hidden,
        hold held, keep kept, knife knives, know knew known, lead led, learn learnt, leave left,
        lend lent, lose lost, make made, man men, mean meant, meet met, mouse mice, pay paid,
        person people, ride rode ridden, run ran, say said, see saw seen, seek sought, sell sold,
        send sent, shake shook shaken, shine shone, shoot shot, show shown, sing sang sung,
        sink sank sunk, sit sat, sleep slept, speak spoke spoken, spend spent, stand stood,
        steal stole stolen, stick stuck, strike struck, swear swore sworn, sweep swept,
        swim swam swum, take took taken, teach taught, tear tore torn, tell told, think thought,
        throw threw thrown, tooth teeth, understand understood, wake woke woken, wear wore worn,
        wife wives, win won, woman women, write wrote written""".split(
            ","
        )
    )
    for form in forms
}
"""The form under which a common English word is found whose other forms no rule of endings brings
together: what was "bought" answers when somebody asks what they should "buy". Forms that are more
often another word ("rose", "lay") are left out."""


def folded(text: str) -> str:
    """Lower case and without accents, also of letters that Unicode composes."""
    if text.isascii():
        return text.lower()
    return _MARKS.sub("", unicodedata.normalize("NFKD", text).casefold())


def plain_words(text: str) -> list[str]:
    """The words in their order, neither stemmed nor cut into pairs."""
    found = folded(text)
    if found.isascii():
        return _ASCII_WORD.findall(found)
    # Composed again: a Korean syllable is one letter, and marks that are left stay with theirs.
    return _WORD.findall(unicodedata.normalize("NFC", found))


_stem_word = Stemmer("english", 0).stemWord
"""Holds the interpreter's lock through each word: threads may share it. Snowball's own in Python
keeps its place between two steps, and two threads stem each other's words."""


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """``word`` without its English ending; others, and long ones, nearly as they are."""
    if len(word) > 32 or not word.isascii():
        return word[:MAX_WORD]
    return str(_stem_word(IRREGULAR.get(word, word)))


def index_words(text: str) -> list[str]:
    """What the index holds of ``text``: every word, in order, as often as it occurs."""
    words: list[str] = []
    for word in plain_words(text):
        if word.isascii() or not _UNSPACED_START.match(word):
            words.append(stem(word))
        else:
            words.extend(word)
            words.extend(_pairs(word))
    return words


def query_words(text: str) -> list[str]:
    """What is looked for: each word once, in order, without those that say nothing.

    A query of nothing but such words keeps them: somebody looks for "The Who".
    """
    found = plain_words(text[:MAX_QUERY_CHARS])
    kept = [word for word in found if word not in STOP_WORDS] or found
    words: dict[str, None] = {}
    for word in kept:
        if word.isascii() or not _UNSPACED_START.match(word):
            words[stem(word)] = None
        else:
            words.update(dict.fromkeys(_pairs(word) if len(word) > 1 else word))
    return list(words)


def _pairs(word: str) -> Iterable[str]:
    return (word[i : i + 2] for i in range(len(word) - 1))


def text_of(content: Any) -> str:
    """A memory's content as text: itself, or every key and value of the JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        return "\n".join(f"{key}: {text_of(value)}" for key, value in content.items())
    if isinstance(content, list | tuple):
        return "\n".join(text_of(value) for value in content)
    return json.dumps(content)


def asks(text: str) -> float:
    """Which part of ``text`` is questions, from 0 to 1, by its characters."""
    if _ASKING.search(text) is None:
        return 0.0
    sentences = [sentence.rstrip(_QUOTES) for sentence in _SENTENCE_END.split(text)]
    asking = sum(len(sentence) for sentence in sentences if _ASKING.match(sentence[-1:]))
    return asking / sum(map(len, sentences))


def facets_of(metadata: Mapping[str, Any]) -> list[str]:
    """A word for each value in ``metadata``; for a list also one for each of its values."""
    found: dict[str, None] = {}
    for key, value in metadata.items():
        found[facet(key, value)] = None
        if isinstance(value, list):
            found.update((facet(key, one), None) for one in value)
    return list(found)


def facet(key: str, value: Any) -> str:
    """The word for ``value`` under ``key``. A digest: no key can mean anything to a database."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = json.dumps([key, value], sort_keys=True, separators=(",", ":"))
    return FACET + blake2b(text.encode(), digest_size=10).hexdigest()
