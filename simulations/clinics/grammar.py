"""Vocabulary of the synthetic clinics: conditions, invented drugs, and the words shared by public and private text.

Every drug name is invented, so that no generated line can be mistaken for medical advice.
"""

from dataclasses import dataclass

__all__ = [
    "ABBREVIATIONS",
    "ADVICE",
    "CONDITIONS",
    "DEPARTMENTS",
    "DOSES",
    "DRUGS",
    "FREQUENCIES",
    "HISTORY",
    "REVIEWS",
    "SEVERITIES",
    "SPANS",
    "TESTS",
    "Condition",
]


@dataclass(frozen=True)
class Condition:
    """One condition as public leaflets describe it."""

    name: str
    organ: str
    symptoms: tuple[str, ...]
    findings: tuple[str, ...]
    drugs: tuple[str, ...]
    tests: tuple[str, ...]
    department: str


def _condition(name: str, organ: str, symptoms: str, findings: str, drugs: str, tests: str, dept: str) -> Condition:
    """Return a condition built from comma-separated lists."""

    def listed(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(","))

    return Condition(name, organ, listed(symptoms), listed(findings), listed(drugs), listed(tests), dept)


CONDITIONS: tuple[Condition, ...] = (
    _condition(
        "asthma",
        "airways",
        "wheeze, tight chest, night cough, short of breath",
        "expiratory wheeze, low peak flow, fast breathing",
        "velarin, bronex, ombrelin",
        "PEF, CXR, FBC",
        "chest",
    ),
    _condition(
        "pneumonia",
        "lungs",
        "fever, wet cough, chest pain on breathing, chills",
        "basal crackles, dull base, low oxygen",
        "cefadrin, amoxidol, tervacin",
        "CXR, FBC, CRP",
        "chest",
    ),
    _condition(
        "bronchitis",
        "airways",
        "chesty cough, sore chest, phlegm, mild fever",
        "scattered wheeze, clear bases, coarse sounds",
        "bronex, amoxidol, mucolan",
        "CXR, PEF, CRP",
        "chest",
    ),
    _condition(
        "sinusitis",
        "sinuses",
        "blocked nose, facial pain, headache, thick discharge",
        "tender cheeks, swollen turbinates, nasal pus",
        "nasofen, amoxidol, claritex",
        "CRP, FBC, swab",
        "ear and throat",
    ),
    _condition(
        "tonsillitis",
        "throat",
        "sore throat, fever, painful swallowing, swollen glands",
        "red tonsils, white spots, neck nodes",
        "penvaril, cefadrin, dolorine",
        "swab, FBC, CRP",
        "ear and throat",
    ),
    _condition(
        "otitis",
        "ear",
        "ear pain, hearing loss, fever, ear discharge",
        "red drum, bulging drum, tender ear",
        "amoxidol, otirex, dolorine",
        "swab, audio, FBC",
        "ear and throat",
    ),
    _condition(
        "migraine",
        "nerves",
        "throbbing headache, nausea, light hurts, flashing lights",
        "normal fundi, no neck stiffness, normal power",
        "triptalan, dolorine, propanex",
        "BP, ESR, CT",
        "nerve",
    ),
    _condition(
        "vertigo",
        "inner ear",
        "spinning room, nausea, unsteady walk, ringing ears",
        "side nystagmus, positive tilt test, normal gait",
        "stemetrol, betavert, propanex",
        "audio, BP, CT",
        "nerve",
    ),
    _condition(
        "sciatica",
        "lower back",
        "back pain, leg pain, numb foot, tingling",
        "straight leg raise 40, weak toe, absent ankle jerk",
        "naproxil, gabalin, dolorine",
        "MRI, ESR, U&E",
        "bone",
    ),
    _condition(
        "gout",
        "joints",
        "hot toe, painful joint, swollen foot, night pain",
        "red joint, tender toe, warm swelling",
        "colchira, naproxil, urolase",
        "urate, U&E, CRP",
        "bone",
    ),
    _condition(
        "arthritis",
        "joints",
        "stiff hands, knee pain, morning stiffness, swollen joints",
        "joint swelling, weak grip, crepitus",
        "naproxil, methorin, predazol",
        "ESR, RhF, X-ray",
        "bone",
    ),
    _condition(
        "eczema",
        "skin",
        "itchy skin, dry patches, cracked hands, red rash",
        "scaly plaques, scratch marks, flexural rash",
        "dermavate, claritex, emolan",
        "swab, IgE, FBC",
        "skin",
    ),
    _condition(
        "cellulitis",
        "skin",
        "hot leg, spreading redness, fever, sore skin",
        "warm erythema, clear margin, leg swelling",
        "penvaril, tervacin, cefadrin",
        "swab, CRP, FBC",
        "skin",
    ),
    _condition(
        "cystitis",
        "bladder",
        "burning urine, frequent urine, low belly pain, cloudy urine",
        "tender bladder, nitrites positive, no loin pain",
        "nitrolan, trimadol, cefadrin",
        "MSU, dip, U&E",
        "kidney",
    ),
    _condition(
        "kidney stone",
        "kidney",
        "loin pain, blood in urine, vomiting, pain in waves",
        "loin tenderness, blood on dip, restless",
        "dicloran, tamsorin, dolorine",
        "CT, U&E, dip",
        "kidney",
    ),
    _condition(
        "reflux",
        "stomach",
        "heartburn, sour taste, belching, pain after meals",
        "soft belly, mild epigastric pain, normal weight",
        "omezolin, ranitol, algicid",
        "FBC, H.pyl, scope",
        "gut",
    ),
    _condition(
        "gastritis",
        "stomach",
        "upper belly pain, nausea, bloating, poor appetite",
        "epigastric tenderness, pale eyes, soft belly",
        "ranitol, omezolin, stemetrol",
        "H.pyl, FBC, scope",
        "gut",
    ),
    _condition(
        "hypertension",
        "blood vessels",
        "no symptoms, dull headache, nose bleeds, tired",
        "BP 168/98, normal fundi, loud heart sound",
        "lisinorm, amlodex, propanex",
        "U&E, ECG, BP",
        "heart",
    ),
    _condition(
        "angina",
        "heart",
        "chest tightness, pain on stairs, left arm ache, breathless",
        "normal pulse, no murmur, sweaty",
        "nitrolex, propanex, aspiral",
        "ECG, trop, lipids",
        "heart",
    ),
    _condition(
        "anemia",
        "blood",
        "tired, pale, dizzy on standing, short of breath",
        "pale eyes, fast pulse, smooth tongue",
        "ferrolan, folivit, cobalex",
        "FBC, iron, B12",
        "blood",
    ),
)

DRUGS: tuple[str, ...] = tuple(sorted({drug for condition in CONDITIONS for drug in condition.drugs}))
TESTS: tuple[str, ...] = tuple(sorted({test for condition in CONDITIONS for test in condition.tests}))
DEPARTMENTS: tuple[str, ...] = tuple(sorted({condition.department for condition in CONDITIONS}))

DOSES: tuple[int, ...] = (5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 100, 120, 150, 200, 250, 300, 400, 500, 600, 800)
FREQUENCIES: dict[str, str] = {
    "od": "once a day",
    "bd": "twice a day",
    "tds": "three times a day",
    "qds": "four times a day",
    "nocte": "at night",
    "prn": "when needed",
}
SPANS: tuple[str, ...] = ("3/7", "5/7", "7/7", "10/7", "14/7", "21/7", "28/7")
REVIEWS: tuple[str, ...] = ("48h", "3/7", "1/52", "2/52", "3/52", "4/52", "6/52", "3/12", "prn")
SEVERITIES: tuple[str, ...] = ("mild", "mod", "sev")
ADVICE: tuple[str, ...] = (
    "rest",
    "fluids",
    "walk daily",
    "no smoking",
    "less salt",
    "sleep well",
    "warm packs",
    "ice packs",
    "stretch",
    "food diary",
    "avoid alcohol",
    "home readings",
)
HISTORY: tuple[str, ...] = (
    "nil",
    "diabetes",
    "stroke",
    "thyroid",
    "smoker",
    "hay fever",
    "hip surgery",
    "depression",
    "epilepsy",
    "glaucoma",
)
ABBREVIATIONS: dict[str, str] = {
    **FREQUENCIES,
    "O/E": "on examination",
    "PMH": "past medical history",
    "NKDA": "no known drug allergies",
    "Imp": "impression",
    "Dx": "diagnosis",
    "Rx": "prescription",
    "Inv": "investigation",
    "Adv": "advice",
    "Rv": "review",
    "Ref": "referral",
    "hx": "history",
    "bg": "background",
    "7/7": "seven days",
    "2/52": "two weeks",
    "3/12": "three months",
    "mod": "moderate",
    "sev": "severe",
    "c/o": "complains of",
    "sig": "signed by",
    "tel": "telephone",
    "d": "days",
}
