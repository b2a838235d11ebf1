"""Kinds about countries: capitals and continents."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.english import phrased, rows
from instruction_kinds.record import Record

# country | capital | continent
COUNTRIES = """
France | Paris | Europe
Germany | Berlin | Europe
Italy | Rome | Europe
Spain | Madrid | Europe
Portugal | Lisbon | Europe
Austria | Vienna | Europe
Greece | Athens | Europe
Poland | Warsaw | Europe
Hungary | Budapest | Europe
Norway | Oslo | Europe
Sweden | Stockholm | Europe
Finland | Helsinki | Europe
Denmark | Copenhagen | Europe
Ireland | Dublin | Europe
Belgium | Brussels | Europe
Iceland | Reykjavik | Europe
Romania | Bucharest | Europe
Bulgaria | Sofia | Europe
Croatia | Zagreb | Europe
Ukraine | Kyiv | Europe
Japan | Tokyo | Asia
China | Beijing | Asia
India | New Delhi | Asia
Thailand | Bangkok | Asia
Vietnam | Hanoi | Asia
South Korea | Seoul | Asia
Nepal | Kathmandu | Asia
Mongolia | Ulaanbaatar | Asia
Pakistan | Islamabad | Asia
Iran | Tehran | Asia
Egypt | Cairo | Africa
Kenya | Nairobi | Africa
Morocco | Rabat | Africa
Ghana | Accra | Africa
Nigeria | Abuja | Africa
Ethiopia | Addis Ababa | Africa
Tunisia | Tunis | Africa
Senegal | Dakar | Africa
Peru | Lima | South America
Chile | Santiago | South America
Argentina | Buenos Aires | South America
Brazil | Brasília | South America
Colombia | Bogotá | South America
Ecuador | Quito | South America
Uruguay | Montevideo | South America
Venezuela | Caracas | South America
Canada | Ottawa | North America
Mexico | Mexico City | North America
Cuba | Havana | North America
Australia | Canberra | Oceania
"""


def capitals(rng: Random) -> Iterator[Record]:
    asks = [
        "What is the capital of {country}?",
        "Name the capital city of {country}.",
        "Which city is the capital of {country}?",
    ]
    for country, capital, _ in rng.sample(rows(COUNTRIES), k=36):
        yield Record(phrased(rng, asks, country=country), "", f"The capital of {country} is {capital}.")
    for country, capital, _ in rng.sample(rows(COUNTRIES), k=8):
        yield Record(f"{capital} is the capital of which country?", "", f"{capital} is the capital of {country}.")


def continents(rng: Random) -> Iterator[Record]:
    asks = ["On which continent is {country}?", "Which continent is {country} part of?"]
    for country, _, continent in rng.sample(rows(COUNTRIES), k=16):
        yield Record(phrased(rng, asks, country=country), "", f"{country} is in {continent}.")
