"""What a text says about itself decides whether it may be matched by likeness at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_proxy.wording import anaphoric, content_words, language, time_bound, tokens

LANGUAGES = [
    ("en", "What is the capital of France?"),
    ("en", "how do i undo this"),
    ("en", "WHY IS IT RAINING"),
    ("en", "What does 你好 mean?"),
    ("en", "Where is Hà Nội?"),
    ("en", "the café in the rue du Bac"),
    ("en", "Cancel my plan"),
    ("vi", "Thủ đô của Pháp là gì?"),
    ("vi", "bật chế độ tối"),
    ("vi", "THỦ ĐÔ CỦA PHÁP LÀ GÌ"),
    ("vi", "lam sao de doi mat khau cua toi"),
    ("vi", "Làm sao cài Docker trên Ubuntu?"),
    ("other", "東京は何時ですか"),
    ("other", "오늘 날씨 어때요"),
    ("other", "Где находится вокзал?"),
    ("other", "ما هي عاصمة فرنسا"),
    ("other", "¿Cuál es la capital de España?"),
    ("other", "Quelle est la capitale de la France et pourquoi ?"),
    ("other", "Was ist die Hauptstadt von Frankreich und warum?"),
    ("", "git rebase"),
    ("", "x = 3"),
    ("", "48213"),
    ("", ""),
]

TIMELY = [
    "What is the weather in Chicago today?",
    "What happened yesterday?",
    "Will it rain tomorrow?",
    "What is open right now?",
    "Who is winning now?",
    "What is the latest Node release?",
    "Who is the current CEO of the company?",
    "who is currently president",
    "What films are on this week?",
    "What's on tonight?",
    "Is it raining outside now",
    "What's the weather in Paris?",
    "What is the weather like in Rome",
    "What is the stock price of the company",
    "price of bitcoin",
    "What time is it?",
    "What's today's date?",
    "What is the date",
    "most recent release of the library",
    "events next week",
    "events this weekend",
    "news from last night",
    "the newest phone",
    "how many days so far this year",
    "is the site down at the moment",
    "what is trending",
    "upcoming launches",
    "hôm nay trời thế nào",
    "hom nay troi the nao",
    "Hiện tại ai là tổng thống?",
    "bây giờ là mấy giờ",
    "phiên bản mới nhất của thư viện",
    "tuần này có phim gì",
    "ngày mai có mưa không",
    "Giá vàng bao nhiêu",
    "dạo này có gì vui",
]

TIMELESS = [
    "What is the capital of France?",
    "Do you know the answer?",
    "What does 'current' mean in electricity?",
    'What does "today" mean?',
    "What is electric current?",
    "How is current measured in a circuit?",
    "print the current working directory",
    "How do I check the current branch in git?",
    "Now explain recursion",
    "I am fine now that it works",
    "How do I know a word?",
    "What is a snowstorm?",
    "Why does weather change?",
    "How does a weather model work?",
    "How is a stock price determined?",
    "How do I write a to-do list?",
    "What is a knowledge base?",
    "How long should I boil eggs?",
    "What is a weekday?",
    "How do I read last line of a file?",
    "the first president of the country",
    "How do I parse a date in Java?",
    "What is the past tense of go?",
    "Thủ đô của Pháp là gì?",
    "cách nấu phở",
    "năm nhuận là gì",
    "tuần có mấy ngày",
    "lịch sử Việt Nam",
    "How do I sort a list in Python?",
    "What is a nowhere-dense set?",
]

LEANING = [
    "yes",
    "Yes, please.",
    "continue",
    "go on",
    "why?",
    "why is that?",
    "and the second one?",
    "what about it",
    "What about Spain?",
    "how about the other one?",
    "tell me more",
    "Tell me more about that",
    "same for Germany",
    "the first one",
    "can you explain that?",
    "translate it to French",
    "Is it safe?",
    "do it again",
    "make it shorter",
    "What do you mean?",
    "còn cái thứ hai?",
    "Còn Hà Nội thì sao?",
    "tiếp tục",
    "tiếp tục.",
    "vậy thì sao",
    "tại sao vậy?",
    "nói thêm đi",
    "cái đó là gì",
]

STANDING = [
    "What is the capital of France?",
    "Where's my refund?",
    "Is it safe to take aspirin with food?",
    "Why is the sky blue?",
    "How do I reset my password?",
    "Explain recursion",
    "What is it like to live in Tokyo?",
    "Which is better, Redis or Memcached?",
    "The first president of the United States",
    "Thủ đô của Pháp là gì?",
    "Làm sao để đổi mật khẩu?",
    "cách nấu phở bò",
]


@pytest.mark.parametrize(("expected", "text"), LANGUAGES)
def test_a_text_is_put_to_the_language_it_is_written_in(expected: str, text: str) -> None:
    """Only a text in a language the encoder serves may be matched by likeness."""
    assert language(text) == expected


@pytest.mark.parametrize("text", TIMELY)
def test_a_question_about_the_moment_is_told(text: str) -> None:
    """Yesterday's answer to "today" is a wrong answer."""
    assert time_bound(text)


@pytest.mark.parametrize("text", TIMELESS)
def test_a_timeless_question_stays_cacheable(text: str) -> None:
    """Words that only look like time cost no hits."""
    assert not time_bound(text)


@pytest.mark.parametrize("text", LEANING)
def test_a_turn_that_leans_on_the_ones_before_is_told(text: str) -> None:
    """ "Yes" has no answer of its own to share."""
    assert anaphoric(text)


@pytest.mark.parametrize("text", STANDING)
def test_a_turn_that_stands_alone_is_told(text: str) -> None:
    """A short question that is whole may be matched."""
    assert not anaphoric(text)


def test_content_words_leave_the_function_words_out() -> None:
    """Three of them are what a last turn needs to be matched by likeness with history."""
    assert content_words("What is the capital of France?") == ("capital", "france")
    assert content_words("Where is order 48213?") == ("order", "48213")
    assert content_words("yes") == ("yes",)
    assert content_words("") == ()


def test_tokens_write_contractions_out_and_keep_what_is_fastened_to_numbers() -> None:
    """ "Don't" must be seen as "not", and 500mg not as 500."""
    assert tokens("Don’t take 500mg at 7am") == ("do", "not", "take", "500mg", "at", "7am")
    assert tokens("can't, won't, cannot") == ("can", "not", "will", "not", "can", "not")
    assert tokens("a 4-inch e-mail about C++ and node.js") == (
        *("a", "4", "inch", "email", "about", "c++", "and", "node.js"),
    )


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_every_text_can_be_read(text: str) -> None:
    """No text makes the reading fail, and the answer never depends on when it is asked."""
    assert language(text) in {"en", "vi", "other", ""}
    assert time_bound(text) == time_bound(text)
    assert anaphoric(text) == anaphoric(text)
