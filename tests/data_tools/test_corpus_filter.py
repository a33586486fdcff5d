"""What the filters take away: copies, repeated paragraphs, what is over the cap, and leaks of the targets."""

import numpy as np

from data_tools.corpus_filter import Document, cut_at_line, keep_unique, line_hashes
from data_tools.corpus_leaks import NGRAM, drop_paragraphs, find_overlaps, ngram_hashes, remove_leaks


def document(text: str, split: str = "train", order: int = 0, domain: str = "python") -> Document:
    return Document(domain, split, order, order, text, line_hashes(text))


def sentences(seed: int, count: int = 10) -> str:
    rng = np.random.default_rng([seed, 7])
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(400)]
    return "\n\n".join(" ".join(rng.choice(words, 16)) + "." for _ in range(count)) + "\n"


def test_line_hashes_ignore_blanks_and_short_lines() -> None:
    one, two = "    a line that is long enough to count\nshort\n", "a line that is  long enough to count"
    assert line_hashes(one).tolist() == line_hashes(two).tolist() and len(line_hashes(one)) == 1
    assert line_hashes("short\n\n").tolist() == []


def test_near_duplicates_go_and_a_held_out_document_keeps_its_text() -> None:
    text = sentences(1)
    mostly = text.split("\n\n")[:8] + sentences(2, 2).split("\n\n")
    half = text.split("\n\n")[:5] + sentences(3, 5).split("\n\n")
    documents = [
        document("\n\n".join(mostly), order=1),
        document("\n\n".join(half), order=2),
        document(text, "valid", order=3),
    ]
    kept, gone = keep_unique(documents, {"train": 10**6, "valid": 10**6})
    assert [(d.split, d.order) for d in kept] == [("valid", 3), ("train", 2)]
    assert gone["near_duplicates"] == 1


def test_repeated_paragraphs_go_from_prose_but_not_from_code() -> None:
    text = sentences(1)
    half = text.split("\n\n")[:4] + sentences(3, 6).split("\n\n")
    for domain, paragraphs in (("prose", 6), ("python", 10)):
        documents = [document(text, order=1, domain=domain), document("\n\n".join(half), order=2, domain=domain)]
        kept, gone = keep_unique(documents, {"train": 10**6})
        assert len(kept[1].text.strip().split("\n\n")) == paragraphs
        assert gone["repeated_paragraphs"] == 10 - paragraphs


def test_cap_is_kept_in_hash_order_whatever_the_order_of_arrival() -> None:
    documents = [document(sentences(i), order=i) for i in range(6)]
    room = {"train": 2 * len(documents[0].text) + 200}
    kept, gone = keep_unique(documents, room)
    again, _ = keep_unique(documents[::-1], room)
    assert [d.order for d in kept] == [d.order for d in again] == [0, 1, 2]
    assert sum(len(d.text.encode()) for d in kept) <= room["train"] and gone["over_cap"] == 3


def test_cut_at_line_never_splits_a_line_or_a_character() -> None:
    assert cut_at_line("ab\ncd\n", 5) == "ab\n"
    assert cut_at_line("\u00e9\u00e9\u00e9\u00e9", 3) == ""
    assert cut_at_line("one two three", 9) == "one two"


def test_ngrams_depend_on_words_alone() -> None:
    words = [f"word{i}" for i in range(NGRAM + 2)]
    hashes, starts, ends = ngram_hashes(" ".join(words))
    assert len(hashes) == 3 and starts[1] == len("word0 ") and ends[0] == len(" ".join(words[:NGRAM]))
    shifted = ngram_hashes("(...) " + ",\n".join(words).upper())[0]
    assert hashes.tolist() == shifted.tolist()
    assert ngram_hashes("too few words")[0].tolist() == []


def test_leaks_leave_the_training_text() -> None:
    secret = " ".join(f"secret{i}" for i in range(20))
    clean = sentences(5)
    leaky = clean + "\nBefore it.\n" + secret + ".\n\n" + sentences(6)
    readme = document(sentences(8, 30) + "\n" + secret, "valid", domain="readme")
    copied = document(sentences(9), "test", order=1, domain="readme")
    message = document(sentences(9, 1) + "\n" + sentences(10, 3), "valid", domain="messages")
    kept = {
        "python": [document(leaky), document(sentences(9), order=1), document(clean, "valid", order=2)],
        "readme": [readme, copied],
        "messages": [message],
    }
    left, report = remove_leaks(kept, lambda function, items: [function(item) for item in items])
    assert left["python"][0].text == clean + "\n" + sentences(6)
    assert [d.text for d in left["python"][1:]] == [sentences(9), clean]
    assert [d.order for d in left["readme"]] == [0]
    assert left["messages"][0].text == sentences(10, 3)
    assert report["readme"]["documents_dropped"] == 1 and report["readme"]["training_documents_cut"] == 1
    banned = np.unique(ngram_hashes(readme.text)[0])
    assert find_overlaps([leaky], banned) and not find_overlaps([d.text for d in left["python"]], banned)


def test_drop_paragraphs_takes_every_paragraph_that_the_run_touches() -> None:
    words = [f"w{i}" for i in range(NGRAM)]
    text = f"First one.\n\n{' '.join(words[:6])}\n\n{' '.join(words[6:])}\n\nLast one.\n"
    assert drop_paragraphs(text, ngram_hashes(" ".join(words))[0]) == "First one.\n\nLast one.\n"
