"""Substances and units.

Sources: names and formulas as IUPAC's Compendium of Chemical Terminology has them; units from the SI Brochure (BIPM,
9th edition).
"""

from __future__ import annotations

COMPOUNDS = {
    "water": "H2O", "carbon dioxide": "CO2", "carbon monoxide": "CO", "table salt": "NaCl", "ammonia": "NH3",
    "methane": "CH4", "propane": "C3H8", "butane": "C4H10", "ethanol": "C2H6O", "methanol": "CH4O",
    "glucose": "C6H12O6", "sucrose": "C12H22O11", "hydrogen peroxide": "H2O2", "sulfuric acid": "H2SO4",
    "hydrochloric acid": "HCl", "nitric acid": "HNO3", "acetic acid": "C2H4O2", "sodium hydroxide": "NaOH",
    "calcium carbonate": "CaCO3", "sodium bicarbonate": "NaHCO3", "ozone": "O3", "nitrous oxide": "N2O",
    "benzene": "C6H6", "acetone": "C3H6O", "potassium chloride": "KCl", "iron(III) oxide": "Fe2O3",
    "silicon dioxide": "SiO2", "calcium oxide": "CaO", "magnesium oxide": "MgO", "aluminium oxide": "Al2O3",
    "sulfur dioxide": "SO2", "nitrogen dioxide": "NO2", "phosphoric acid": "H3PO4", "hydrogen sulfide": "H2S",
    "silver nitrate": "AgNO3", "copper(II) sulfate": "CuSO4", "potassium permanganate": "KMnO4",
    "sodium carbonate": "Na2CO3", "calcium hydroxide": "CaH2O2", "ethene": "C2H4", "ethyne": "C2H2",
    "urea": "CH4N2O", "caffeine": "C8H10N4O2", "aspirin": "C9H8O4", "citric acid": "C6H8O7", "titanium dioxide": "TiO2",
    "zinc oxide": "ZnO", "octane": "C8H18", "toluene": "C7H8", "formaldehyde": "CH2O",
}  # fmt: skip
OTHER_FORMULAS = {
    "ethanol": ("C2H5OH", "CH3CH2OH"), "methanol": ("CH3OH",), "acetic acid": ("CH3COOH", "CH3CO2H"),
    "calcium hydroxide": ("Ca(OH)2",), "ethene": ("CH2=CH2", "H2C=CH2"), "ethyne": ("HC≡CH", "CH≡CH"),
    "urea": ("CO(NH2)2", "(NH2)2CO", "NH2CONH2"), "acetone": ("CH3COCH3", "(CH3)2CO"), "formaldehyde": ("HCHO", "H2CO"),
    "toluene": ("C6H5CH3",), "citric acid": ("H3C6H5O7",),
}  # fmt: skip
"""As chemists write some of them, by groups."""
OTHER_NAMES = {"aluminum": "aluminium", "cesium": "caesium", "sulfur": "sulphur"}
"""British names of elements."""

OTHER_QUANTITIES = {
    "electric charge": ("Charge",), "electric current": ("Current",), "electric potential": ("Voltage",),
    "electrical resistance": ("Resistance",), "electrical conductance": ("Conductance",),
    "magnetic flux density": ("Magnetic field",), "thermodynamic temperature": ("Temperature",),
    "absorbed radiation dose": ("Absorbed dose", "Radiation dose"), "radioactivity": ("Radioactive decay",),
}  # fmt: skip
"""Names of quantities in daily use."""

SI_UNITS = (
    # quantity, unit, symbol, what it is made of
    ("force", "newton", "N", "one newton accelerates one kilogram by one metre per second squared"),
    ("energy", "joule", "J", "one joule is one newton metre"),
    ("power", "watt", "W", "one watt is one joule per second"),
    ("pressure", "pascal", "Pa", "one pascal is one newton per square metre"),
    ("frequency", "hertz", "Hz", "one hertz is one cycle per second"),
    ("electric charge", "coulomb", "C", "one coulomb is one ampere second"),
    ("electric current", "ampere", "A", "it is one of the seven base units"),
    ("electric potential", "volt", "V", "one volt is one joule per coulomb"),
    ("electrical resistance", "ohm", "Ω", "one ohm is one volt per ampere"),
    ("capacitance", "farad", "F", "one farad is one coulomb per volt"),
    ("inductance", "henry", "H", "one henry is one weber per ampere"),
    ("magnetic flux", "weber", "Wb", "one weber is one volt second"),
    ("magnetic flux density", "tesla", "T", "one tesla is one weber per square metre"),
    ("electrical conductance", "siemens", "S", "one siemens is one ampere per volt"),
    ("radioactivity", "becquerel", "Bq", "one becquerel is one decay per second"),
    ("absorbed radiation dose", "gray", "Gy", "one gray is one joule per kilogram"),
    ("luminous intensity", "candela", "cd", "it is one of the seven base units"),
    ("luminous flux", "lumen", "lm", "one lumen is one candela steradian"),
    ("illuminance", "lux", "lx", "one lux is one lumen per square metre"),
    ("thermodynamic temperature", "kelvin", "K", "it is one of the seven base units"),
    ("amount of substance", "mole", "mol", "one mole is 6.02214076e23 entities"),
    ("mass", "kilogram", "kg", "it is defined by the Planck constant"),
    ("length", "metre", "m", "it is defined by the speed of light"),
    ("time", "second", "s", "it is defined by the caesium-133 atom"),
    ("catalytic activity", "katal", "kat", "one katal is one mole per second"),
)
