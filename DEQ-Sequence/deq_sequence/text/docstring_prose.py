"""Extracts English prose from Python documentation, as paragraphs tokenised like WikiText."""

import inspect
import re
from collections.abc import Iterator

# Mark-up patterns to remove, and the words that stay.
_MARKUP = (
    (re.compile(r":[a-z]+(?::[a-z]+)?:`[~!]?([^`<]*)(?:\s*<[^>]*>)?`"), r"\1"),  # :func:`x`
    (re.compile(r"`+_*"), ""),  # ``x``, `x`_
    (re.compile(r"(?<!\w)(\*{1,2})(\w[^*]*)\1(?!\w)"), r"\2"),  # *x*, **x**
    (re.compile(r"\(\)"), ""),  # x()
    (re.compile(r"""(?<!\w)(["'])([\w.]+)\1(?!\w)"""), r"\2"),  # "x" and 'x' as names
    (re.compile(r"-{3,}"), "--"),
    (re.compile(r"::$"), ":"),
)
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "—": "--", "–": "--"})
_BULLET = re.compile(r"(?:[-*+•o]|\(?\w{1,2}[.)])\s+")
_TOKEN = re.compile(
    r"@-@|\.\.\.|--|->"
    r"|\d\w*(?:\.\w+)*"  # 3.11, 0x80
    r"|_*[^\W\d_]\w*(?:\.\w+)*"  # word, snake_case, module.attribute
    r"|'(?:s|t|re|ve|ll|d|m)\b"  # it 's, don 't
    r"|\S"
)
_PUNCTUATION = re.compile(r"[,.;:!?'\"()]|--|\.\.\.|@-@|'[a-z]+")
# Function words are frequent in English sentences and rare in code and tables.
_FUNCTION_WORD = re.compile(
    "a|an|the|is|are|be|was|has|have|it|this|that|these|which|if|when|to|of|in|for|with|by|from|"
    "as|on|at|or|and|not|no|all|any|its|can|will|should|may|must|does|do|you|we|only"
)
MIN_TOKENS = 6
# Odd tokens are neither words nor punctuation of prose: operators, brackets, slashes.
MAX_ODD_SHARE = 0.08
MIN_FUNCTION_WORD_SHARE = 0.15


def prose(text: str) -> list[list[str]]:
    """The paragraphs of a documentation text that are English prose, as lists of tokens.

    Doctest examples, code, tables, signatures, headings and paragraphs with web addresses are
    left out. reStructuredText mark-up is removed, its words stay. The text is lower-cased and
    tokenised like WikiText (``it 's``, ``read @-@ only``), with punctuation as separate tokens.
    Names with dots and underscores stay one token.
    """
    paragraphs = (_tokenise(p) for p in _paragraphs(text) if "://" not in p)
    return [tokens for tokens in paragraphs if _is_prose(tokens)]


def _paragraphs(text: str) -> Iterator[str]:
    """Blocks between blank lines, and list items, each joined to one line; code blocks dropped."""
    literal_indent = None  # after a paragraph that ends in "::", more deeply indented text is code
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = block.split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        if literal_indent is not None and indent > literal_indent:
            continue
        literal_indent = indent if block.rstrip().endswith("::") else None
        paragraph: list[str] = []
        for line in map(str.strip, lines):
            if line.startswith(">>>"):  # a doctest ends at the next blank line
                break
            if _BULLET.match(line):
                yield " ".join(paragraph)
                paragraph, line = [], _BULLET.sub("", line, count=1)
            paragraph.append(line)
        yield " ".join(paragraph)


def _tokenise(paragraph: str) -> list[str]:
    paragraph = paragraph.translate(_ASCII).lower().strip()
    for pattern, words in _MARKUP:
        paragraph = pattern.sub(words, paragraph)
    paragraph = re.sub(r"(?<=[a-z])-(?=[a-z])", " @-@ ", paragraph)
    return _TOKEN.findall(paragraph)


def _is_prose(tokens: list[str]) -> bool:
    if len(tokens) < MIN_TOKENS:
        return False
    odd = sum(not (_PUNCTUATION.fullmatch(token) or re.match(r"\w", token)) for token in tokens)
    joints = sum(bool(_FUNCTION_WORD.fullmatch(token)) for token in tokens)
    return odd <= MAX_ODD_SHARE * len(tokens) and joints >= MIN_FUNCTION_WORD_SHARE * len(tokens)
