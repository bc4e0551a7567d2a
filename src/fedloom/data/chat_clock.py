"""Give a chat template a day in the place of the clock, so that a row has the same text whenever it is read."""

from __future__ import annotations

import datetime
import json
import string
from functools import lru_cache

CLOCK = "strftime_now"
"""The function by which templates ask for the time."""
_PERCENT = "\x00"


@lru_cache(maxsize=64)
def on_day(template: str, day: datetime.date | None) -> str:
    """Return a template in which ``strftime_now`` gives midnight of ``day``; as it is where it does not ask, or None.

    Transformers gives templates no other function than its own, so the day is written in as a macro of that name, which
    replaces each directive in a format. The line's end after it belongs to the macro, so what follows is as it was.
    """
    if day is None or CLOCK not in template:
        return template
    begin = datetime.datetime.combine(day, datetime.time())
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    known = {one: begin.strftime(one) for one in directives}
    pairs = [("%%", _PERCENT), *((one, text) for one, text in known.items() if text != one), (_PERCENT, "%")]
    filters = "".join(f" | replace({json.dumps(one)}, {json.dumps(text)})" for one, text in pairs)
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
