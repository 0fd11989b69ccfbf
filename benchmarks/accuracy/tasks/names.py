"""Words that invented facts are made of: common enough that a model reads them as what they stand for."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Maria Henrik Amara Diego Ingrid Tomas Leila Viktor Sofia Rahul Greta Pablo Hana Oskar Nadia Emil "
    "Clara Joao Petra Samuel Yuki Anton Zara Felix Elena Marcus Lucia Arjun Freya Mateo Irene Stefan"
)
LAST_NAMES = _words(
    "Lindqvist Okafor Moreau Tanaka Fischer Novak Silva Haddad Kowalski Larsen Rossi Petrov Mendes Sharma "
    "Becker Costa Ivanova Jansen Murphy Navarro Olsen Pereira Quinn Romano Schmidt Torres Vargas Weber "
    "Young Zimmer Bergman Castillo"
)
CITIES = _words(
    "Uppsala Lisbon Nairobi Kyoto Bremen Cordoba Tampere Lyon Quito Gdansk Bergen Cairo Porto Mumbai "
    "Vienna Seattle Dublin Hanoi Malaga Zagreb Toronto Leipzig Accra Oslo Havana Turin Boston Ghent Riga "
    "Seoul"
)
OBJECTS = _words(
    "safe locker gate vault garage cabinet office archive cellar warehouse laboratory library tower "
    "workshop theatre museum station studio bunker hangar"
)
COLOURS = _words(
    "amber azure beige black blue bronze brown coral crimson cyan golden green grey indigo ivory lilac "
    "magenta maroon olive orange pink plum purple red rusty scarlet silver teal violet white yellow"
)
ANIMALS = _words(
    "badger bear beaver bison camel cat crane crow deer dog dolphin donkey eagle falcon ferret fox frog "
    "goat goose hawk heron horse lion lizard llama moose mouse otter owl panda parrot pigeon pony rabbit "
    "raven salmon seal shark sheep snake spider swan tiger turtle walrus whale wolf zebra"
)
