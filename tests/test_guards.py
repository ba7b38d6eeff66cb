"""The guards' promise: texts that need different answers never share one (fault 62)."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_proxy.guards import GUARDS, facts, veto

# Guard -> pairs it must object to itself, whatever the others say.
OBJECTS: dict[str, list[tuple[str, str]]] = {
    "language": [
        ("What is love?", "Tình yêu là gì?"),
        ("Thủ đô của Pháp là gì?", "What is the capital of France?"),
        ("How do I cook rice?", "¿Cómo puedo cocinar el arroz?"),
        ("What is the time in Tokyo?", "東京は何時ですか"),
        ("How do I reset it?", "Wie kann ich das zurücksetzen und wann?"),
        ("Làm sao để nấu cơm?", "Comment faire pour cuire du riz dans une casserole?"),
        ("Where is the station?", "Где находится вокзал?"),
        ("How do I cook rice?", "Lam sao de nau com cho nhieu nguoi?"),
    ],
    "numbers": [
        ("How many weeks are 14 days?", "How many weeks are 2 weeks?"),
        ("Convert 5 feet to inches", "Convert 60 inches to inches"),
        ("open 24/7 for a hundred guests", "open 24/7 for two hundred guests"),
        ("crowns of King Edward VII", "crowns of King Edward VIII"),
        ("rest for an hour and a half", "rest for 2 hours"),
        ("wait 3-4 days", "wait 34 days"),
        ("a loan of $10k", "a loan of $100k"),
        ("open at noon", "open at midnight"),
        ("2 rooms for 3 people", "3 rooms for 2 people"),
        ("subtract 5 from 9", "subtract 9 from 5"),
        ("20% of 450", "20% off 450"),
        ("the year 1000 AD", "the year 1000 BC"),
        ("open at 8 am", "open at 20:00"),
        ("track order 48213", "track order 48231"),
        ("track order ORD-48213", "track order ORD-48231"),
        ("refund after 2 weeks", "refund after 3 weeks"),
        ("two weeks of notice", "three weeks of notice"),
        ("take 500mg", "take 500ml"),
        ("open at 7am", "open at 7pm"),
        ("new in Python 3.9", "new in Python 3.11"),
        ("new in v1.2", "new in v1.3"),
        ("pay 1,000 euros", "pay 10,000 euros"),
        ("the 1st of May", "the 2nd of May"),
        ("on 2024-05-01", "on 2024-05-11"),
        ("How many megabytes in it?", "How many kilobytes in it?"),
        ("best films", "best films of 2024"),
        ("Convert 5 miles to km", "Convert 5 km to miles"),
        ("hoàn tiền sau 2 tuần", "hoàn tiền sau 3 tuần"),
        ("chuyển 1.000.000 đồng", "chuyển 10.000.000 đồng"),
        ("lam sao de nuoi hai con meo", "lam sao de nuoi ba con meo"),
    ],
    "problem": [
        (
            "Ann has 3 hats at $4 and 2 scarves. What does she pay?",
            "Ann has 3 hats at $4 and 2 scarves and gives one away. What does she pay?",
        ),
        (
            "A tank of 40 l gains 6 l an hour for 3 hours. How full is it?",
            "A tank of 40 l loses 6 l an hour for 3 hours. How full is it?",
        ),
    ],
    "comparison": [
        ("What is the best tent for winter?", "What is the lightest tent for winter?"),
        ("Which is the cheapest train to Oslo?", "Which is the fastest train to Oslo?"),
    ],
    "negation": [
        ("Is not voting a crime?", "Is voting a crime?"),
        ("Didn't get my refund, what now?", "Did get my refund, what now?"),
        ("It rings but I can't answer it.", "I can answer it but it doesn't ring."),
        ("What if I pay it?", "What if I fail to pay it?"),
        ("a drink with sugar", "a sugar-free drink with sugar"),
        ("How do I let the dog bark?", "How do I keep the dog from barking?"),
        ("Cancel my plan", "Don't cancel my plan"),
        ("Cancel my plan", "Do not cancel my plan"),
        ("Cancel my plan", "Don’t cancel my plan"),
        ("Which foods should I eat?", "Which foods should I not eat?"),
        ("a recipe with sugar", "a recipe without sugar"),
        ("Why does it restart?", "Why does it never restart?"),
        ("all countries", "all countries except one"),
        ("How do I make it bark?", "How do I stop it barking?"),
        ("Is it sold?", "Is it no longer sold?"),
        ("I can log in", "I cannot log in"),
        ("Tôi nên hủy đơn", "Tôi không nên hủy đơn"),
        ("Hãy gọi cho tôi", "Đừng gọi cho tôi"),
    ],
    "antonyms": [
        ("Translate into French: good morning", "Translate into French: good evening"),
        ("How do I sublet, that is rent out, a room?", "How do I sublet, that is rent, a room?"),
        ("How do I scale up a service?", "How do I scale down a service?"),
        ("What did it earn this year?", "What did it earn last year?"),
        ("until it ends", "once it ends"),
        ("turn on dark mode", "turn off dark mode"),
        ("turn the heating on", "turn the heating off"),
        ("enable two factor login", "disable two factor login"),
        ("How do I accept the offer?", "How do I decline the offer?"),
        ("increasing the limit", "decreased the limit"),
        ("the cheapest flight", "the most expensive flight"),
        ("the best film", "the worst film"),
        ("the pros and cons of it", "the pros of it"),
        ("foods for adults", "foods for children"),
        ("bật chế độ tối", "tắt chế độ tối"),
        ("bat che do toi", "tat che do toi"),
        ("thêm sản phẩm", "xóa sản phẩm"),
        ("cách đăng nhập", "cách đăng xuất"),
    ],
    "opposites": [
        ("the signs of hyperthyroidism", "the signs of hypothyroidism"),
        ("He is happy", "He is unhappy"),
        ("Is aspirin safe?", "Is aspirin unsafe?"),
        ("a refundable ticket", "a non-refundable ticket"),
        ("a formal letter", "an informal letter"),
        ("Is it possible?", "Is it impossible?"),
        ("Is it legal?", "Is it illegal?"),
        ("a painful treatment", "a painless treatment"),
        ("a regular verb", "an irregular verb"),
        ("How do I connect it?", "How do I disconnect it?"),
    ],
    "question": [
        ("Is tofu healthy?", "Why is tofu healthy?"),
        ("How often do I water it?", "How do I water it?"),
        ("How many people live there?", "Which people live there?"),
        ("How is glass made?", "Where is glass made?"),
        ("What is a monad?", "Give an example of a monad"),
        ("When was the tower built?", "Where was the tower built?"),
        ("Who built the tower?", "When was the tower built?"),
        ("Why do cells divide?", "How do cells divide?"),
        ("How many wines do I need?", "How much wine do I need?"),
        ("How long is the river?", "How old is the river?"),
        ("Ai xây tháp này?", "Khi nào xây tháp này?"),
        ("Tại sao xây tháp?", "Xây tháp ở đâu?"),
        ("Đi bao lâu?", "Đi bao xa?"),
        ("How deep is the lake?", "Where is the lake?"),
        ("What is recursion?", "When is recursion used?"),
    ],
    "modality": [
        ("My visa might be refused. Who pays?", "My visa is refused. Who pays?"),
        ("Can I skip this update?", "Must I skip this update?"),
        ("Can I skip this update?", "Should I skip this update?"),
        ("May I park here?", "Do I have to park here?"),
        ("Do all the owners have to sign?", "Can all the owners sign?"),
        ("What can I bring?", "What must I bring?"),
        ("Is it okay to park here?", "Is it necessary to park here?"),
        ("Tôi có được phép nghỉ không?", "Tôi có bắt buộc nghỉ không?"),
    ],
    "quantity": [
        ("Name every river", "Name a river"),
        ("delete all messages", "delete one message"),
        ("mute everyone", "mute someone"),
        ("bring more than one bag", "bring one bag"),
        ("select all rows", "select every other row"),
        ("Which planets have rings?", "Which planet has the most rings?"),
        ("Do all metals rust?", "Do any metals rust?"),
        ("Do all the owners sign?", "Does at least one of the owners sign?"),
        ("open all the doors", "open a single door"),
        ("Do both keys fit?", "Does either key fit?"),
        ("upload at least 5 files", "upload at most 5 files"),
        ("Does it always rain?", "Does it rain sometimes?"),
        ("Do most birds fly?", "Do birds fly?"),
        ("delete it from this phone", "delete it only from this phone"),
        ("xóa tất cả ảnh", "xóa một trong các ảnh"),
    ],
    "tense": [
        ("The lease ends in two months.", "The lease ended two months ago."),
        ("Was he the head of it?", "Is he the head of it?"),
        ("Has it been delivered?", "Will it be delivered?"),
        ("Who used to own it?", "Who owns it?"),
        ("When will the train leave?", "When was the train leaving?"),
        ("Did it rain?", "Will it rain?"),
        ("cửa hàng đã mở", "cửa hàng sẽ mở"),
    ],
    "entities": [
        ("the first of May", "the first of June"),
        ("capital of France", "capital of Spain"),
        ("whats the capital of australia", "whats the capital of austria"),
        ("sort a list in Python", "sort a list in Ruby"),
        ("sort a list in python", "sort a list in ruby"),
        ("Who is Ada Lovelace?", "Who is Alan Turing?"),
        ("the meeting on Monday", "the meeting on Tuesday"),
        ("convert 5 USD to EUR", "convert 5 USD to GBP"),
        ("the ratio of VTI", "the ratio of VOO"),
        ("Thủ đô của Pháp là gì?", "Thủ đô của Nhật là gì?"),
        ("thời tiết hà nội", "thời tiết đà nẵng"),
    ],
    "literals": [
        ("open notes.txt", "open todo.txt"),
        ("open the file", "open the file notes.txt"),
        ("write to ann@example.com", "write to bob@example.com"),
        ("fetch https://example.com/a", "fetch https://example.com/b"),
        ('What does "foo" mean?', 'What does "bar" mean?'),
        ("What does 'foo' mean?", "What does 'bar' mean?"),
        ("what is read_csv", "what is read_json"),
        ("does array.sort mutate", "does array.toSorted mutate"),
    ],
    "code": [
        ("What does NULL mean here?", "What does NOT NULL mean here?"),
        ("What is 5!", "What is 5?"),
        ("what is rm -r", "what is rm -rf"),
        ("what is `a == b`", "what is `a != b`"),
        ("what is a == b", "what is a != b"),
        ("is x < y", "is x <= y"),
        ("what is 2 + 3", "what is 2 * 3"),
        ("a && b", "a || b"),
        ("what does \\d match", "what does \\w match"),
        ("fix ```\nx = 1\n```", "fix ```\nx = 2\n```"),
        ("the <ul> tag", "the <ol> tag"),
    ],
    "form": [
        ("Sort a list in Rust", "Sort a list in Rust, code only"),
        ("Explain recursion", "Explain recursion in one sentence"),
        ("Explain recursion", "Explain recursion to a child"),
        ("Explain recursion briefly", "Explain recursion in detail"),
        ("Write a haiku about it", "Write a sonnet about it"),
        ("the causes of it", "the causes of it as JSON"),
        ("the causes of it", "the causes of it in bullet points"),
        ("Summarize the causes", "Explain the causes"),
        ("Giải thích đệ quy", "Giải thích đệ quy ngắn gọn"),
    ],
    "direction": [
        ("How do I go from Java 17 to Java 21?", "How do I go from Java 21 to Java 17?"),
        ("pay from my account", "pay to my account"),
        ("redirect http to https", "redirect https to http"),
        ("flight from Paris to Rome", "flight from Rome to Paris"),
        ("Convert miles to inches", "Convert inches to miles"),
        ("Is Rust better than Go?", "Is Go better than Rust?"),
        (
            "the formula to convert Celsius to Fahrenheit",
            "the formula to convert Fahrenheit to Celsius",
        ),
        ("use soda instead of powder", "use powder instead of soda"),
        ("Should I eat before running?", "Should I run before eating?"),
        ("translate this from Spanish to English", "translate this from English to Spanish"),
        ("vé từ Hà Nội đến Huế", "vé từ Huế đến Hà Nội"),
    ],
    "role": [
        ("Which firm bought Acme?", "Which firm did Acme buy?"),
        ("Who did Burr shoot?", "Who shot Burr?"),
        ("remove myself from it", "remove someone from it"),
        ("Who defeated France?", "Who did France defeat?"),
        ("Can I sue them?", "Can they sue me?"),
        ("How do I follow a friend?", "How does a friend follow me?"),
    ],
    "order": [
        ("What must a landlord give a tenant?", "What must a tenant give a landlord?"),
        ("my wife's allowance if I die", "my allowance if my wife dies"),
        ("How can parents help teachers?", "How can teachers help parents?"),
        ("Are all squares rectangles?", "Are all rectangles squares?"),
        ("the mother of the king", "the king of the mother"),
        ("the dog bites the man", "the man bites the dog"),
        ("Did Ann sue Bob?", "Did Bob sue Ann?"),
        ("cats chase mice", "mice chase cats"),
        ("What if my landlord owes me money?", "What if I owe my landlord money?"),
    ],
    "substitution": [
        ("What causes dysphagia?", "What causes dysphasia?"),
        ("the boiling point of butanol", "the boiling point of butanal"),
        ("subtract column A from it", "subtract column B from it"),
        ("How do I paint a roof?", "How do I paint a room?"),
        ("track my order", "cancel my order"),
        ("How much protein is in chicken breast?", "How much protein is in tofu breast?"),
        ("the melting point of copper", "the melting point of bronze"),
        ("points in a season game", "points in a playoff game"),
        ("the record points in a regular season game", "the record points in a playoff game"),
        ("does a cache keep a permanent redirect", "does a cache keep a temporary redirect"),
        ("cách nấu cơm trắng", "cách nấu phở trắng"),
        ("đổi mật khẩu ví", "quên mật khẩu ví"),
    ],
    "narrowing": [
        ("the flag of the Republic of Korea", "the flag of the Democratic Republic of Korea"),
        ("Are mushrooms healthy?", "Are raw mushrooms healthy?"),
        ("cancel my subscription", "cancel my annual subscription"),
        ("reset my router", "reset my router remotely"),
        ("sort a list in Python", "sort a list in Python in place"),
        ("delete a user", "delete a user and their files"),
        ("cancel an order", "cancel an order that has shipped"),
        ("the capital gains tax", "the long-term capital gains tax"),
        ("How do I deploy an app?", "How do I deploy an app on Heroku?"),
        ("What is the tax rate?", "What is the tax rate in Germany?"),
        ("What are the rules?", "What are the rules for minors?"),
        ("the maximum upload size", "the maximum upload size per file"),
        ("How do I rotate the key?", "How do I rotate the key during an outage?"),
        ("the highest peak in Africa", "the highest peak in North Africa"),
        ("What is the warranty?", "What is the warranty when it is bought used?"),
        ("Is the API rate limited?", "Is the API rate limited for unauthenticated callers?"),
        ("How do I sort a list?", "In Ruby, how do I sort a list?"),
        ("phí chuyển tiền", "phí chuyển tiền ở Mỹ"),
    ],
}

# Pairs that may share an answer: no guard may object.
SHARE: list[tuple[str, str]] = [
    ("How do I rent out my house?", "How do I rent my house out?"),
    ("What might cause a rash?", "What causes a rash?"),
    ("a lease of 12 months ends early", "a lease of 1 year ends early"),
    ("May I ask whether it is legal?", "Is it legal?"),
    ("Keep it for two weeks.", "Keep it for 14 days."),
    ("Bake it for an hour and a half.", "Bake it for 90 minutes."),
    ("Add half a kilo of rice.", "Add 500 g of rice."),
    ("Is a quarter of an acre enough?", "Is 0.25 acres enough?"),
    ("a house for $1.5 million", "a house for 1,500,000 dollars"),
    ("two hundred and forty steps", "240 steps"),
    ("Call me at 8 in the morning.", "Call me at 8 am."),
    ("Is it open at noon?", "Is it open at 12 pm?"),
    ("a loan of $10k", "a loan of $10,000"),
    ("the half-life of carbon-14", "the half life of carbon 14"),
    ("causes of World War II", "causes of World War 2"),
    ("Isn't it unsafe to swim there?", "Is it unsafe to swim there?"),
    ("I'm not able to open the file.", "I'm unable to open the file."),
    ("What if I don't have a key?", "What if I lack a key?"),
    ("A wasp stung me on the arm.", "I was stung on the arm by a wasp."),
    ("Compare tea and coffee for breakfast", "Compare coffee and tea for breakfast"),
    ("Is tea or coffee healthier?", "Which is healthier, coffee or tea?"),
    ("Hi! How do I mute it? Thanks in advance", "How do I mute it?"),
    ("I was wondering, how do I mute it?", "How do I mute it?"),
    ("more than five guests", "over five guests"),
    ("Is mould toxic to dogs?", "Is mould poisonous for dogs?"),
    ("the best way to peel garlic", "the easiest way to peel garlic"),
    (
        "A baker sells 40 rolls at 2 euros and 15 cakes at 9 euros on Monday, and half as much on"
        " Tuesday. How much money does the baker take on both days together?",
        "On Monday 40 rolls cost 2 euros each in a bakery, 15 cakes 9 euros each, and all are sold."
        " If Tuesday brings half of Monday's sales, what is taken in total?",
    ),
    ("What is the capital of France?", "What's France's capital city?"),
    ("Who invented the phone?", "By whom was the phone invented?"),
    ("Which firm makes it?", "It is made by which firm?"),
    ("What does the UN do?", "What does the United Nations do?"),
    ("How does AI affect jobs?", "How does artificial intelligence affect jobs?"),
    ("How do I recieve files over it?", "How do I receive files over it?"),
    ("Where is the nearest theater?", "Where is the nearest theatre?"),
    ("How tall is the tower in Paris?", "What is the height of the tower in Paris?"),
    ("open at 20:00", "open at 8 pm"),
    ("How do I resign from my job?", "How do I quit my job?"),
    ("How do I find a cheap flight?", "How do I find an inexpensive flight?"),
    ("How long is 26 miles in km?", "How long is 26 miles in kilometres?"),
    ("Good morning, I was wondering what it costs in Peru", "What does it cost in Peru?"),
    ("How does a dog like it?", "How does the dog like it?"),
    ("How many minutes should I boil an egg?", "How long should I boil an egg?"),
    ("a Python function that sorts it", "a function in Python that sorts it"),
    ("Which language suits beginners?", "Which language suits a beginner?"),
    ("He is not happy", "He is unhappy"),
    ("Is it rainy in May?", "Is it rainy in may?"),
    ("What is the capital of France?", "capital of France?"),
    ("How do I reset my password?", "How can I reset my password?"),
    ("How do I reset my password?", "I forgot my password, how do I reset it"),
    (
        "How do I reset my password?",
        "Please could you kindly tell me how I reset my password? Thanks!",
    ),
    ("pay 1,000 euros", "pay 1000 euros"),
    ("pay 1000 EUR", "pay €1000"),
    ("the best car under $7000", "the best car under 7000"),
    ("laptops under Rs 60000", "laptops under INR 60000"),
    ("the art of the twentieth century", "the art of the 20th century"),
    ("What caused the First World War?", "What caused World War One?"),
    ("enable 2FA", "enable two-factor authentication"),
    ("What is the fee?", "What is the fee, if you don't mind?"),
    ("clean it with no streaks", "clean it without streaks"),
    ("How can I skip it?", "How should I skip it?"),
    ("What can I do about it?", "What should I do about it?"),
    ("What are good novels?", "What are some good novels?"),
    ("Tell me how I reset it", "How do I reset it?"),
    ("Can you tell me what it costs?", "Should I ask what it costs?"),
    ("a notice of two weeks", "a notice of 2 weeks"),
    ("twenty five people", "25 people"),
    ("take 500 mg", "take 500mg"),
    ("open at 7am", "open at 7 AM"),
    ("bake at 400F", "bake at 400 degrees Fahrenheit"),
    ("I can't log in", "I cannot log in"),
    ("I can’t log in", "I can't log in"),
    ("delete a file", "delete files"),
    ("How do I purchase a ticket?", "How do I buy a ticket?"),
    ("organise the colours", "organize the colors"),
    ('What does "idempotent" mean?', "What does 'idempotent' mean?"),
    ("What does idempotent mean?", "What does 'idempotent' mean?"),
    ("the UK capital", "the capital of the United Kingdom"),
    ("flight from Paris to Rome", "flight to Rome from Paris"),
    ("the pros and cons of it", "the cons and pros of it"),
    ("Vim vs Emacs", "Emacs vs Vim"),
    ("reduce work stress", "reduce stress at work"),
    ("I lost my card", "My card is lost"),
    ("Where can I buy it?", "How can I buy it?"),
    ("What is a closure in JavaScript?", "Can you explain what JavaScript closures are?"),
    ("Should it be banned?", "Should it be banned or not?"),
    ("You are afraid", "You are afraid, aren't you?"),
    ("What does GDPR say?", "What does the General Data Protection Regulation say?"),
    ("What is the best film in the world?", "What is the best film?"),
    ("convert 72 F to Celsius", "Please convert 72 Fahrenheit to Celsius"),
    ("Thủ đô của Pháp là gì?", "thủ đô nước Pháp là gì"),
    ("Làm sao để đổi mật khẩu?", "Làm thế nào để đổi mật khẩu?"),
    ("Bạn có thể giúp tôi đổi mật khẩu không?", "Giúp tôi đổi mật khẩu"),
    ("xóa tài khoản", "xoá tài khoản"),
]

CASES = [(name, a, b) for name, pairs in OBJECTS.items() for a, b in pairs]


@pytest.mark.parametrize(("name", "a", "b"), CASES)
def test_a_guard_objects_to_its_traps_from_either_side(name: str, a: str, b: str) -> None:
    """Fault 62: a changed word that changes the answer is seen by the guard made for it."""
    assert GUARDS[name](facts(a), facts(b))
    assert GUARDS[name](facts(b), facts(a))
    assert veto(facts(a), facts(b))


@pytest.mark.parametrize(("a", "b"), SHARE)
def test_genuine_rewordings_pass_every_guard(a: str, b: str) -> None:
    """A cache that objects to everything is never wrong and of no use."""
    assert veto(facts(a), facts(b)) is None


def test_every_guard_has_traps_and_a_docstring_with_an_example() -> None:
    """The table in the file is the whole list; what is not tried here is not promised."""
    assert set(OBJECTS) == set(GUARDS)
    assert all('"' in (guard.__doc__ or "") for guard in GUARDS.values())


@pytest.mark.parametrize("name", list(GUARDS))
def test_each_guard_can_be_switched_off(name: str) -> None:
    """With all others off a guard speaks alone; switched off as well, nobody does."""
    a, b = map(facts, OBJECTS[name][0])
    others = frozenset(GUARDS) - {name}
    assert veto(a, b, off=others) == name
    assert veto(a, b, off=others | {name}) is None


ODD = "what is not don't on off 2 7am Paris == \" ` ``` \n from to không tắt new york . x_y ' US"
NUMBERS = "9/11 24/7 1/0 0/5 1/2 n/2 http/2 a an of half one hundred dozen million pm noon 3-4 XIV"
WORDS = st.sampled_from(
    [*ODD.split(" "), *NUMBERS.split(" "), "9" * 5_000, "unsafe", "safe", "-rf", "and", "or"]
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=14).map(" ".join))


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_a_text_is_never_kept_from_its_own_answer(text: str) -> None:
    """No text, however odd, is vetoed against itself, with spaces around it or without."""
    assert veto(facts(text), facts(text)) is None
    assert veto(facts(f" {text}\n"), facts(text)) is None


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_the_order_of_the_two_texts_never_matters(one: str, other: str) -> None:
    """What is stored first must not decide what is served."""
    a, b = facts(one), facts(other)
    assert veto(a, b) == veto(b, a)


@pytest.mark.parametrize("guard", GUARDS)
def test_texts_of_little_words_alone_are_judged(guard: str) -> None:
    """I11: no guard counts on a word that carries the question."""
    little = [facts(text) for text in ("please's thanks", "two's three", "Why?", "?")]
    assert {GUARDS[guard](a, b) for a in little for b in little} <= {True, False}


@pytest.mark.parametrize(
    "text", ["a" * 20_000, "'" * 20_000, "`" * 20_000, "1,1" * 7_000, "a." * 10_000, "a_" * 10_000]
)
def test_odd_long_texts_are_read_in_bounded_time(text: str) -> None:
    """A hostile prompt must not hold the worker: reading stays near linear."""
    began = time.process_time()
    facts(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        "a" + "'s" * 4_000,
        "How do I reset it" + "\n" * 8_000 + "?",
        "a.b" * 3_000,
        "a@" * 4_000,
        "ab12" * 2_000,
        "." * 8_000,
        "a!" * 4_000,
        "Is 10² am or pm?",
        "① Am I eligible for 5 ① months?",
        "²0 five",
    ],
    ids=lambda text: text[:8].strip(),
)
def test_no_text_crashes_the_reading_or_takes_it_long(text: str) -> None:
    """I11: linear in its length, whatever a caller sends."""
    began = time.process_time()
    read = facts(text)
    assert veto(read, facts("How do I reset it?")) != ""
    assert time.process_time() - began < 0.5  # the worst of them once took 3.5 s
