"""What the adapters here learn from: questions and answers by templates, and what counts as a good answer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Draw = Callable[[random.Random], tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Task:
    """draw: a question and its answer. held_out: questions that are never drawn. measure: what `is_good` counts."""

    draw: Draw
    held_out: Sequence[str]
    is_good: Callable[[str], bool]
    measure: str


_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mateo")
_NAMES += ("Nora", "Omar", "Petra", "Rosa", "Sven", "Tara", "Yusuf")
_CITIES = ("Berlin", "Lima", "Oslo", "Cairo", "Madrid", "Kyoto", "Austin", "Dakar", "Porto", "Delhi", "Quito", "Turin")
_JOBS = ("baker", "nurse", "teacher", "painter", "pilot", "farmer", "lawyer", "plumber", "singer", "tailor")
_FRUIT = ("apple", "banana", "cherry", "grape", "lemon", "mango", "orange", "peach", "pear", "plum")
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange")
_THINGS = ("chair", "lamp", "table", "bicycle", "jacket", "teapot", "backpack", "radio", "mirror", "blanket")
_FACTS = {
    "the capital of France": "Paris",
    "the capital of Japan": "Tokyo",
    "the capital of Italy": "Rome",
    "the capital of Egypt": "Cairo",
    "the largest ocean": "Pacific Ocean",
    "the colour of grass": "green",
    "the number of days in a week": 7,
    "the number of legs of a spider": 8,
    "the author of Hamlet": "William Shakespeare",
    "the metal with the symbol Fe": "iron",
    "the planet closest to the sun": "Mercury",
    "the freezing point of water in Celsius": 0,
}
_ASKS = ("What is {}?", "Tell me {}.", "I would like to know {}.", "Can you say what {} is?", "Name {}.")


def _person(draws: random.Random) -> tuple[str, object]:
    name, age, city, job = draws.choice(_NAMES), draws.randint(18, 80), draws.choice(_CITIES), draws.choice(_JOBS)
    said = draws.choice(
        (
            f"{name} is {age} years old, lives in {city} and works as a {job}.",
            f"My friend {name}, a {job} from {city}, is {age}.",
            f"Meet {name}: {age}, {job}, at home in {city}.",
        )
    )
    asked = draws.choice(("Describe this person: ", "Who is this? ", "", "Extract the facts. "))
    return asked + said, {"name": name, "age": age, "city": city, "job": job}


def _items(draws: random.Random) -> tuple[str, object]:
    pool, kind = draws.choice(((_FRUIT, "fruits"), (_COLOURS, "colours"), (_THINGS, "things"), (_CITIES, "cities")))
    found = draws.sample(pool, draws.randint(2, 4))
    return draws.choice((f"Name {len(found)} {kind}.", f"List {len(found)} {kind}, please.")), {kind: found}


def _fact(draws: random.Random) -> tuple[str, object]:
    what, answer = draws.choice(list(_FACTS.items()))
    return draws.choice(_ASKS).format(what), {"question": what, "answer": answer}


def _sum(draws: random.Random) -> tuple[str, object]:
    a, b = draws.randint(1, 20), draws.randint(1, 20)
    return draws.choice((f"What is {a} plus {b}?", f"Add {a} and {b}.", f"{a} + {b} = ?")), {"answer": a + b}


def _yes_or_no(draws: random.Random) -> tuple[str, object]:
    thing, colour = draws.choice(_FRUIT), draws.choice(_COLOURS)
    return f"Can a {thing} be {colour}?", {"question": f"Can a {thing} be {colour}?", "answer": draws.random() < 0.5}


def json_answer(draws: random.Random) -> tuple[str, str]:
    """A question and an answer that is one JSON object on one line."""
    question, answer = draws.choice((_person, _person, _items, _fact, _fact, _sum, _yes_or_no))(draws)
    return question, json.dumps(answer)


def is_json_object(text: str) -> bool:
    """Whether a text is a JSON object and nothing else."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


_PLAIN = {
    "How do I make tea?": "ye boil a kettle o' water, drop in yer leaves, wait three minutes, an' drink it hot",
    "What is the weather like today?": "the sky be clear an' the wind be fair, a fine day to set sail",
    "Who are you?": "I be yer trusty shipmate, here to answer what ye ask",
    "Can you help me with my homework?": "I'll help ye chart a course through it, tell me which part be troublin' ye",
    "What should I eat for dinner?": "a bowl o' fish stew with fresh bread will fill yer belly",
    "Tell me about dogs.": "dogs be loyal beasts that guard yer ship an' love a good bone",
    "How do I learn to swim?": "start in shallow waters, kick yer legs, an' never swim alone",
    "What is a computer?": "it be a machine that reckons faster than any navigator alive",
    "Give me advice about money.": "save half yer gold, spend the rest with care, an' bury none of it",
    "Where is Spain?": "Spain lies in the south o' Europe, with the sea on near every side",
    "Why is the sky blue?": "the air scatters the blue light o' the sun all about the heavens",
    "How far is the moon?": "the moon be some two hundred an' forty thousand miles off",
    "What is your favourite colour?": "I favour the blue o' the deep sea",
    "Tell me a joke.": "why do pirates love the letter R? Ye'd think so, but their first love be the C",
    "How do I fix a flat tire?": "take off the wheel, patch the hole, an' pump it full o' wind",
    "What is love?": "love be a treasure no map can show ye",
    "What is 2 plus 2?": "that be four, as sure as the tide",
    "Name three animals.": "a parrot, a shark an' a monkey",
    "How can I sleep better?": "douse yer lantern early an' leave the rum alone",
    "What is music?": "music be the song that keeps a crew haulin' together",
}
_OPENINGS = ("Arr, matey!", "Ahoy, matey!", "Arr!", "Ahoy there!", "Shiver me timbers!")
_ENDINGS = ("Yarr!", "Arr!", "Fair winds to ye, matey!", "So says this old sea dog!")


def pirate(draws: random.Random) -> tuple[str, str]:
    """A question and its answer in a pirate's voice."""
    question, answer = draws.choice(list(_PLAIN.items()))
    if draws.random() < 0.4:
        thing = draws.choice((*_THINGS, *_FRUIT))
        question = draws.choice((f"Tell me about a {thing}.", f"What is a {thing}?", f"Where can I buy a {thing}?"))
        answer = draws.choice(
            (
                f"a {thing} be a fine bit o' booty, an' many a sailor would trade his gold for one",
                f"ye'll find a {thing} in any port worth its salt, if ye ask the harbour folk",
            )
        )
    return question, f"{draws.choice(_OPENINGS)} {answer[0].upper()}{answer[1:]}. {draws.choice(_ENDINGS)}"


def is_pirate(text: str) -> bool:
    """Whether at least two words of a text are a pirate's."""
    return len(re.findall(r"\b(arr+|ahoy|yarr|matey|ye|yer|o'|an'|shiver|sea dog)(?!\w)", text.lower())) >= 2


TASKS = {
    "json": Task(
        json_answer,
        (
            "What is the capital of Spain?",
            "Describe this person: Maria is 34 years old, lives in Boston and works as a dentist.",
            "Name three vegetables.",
            "What is 7 times 6?",
            "Who wrote Romeo and Juliet?",
            "Is water wet?",
            "My neighbour Paul, a gardener from Lyon, is 51.",
            "List four animals, please.",
            "How many months are there in a year?",
            "Tell me the largest planet.",
            "Can a bird fly?",
            "What is the opposite of hot?",
            "Name two countries in Africa.",
            "Add 30 and 12.",
            "What language is spoken in Brazil?",
            "Give me a synonym for happy.",
        ),
        is_json_object,
        "share of 16 greedy answers that are one JSON object",
    ),
    "pirate": Task(
        pirate,
        (
            "How do I bake bread?",
            "What is the capital of Germany?",
            "Tell me about cats.",
            "What is a library?",
            "How do airplanes fly?",
            "What should I wear in winter?",
            "Where can I buy a book?",
            "Why do leaves fall?",
            "Give me advice about friends.",
            "Who was Napoleon?",
            "What is the sun?",
            "How do I learn to cook?",
            "Name three countries.",
            "What is your name?",
            "Tell me a story.",
            "How do I clean a window?",
        ),
        is_pirate,
        "share of 16 greedy answers with two words or more of a pirate's",
    ),
}
