"""The troubleshooting page has every message that the source can raise or warn with."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
ROOMS = ("lib", "DEQ-Sequence", "MDEQ-Vision", "scripts")
BETWEEN = "…"  # stands for what varies, in a message as on the page


def shown(node: ast.AST) -> str:
    """The constant part of a text, with … for each value in it; "" for any other expression."""
    match node:
        case ast.Constant(value=str(text)):
            return " ".join(text.split())
        case ast.JoinedStr(values=parts):
            text = "".join(p.value if isinstance(p, ast.Constant) else BETWEEN for p in parts)
            return " ".join(text.split())
    return ""


def messages() -> tuple[set[str], set[str]]:
    """The texts that errors and warnings are made of; and all texts of the source."""
    said, texts = set(), set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            texts.add(shown(node))
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name.endswith("Error") or name == "warn":
                    said.add(shown(node.args[0]))
                if name == "check" and len(node.args) == 4:  # of lib.errors: it makes the message
                    subject, accepted = (shown(node.args[i]) or BETWEEN for i in (1, 3))
                    texts.add(f"{subject} is {BETWEEN}, but must be {accepted}")
    return {text for text in said if re.search(r"\w{3}", text)}, texts


def entries() -> dict[str, re.Pattern]:
    """What the page shows verbatim in the first column of its tables, as patterns."""
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    found = [e.replace(r"\|", "|") for row in rows for e in re.findall(r"`([^`]+)`", row)]
    return {e: re.compile(".*".join(map(re.escape, e.split(BETWEEN))), re.S) for e in found}


def test_each_message_has_an_entry():
    patterns = entries().values()
    missing = [m for m in messages()[0] if not any(p.fullmatch(m) for p in patterns)]
    assert not missing, "\n".join(sorted(missing))


def test_each_entry_is_a_message():
    texts = messages()[1]
    stale = [e for e, pattern in entries().items() if not any(map(pattern.fullmatch, texts))]
    assert not stale, "\n".join(stale)
    for entry in entries():
        assert re.search(r"\w{3}", entry), f"fits nearly everything: {entry}"
