# SPDX-License-Identifier: Apache-2.0
"""What to write in place of an option that a program does not have."""

import difflib
import re
from collections.abc import Iterable

from trtdet.commands.habits import HABITS
from trtdet.commands.stages import options_everywhere

#: How alike two names must be for one to be taken for the other; 1 is equal. `int4` and `int8`,
#: 0.75, are two things.
LIKENESS = 0.76
#: Of how many programs it is said that they have an option.
NAMED = 3


def plain(name: str) -> str:
    """An option's name without what is easily mistaken: dashes, underscores, capitals."""
    return re.sub(r"[-_]", "", name).lower()


def advise(name: str, prog: str, known: Iterable[str]) -> str:
    """What to write in place of an unknown option.

    Args:
        prog: the program that does not have it, as in `infer.py` or `deploy.py triton`.
        known: the options that it has.
    """
    wanted = plain(name)
    known = tuple(known)
    options = {plain(option): option for option in known if option.startswith("--")}
    if wanted in options:
        return f"did you mean {options[wanted]}?"
    if wanted in HABITS:
        return _habit(HABITS[wanted], prog, known) or _none(prog)
    begun = [option for key, option in options.items() if key.startswith(wanted)]
    if len(wanted) > 2 and len(begun) == 1:
        return f"did you mean {begun[0]}? Names are not shortened"
    words = _words(name)
    longer = [option for option in options.values() if words < _words(option)]
    if len(words) > 1 and len(longer) == 1:
        return f"did you mean {longer[0]}?"
    elsewhere = {plain(option): option for option in options_everywhere()}
    if wanted in elsewhere:
        return f"that is an option of {_programs_with(elsewhere[wanted])}"
    return _nearest(wanted, prog, known, options, elsewhere) or _none(prog)


def nearest(word: str, names: Iterable[str]) -> str:
    """The name that a word is most like; "" if none is like it. Of equals, the first."""
    near = max(names, key=lambda key: _likeness(word, key), default="")
    return near if _likeness(word, near) >= LIKENESS else ""


def _nearest(
    wanted: str,
    prog: str,
    known: tuple[str, ...],
    options: dict[str, str],
    elsewhere: dict[str, str],
) -> str:
    """For a misspelt name: of an option, of a habit that is an option here, or of one elsewhere."""
    named = {key: _habit(ways, prog, known) for key, ways in HABITS.items()}
    habits = {key: text for key, text in named.items() if _names_option(text)}
    near = nearest(wanted, [*options, *habits, *elsewhere])
    if near in options:
        return f"did you mean {options[near]}?"
    if near in habits:
        return habits[near]
    if near:
        option = elsewhere[near]
        return f"did you mean {option}? That is an option of {_programs_with(option)}"
    return ""


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, one).ratio()


def _habit(ways: str, prog: str, known: Iterable[str]) -> str:
    """The first of the ways that this program has, else that of another script, or a sentence;
    "" if there is none.
    """
    name = prog.removeprefix("trtdet ")
    here = f"{name} " if ".py" in name else f"{name}.py "
    alternatives = ways.split(" | ")
    for way in alternatives:
        if (own := way.removeprefix(here)).split()[0] in known:
            return f"here it is {own}"
    other = next((way for way in alternatives if not way.startswith("--")), "")
    return f"that is {other}" if ".py" in other.split(" ")[0] else other


def _names_option(habit: str) -> bool:
    return habit.startswith(("here it is ", "that is "))


def _programs_with(option: str) -> str:
    programs = options_everywhere()[option]
    if len(programs) > NAMED:
        return f"{', '.join(programs[:NAMED])} and others"
    *before, last = programs
    return f"{', '.join(before)} and {last}" if before else last


def _none(prog: str) -> str:
    return f"{prog} --help lists all"


def _words(name: str) -> set[str]:
    return set(re.split(r"[-_]", name.lstrip("-").lower()))
