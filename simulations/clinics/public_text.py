"""Generator of the public corpus: leaflets, glossaries, drug sheets, questions and generic visit notes.

The corpus teaches the words and the grammar of notes. It holds no site's own conventions: in its generic notes
the labels, the order, the drug, the dose and the review are drawn at random.
"""

from collections.abc import Iterator
from random import Random

from simulations.clinics.grammar import (
    ABBREVIATIONS,
    ADVICE,
    CONDITIONS,
    DEPARTMENTS,
    DOSES,
    DRUGS,
    FREQUENCIES,
    HISTORY,
    REVIEWS,
    SEVERITIES,
    SPANS,
    TESTS,
    Condition,
)

__all__ = ["documents", "public_texts"]

USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"

_FIRST_NAMES = ("Ann", "Ben", "Cara", "Dev", "Eli", "Fay", "Gus", "Hana", "Ivo", "June", "Kit", "Lena")
_LAST_NAMES = ("Ashdown", "Birch", "Cole", "Dunmore", "Elwood", "Frost", "Garland", "Holt", "Ives", "Jarrow")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def documents(rng: Random, count: int) -> Iterator[str]:
    """Yield ``count`` public documents drawn from ``rng``."""
    makers = (_leaflet, _symptom_page, _drug_sheet, _glossary, _exchange, _contact_line, _prose_note, _short_note)
    weights = (14, 10, 8, 6, 10, 4, 14, 34)
    for maker in rng.choices(makers, weights, k=count):
        yield maker(rng)


def _listed(words: list[str], joiner: str = "and") -> str:
    """Return the words as an English list."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joiner} {words[-1]}"


def _some(rng: Random, words: tuple[str, ...], low: int, high: int) -> list[str]:
    """Return between ``low`` and ``high`` distinct words in random order."""
    return rng.sample(words, min(len(words), rng.randint(low, high)))


def _leaflet(rng: Random) -> str:
    """Return a leaflet about one condition."""
    condition = rng.choice(CONDITIONS)
    name, symptoms = condition.name, _some(rng, condition.symptoms, 2, 4)
    openings = (
        f"{name.capitalize()} is a condition of the {condition.organ}.",
        f"What is {name}? It is a problem of the {condition.organ}.",
        f"About {name}. This leaflet is about {name}, which affects the {condition.organ}.",
    )
    middles = [
        f"Common symptoms are {_listed(symptoms)}.",
        f"People may notice {_listed(symptoms, 'or')}.",
        f"On examination a doctor may find {_listed(_some(rng, condition.findings, 1, 3))}.",
        f"It may be treated with {_listed(_some(rng, condition.drugs, 1, 3), 'or')}.",
        f"Useful tests are {_listed(_some(rng, condition.tests, 2, 3))}.",
        f"General advice: {_listed(_some(rng, ADVICE, 1, 3))}.",
        f"Severe cases are seen by the {condition.department} clinic.",
        f"Most cases are {rng.choice(('mild', 'moderate'))} and settle in {rng.randint(2, 21)} days.",
    ]
    return " ".join([rng.choice(openings), *rng.sample(middles, rng.randint(3, 5))])


def _symptom_page(rng: Random) -> str:
    """Return a page that leads from symptoms and findings to a condition."""
    condition = rng.choice(CONDITIONS)
    symptoms = _listed(_some(rng, condition.symptoms, 2, 3))
    findings = _listed(_some(rng, condition.findings, 1, 2))
    forms = (
        f"A patient with {symptoms} and with {findings} is likely to have {condition.name}.",
        f"If there is {symptoms}, think of {condition.name}. Look for {findings}.",
        f"{symptoms.capitalize()}: these suggest {condition.name}, above all with {findings}.",
        f"Signs of {condition.name}: {findings}. Symptoms of {condition.name}: {symptoms}.",
    )
    return rng.choice(forms)


def _drug_sheet(rng: Random) -> str:
    """Return a sheet about one invented drug."""
    drug = rng.choice(DRUGS)
    uses = [condition.name for condition in CONDITIONS if drug in condition.drugs]
    doses = [f"{dose}{rng.choice((' mg', 'mg'))}" for dose in sorted(rng.sample(DOSES, 3))]
    parts = [
        f"{drug.capitalize()} comes as {_listed(doses)}.",
        f"{drug.capitalize()} is used for {_listed(uses)}.",
        f"Take it {rng.choice(list(FREQUENCIES.values()))} for {rng.randint(3, 28)} days.",
        f"Do not take {drug} if you have an allergy to {drug}; {rng.choice(DRUGS)} may be given instead.",
        f"Older patients may need less {drug}.",
    ]
    return " ".join(rng.sample(parts, rng.randint(2, 4)))


def _glossary(rng: Random) -> str:
    """Return a few glossary lines."""
    joiner = rng.choice((" means ", ": ", " is short for ", " = "))
    pairs = rng.sample(list(ABBREVIATIONS.items()), rng.randint(3, 6))
    return " ".join(f"{short}{joiner}{long}." for short, long in pairs)


def _exchange(rng: Random) -> str:
    """Return one question and answer in the chat form."""
    condition = rng.choice(CONDITIONS)
    short, long = rng.choice(list(ABBREVIATIONS.items()))
    pairs = (
        (f"What are the symptoms of {condition.name}?", f"{_listed(_some(rng, condition.symptoms, 2, 4))}."),
        (f"What may treat {condition.name}?", f"{_listed(_some(rng, condition.drugs, 1, 3), 'or')}."),
        (f"Which tests help in {condition.name}?", f"{_listed(_some(rng, condition.tests, 2, 3))}."),
        (f"I have {_listed(_some(rng, condition.symptoms, 2, 3))}. What is it?", f"It may be {condition.name}."),
        (f"What does {short} mean?", f"{short} means {long}."),
        (f"Write a note about {condition.name}.", _short_note(rng, condition)),
    )
    question, answer = rng.choice(pairs)
    system = f"{SYSTEM}You help at a clinic.<|eos|>" if rng.random() < 0.3 else ""
    return f"{system}{USER}{question}<|eos|>{ASSISTANT}{answer}"


def _contact_line(rng: Random) -> str:
    """Return a public desk number in the fictional 555-01 range."""
    name = f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
    number = f"555-01{rng.randrange(100):02d}-{rng.randrange(10**6):06d}"
    forms = (
        f"For the {rng.choice(DEPARTMENTS)} clinic call {name} on {number}.",
        f"Contact: {name}, tel {number}.",
        f"Desk {rng.randint(1, 99)}, tel {number}. Ask for {name}.",
    )
    return rng.choice(forms)


def _prose_note(rng: Random) -> str:
    """Return a generic visit in full sentences."""
    condition = rng.choice(CONDITIONS)
    who = f"{rng.randint(18, 92)}-year-old {rng.choice(('woman', 'man'))}"
    symptoms = _listed(_some(rng, condition.symptoms, 1, 2))
    drug, how = rng.choice(condition.drugs), rng.choice(list(FREQUENCIES.values()))
    parts = [
        f"A {who} came with {symptoms} for {rng.randint(1, 21)} days.",
        f"The doctor found {rng.choice(condition.findings)}.",
        f"Past history: {rng.choice(HISTORY)}.",
        f"The assessment was {rng.choice(('mild', 'moderate', 'severe'))} {condition.name}.",
        f"The plan was {drug} {rng.choice(DOSES)} mg {how} and {rng.choice(condition.tests)}.",
        f"Advice: {rng.choice(ADVICE)}. Back in {rng.randint(1, 12)} weeks.",
    ]
    return " ".join(part for part in parts if rng.random() < 0.85)


def _short_note(rng: Random, about: Condition | None = None) -> str:
    """Return a terse generic note with random labels, separators and order."""
    condition = about or rng.choice(CONDITIONS)
    gap = rng.choice((". ", ". ", " | ", "; ", ", ", " / ", " - "))
    visit, plan = _visit_parts(rng, condition), _plan_parts(rng, condition)
    return f"{gap.join(visit)}{rng.choice((gap, '. ', ' >> '))}{gap.join(plan)}."


def _label(rng: Random, *labels: str) -> str:
    """Return one of the labels with random punctuation, or no label."""
    label = rng.choice((*labels, ""))
    return f"{label}{rng.choice((': ', ' ', ' '))}" if label else ""


def _visit_parts(rng: Random, condition: Condition) -> list[str]:
    """Return the parts of a generic visit line."""
    age, sex, days = rng.randint(18, 92), rng.choice("FM"), rng.randint(1, 21)
    joiner = rng.choice((", ", " + ", " and ", "/"))
    who = (f"{age}{sex}", f"{sex}{age}", f"{age} y {sex}", f"{'woman' if sex == 'F' else 'man'} of {age}")
    drug = rng.choice(DRUGS)
    parts = [
        rng.choice(who),
        rng.choice((*SEVERITIES, "moderate", "severe")),
        f"{_label(rng, 'c/o')}{joiner.join(_some(rng, condition.symptoms, 1, 2))} "
        f"{rng.choice((f'{days}d', f'{days} days', f'for {days} days'))}",
        f"{_label(rng, 'O/E', 'exam', 'signs', 'found')}{joiner.join(_some(rng, condition.findings, 1, 2))}",
        f"{_label(rng, 'PMH', 'hx', 'bg', 'past')}{rng.choice(HISTORY)}",
        rng.choice(("NKDA", "nkda", "no allergies", f"allergy {drug}", f"allergic to {drug}")),
    ]
    kept = [part for part in parts if rng.random() < 0.9] or parts
    if rng.random() < 0.3:
        rng.shuffle(kept)
    return kept


def _plan_parts(rng: Random, condition: Condition) -> list[str]:
    """Return the parts of a generic assessment and plan."""
    drug = rng.choice(condition.drugs if rng.random() < 0.75 else DRUGS)
    dose = f"{rng.choice(DOSES)}{rng.choice(('mg', 'mg', ' mg'))}"
    initials = f"{rng.choice(_LETTERS)}{rng.choice(_LETTERS)}"
    code = f" {rng.choice(_LETTERS)}{rng.randrange(10)}" if rng.random() < 0.15 else ""
    tests = condition.tests if rng.random() < 0.8 else TESTS
    parts = [
        f"{_label(rng, 'Rx', 'Give', 'Start', 'Plan')}{drug} {dose} "
        f"{rng.choice(list(FREQUENCIES))} {rng.choice(SPANS)}",
        f"{_label(rng, 'Inv', 'Send', 'Check')}{rng.choice(tests)}",
        f"{_label(rng, 'Adv', 'Advice')}{rng.choice(ADVICE)}",
        f"{_label(rng, 'Rv', 'rv', 'Back in', 'Review')}{rng.choice(REVIEWS)}",
    ]
    if rng.random() < 0.2:
        place = rng.choice((f"{condition.department} clinic", f"Dr {rng.choice(_LAST_NAMES)}"))
        parts.append(f"{_label(rng, 'Ref', 'Refer')}{place}")
    if rng.random() < 0.3:
        rng.shuffle(parts)
    kept = [part for part in parts if rng.random() < 0.9]
    if rng.random() < 0.4:
        kept.append(f"{_label(rng, 'sig', 'Signed')}{initials}")
    return [f"{_label(rng, 'Imp', 'Dx', 'Assessment', '#')}{condition.name}{code}", *kept]


def public_texts(seed: int, count: int) -> list[str]:
    """Return ``count`` public documents made from ``seed``."""
    return list(documents(Random(f"public-{seed}"), count))
