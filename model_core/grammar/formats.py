"""String formats of JSON Schema, as patterns of texts that every reading of the format accepts.

Narrow on purpose: no 29th of February (whatever the year), no quoted mailbox, hosts in lower case. RFC 3339, 5321, 1123, 2673,
4291, 3986, 4122.
"""

_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[-+]([01]\d|2[0-3]):[0-5]\d)"
_YEAR = r"(\d{3}[1-9]|\d{2}[1-9]\d|\d[1-9]\d{2}|[1-9]\d{3})"
_DATE = _YEAR + r"-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d{2}|[1-9]?\d)"
_LABEL = r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,5}}"
_HEX = "[0-9a-f]"
_CLOCK = r"(\d{1,4}H(\d{1,4}M)?(\d{1,4}S)?|\d{1,4}M(\d{1,4}S)?|\d{1,4}S)"
_DAYS = r"(\d{1,4}Y(\d{1,4}M)?(\d{1,4}D)?|\d{1,4}M(\d{1,4}D)?|\d{1,4}D)"
_SEGMENT = r"[A-Za-z0-9._~-]{1,64}"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": rf"P({_DAYS}(T{_CLOCK})?|T{_CLOCK}|\d{{1,4}}W)",
    "email": rf"[A-Za-z0-9_]{{1,30}}([.+-][A-Za-z0-9_]{{1,15}}){{0,2}}@{_LABEL}(\.{_LABEL}){{1,4}}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "ipv6": rf"({_HEX}{{1,4}}(:{_HEX}{{1,4}}){{7}}|({_HEX}{{1,4}}:){{1,6}}:{_HEX}{{1,4}}|::1)",
    "uri": rf"(https?|ftp|wss?)://{_HOST}(:[1-9]\d{{0,3}})?(/{_SEGMENT}){{0,20}}/?(\?[A-Za-z0-9=&._~-]{{0,100}})?(#{_SEGMENT})?",
    "uuid": rf"{_HEX}{{8}}-{_HEX}{{4}}-[1-5]{_HEX}{{3}}-[89ab]{_HEX}{{3}}-{_HEX}{{12}}",
}
