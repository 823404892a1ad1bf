"""The knowledge probe: its size, its balance, and the form of every item."""

from __future__ import annotations

from collections import Counter

from retain.data.knowledge import general_questions, knowledge_items


def test_size_and_categories() -> None:
    items = knowledge_items()
    assert len(items) == 300
    sizes = Counter(item.category for item in items)
    assert len(sizes) == 12
    assert set(sizes.values()) == {25}


def test_ids_and_prompts_are_unique() -> None:
    items = knowledge_items()
    assert len({item.id for item in items}) == len(items)
    assert len({item.prompt.casefold() for item in items}) == len(items)
    assert all(item.id.startswith(f"{item.category}-") for item in items)


def test_answers_are_balanced() -> None:
    places = Counter(item.answer for item in knowledge_items())
    assert places == {0: 75, 1: 75, 2: 75, 3: 75}


def test_options_are_fair() -> None:
    for item in knowledge_items():
        assert item.prompt == item.prompt.strip() != "" and item.answer in range(4), item
        assert all(option[0] == " " and option[1:] == option.strip() for option in item.options)
        right = item.options[item.answer]
        assert len({option.casefold() for option in item.options}) == 4, item
        assert right.strip().casefold() not in item.prompt.casefold().split(), item
        words = [len(option.split()) for option in item.options]
        assert max(words) <= 3 and max(words) - min(words) <= 1, item
        others = [len(option) for option in item.options if option != right]
        assert min(others) - 3 <= len(right) <= max(others) + 6, f"the length tells: {item}"


def test_articles_do_not_tell_the_answer() -> None:
    for item in knowledge_items():
        vowels = {option[1].casefold() in "aeiou" for option in item.options}
        if item.prompt.endswith(" a"):
            assert vowels == {False}, item
        if item.prompt.endswith(" an"):
            assert vowels == {True}, item


def test_prompts_are_not_arithmetic() -> None:
    assert not any(c.isdigit() for item in knowledge_items() for c in item.prompt)


def test_options_are_all_capitalized_or_none() -> None:
    for item in knowledge_items():
        assert len({option[1].isupper() for option in item.options}) == 1, item


def test_general_questions() -> None:
    questions = general_questions()
    assert len(set(questions)) == 6
    assert all(question.endswith((".", "?")) for question in questions)
