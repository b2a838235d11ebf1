"""What a question asks, whatever its wording: the gate of the semantic cache. Knows no models, vectors or answers.

`canonical` rewrites a text by the rules below, one after the other, and nothing else: it drops no words on its own,
stems none and reorders none. Two texts ask the same if it makes the same of both. So every word counts unless a rule
says otherwise: names and capitals, numbers and units, negations, quantifiers, tenses, articles, and their order. That
is also why sameness is transitive, and found by looking up what `canonical` returns.

A rule belongs here if it holds for every text that it matches, not if it does for most. Where a rule needs to know what
stands around a word, its pattern says so. What a rule makes of a text need not be English.
"""

import re
import unicodedata

LONGEST = 4000
"""Characters. A longer text stands for itself."""

_Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> _Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def canonical(text: str) -> str:
    """The same for all texts that ask the same thing, as far as the rules know.

    What follows a colon, a quotation mark, a bracket or a line break is material to work on, and stays as it is.
    """
    if len(text) > LONGEST:
        return text
    request, material = _parted(text)
    request = _decapitalized(_GREETING.sub("", request))
    for pattern, replacement in _DEFINITIONS:
        if pattern.match(request) and not material:
            return pattern.sub(replacement, request)
    if is_about_words(request):
        return text
    request = _without_frames(_applied(_SPELLINGS, request))
    request = _NUMBER_WORDS.sub(_digits, request)
    if not _ABOUT_LISTS.search(request):
        request = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), request)
    request = _applied(_QUANTITIES, request)
    if material and len(_POINTS.findall(request)) == 1:
        request = _applied(_MATERIAL, request)
    request = _applied(_QUESTIONS, request)
    if material:  # it may speak of "the former"
        return f"{request}\n{material}"
    return _SYMMETRIC.sub(_sorted, request)


def is_about_words(text: str) -> bool:
    """Whether words themselves are its subject, so that another spelling is another question."""
    return _ABOUT_WORDS.search(text) is not None


# --- the parts of a text ---

_MATERIAL_BEGINS = re.compile(r'[:\n"`<>(\[{|]|(?<!\w)\'|[^\x00-\x7f](?<![^\W\d_])(?<![€£×÷°–—])')
_FINAL = re.compile(r"[.? ]|(?<![\d!])(?<!\b[a-zA-Z])!")  # 5! and n! are factorials
_COMMANDS = (
    "add|answer|calculate|choose|classify|compare|compose|compute|convert|correct|create|describe|draft|edit|estimate"
    "|evaluate|explain|find|generate|give|help|identify|list|make|name|outline|paraphrase|predict|propose|provide|recommend"
    "|rewrite|show|solve|sort|suggest|summarize|tell|think|write"
)
_ASKS = re.compile(
    r"(?:what|who|whom|whose|which|when|where|why|how|is|are|was|were|do|does|did|can|could|should|would|will|has|have)\b"
    rf"|(?:in|at|on|for|from|to|of|with|by) (?:what|which|whom)\b|(?:{_COMMANDS})\b"
)
_ABOUT_WORDS = re.compile(
    r"\b(?:spell\w*|spelt|letters?|words?|syllables?|rhym\w+|vowels?|consonants?|anagrams?|palindromes?|synonyms?"
    r"|antonyms?|pronounc\w+|pronunciation|punctuat\w+|capitali[sz]\w+|capitals|uppercase|lowercase|grammar"
    r"|grammatical\w*|abbreviat\w+|acronyms?|contractions?|hyphen\w*|apostrophes?|accents?|translat\w+|characters?"
    r"|digits?|numerals?|symbols?|signs?|prefix\w*|suffix\w*|plurals?|singular|dialects?|American|British|English|usage"
    r"|say|says|said|saying|repeat\w*|echo\w*|copy|copies|type|typed|phrases?|terms?|mean|means|meant|meanings?"
    r"|define\w*|definitions?|stands? for|short for|called|etymolog\w+|nouns?|verbs?|adjectives?|adverbs?|pronouns?"
    r"|quote\w*|verbatim|literal\w*|print\w*|output\w*|regex\w*|strings?)\b",
    re.IGNORECASE,
)
_ABOUT_LISTS = re.compile(
    r"\b(?:numbers|integers|values|sum|average|mean|median|mode|sort|order|range|sequence|series|list)\b"
)
"""Where a comma between digits may part two numbers."""


def _parted(text: str) -> tuple[str, str]:
    """(what is asked, the material that it is asked of)."""
    text = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    found = _MATERIAL_BEGINS.search(text)
    request = (text[: found.start()] if found else text).rstrip()
    return " ".join(unicodedata.normalize("NFC", request).split()), text[len(request) :] if found else ""


def _decapitalized(request: str) -> str:
    """The first word in lower case where it is one of the rules' own; elsewhere capitals tell names."""
    first = re.match(r"[A-Z][a-z]+", request)
    return first[0].lower() + request[first.end() :] if first and first[0].lower() in _FIRST_WORDS else request


def _applied(rules: _Rules, request: str) -> str:
    for pattern, replacement in rules:
        request = pattern.sub(replacement, request)
    return request


_FIRST_WORDS = frozenset(
    f"{_COMMANDS}|what|who|whom|whose|which|when|where|why|how|is|are|was|were|do|does|did|can|could|should|would|will|has"
    "|have|in|at|on|for|from|to|please|kindly|define|come|summarise".split("|")
)


# --- spelling ---

_NOT = "is|are|was|were|do|does|did|has|have|had|could|should|would|must|need"
_SPELLINGS = _rules(
    (rf"\b({_NOT})n't\b", r"\1 not"),
    (r"\bcan't\b", "cannot"),
    (r"\bwon't\b", "will not"),
    (r"^(how (?:do|can|should)) i\b", r"\1 I"),
    (r"\bI'm\b", "I am"),
    (r"\b([Yy]ou|[Ww]e|[Tt]hey)'re\b", r"\1 are"),
    (r"\b(I|[Yy]ou|[Ww]e|[Tt]hey)'ve\b", r"\1 have"),
    (r"\b(I|[Yy]ou|[Ww]e|[Tt]hey|[Hh]e|[Ss]he|[Ii]t)'ll\b", r"\1 will"),
    # before a noun or a number it is no "has"
    (r"\b(what|who|where|when|how)'s (?=(?:the|a|an|my|your|his|her|its|our|their|this|that)\b|\d|[A-Z])", r"\1 is "),
    (r"\b(colo|favo|flavo|harbo|hono|humo|neighbo|behavio)ur(?=(?:s|ed|ing|ite|ites|able|hood|hoods|ful)?\b)", r"\1r"),
    (r"\b(centi|milli|kilo|nano)metre(s?)\b", r"\1meter\2"),
    (r"(\d|\b(?:how many|to|into|in)) metres\b", r"\1 meters"),
    (r"\b(lit|cent|theat|fib)re(s?)\b", r"\1er\2"),
    (
        r"\b(apolog|critic|custom|emphas|maxim|memor|minim|optim|organ|priorit|real|recogn|summar|visual)is(?=e[sd]?\b|ing\b)",
        r"\1iz",
    ),
    (r"\banalys(?=e[sd]?\b|ing\b)", "analyz"),
    (r"\bgrey\b", "gray"),
    (r"\baeroplane(s?)\b", r"airplane\1"),
    (r"\btyre(s?)\b", r"tire\1"),
    (r"\bjewellery\b", "jewelry"),
    (r"\bper cent\b", "percent"),
    (r"\b(the )(?:US|USA|U\.S\.|United States of America)(?![\w.])", r"\1United States"),
    (r"\b(the )UK\b", r"\1United Kingdom"),
    (r"\bTV\b", "television"),
    (r"\bmaths\b", "math"),
)


# --- what stands around a request and says nothing ---

_GREETING = re.compile(r"^(?:Hello|Hi|Hey|hello|hi|hey)[,!.] ")
_PLEASE = re.compile(r"^(?:please|kindly),? ")
_THANKS = re.compile(r", (?:please|thank you|thanks)$")
# "Can you make mistakes?" asks whether, "Can you explain mistakes?" asks to
_CAN_YOU = re.compile(
    r"^(?:can|could|would|will) you (?:(?:please|kindly) |(?=(?:tell|give|show|help) me\b))"
    r"|^(?:can|could) you (?=(?:explain|describe|summarize|list|name|provide|suggest|recommend)\b"
    r"|(?:write|compose|create|generate|draft) an? [\w ]+ (?:about|to|for|on)\b)"
)
_I_WANT = re.compile(
    rf"^I(?: would|'d) like you to (?=(?:{_COMMANDS})\b)|^I (?:want|need) you to (?=(?:{_COMMANDS})\b)"
)
_WH = "what|who|whom|whose|which|when|where|why|how"
_TELL = re.compile(
    r"^(?:tell me|explain|describe|do you know(?! how| \w+ you)|I want to know|I(?: would|'d) like to know) "
    rf"(?=(?:{_WH})\b)"
    # "Explain how many people cope" asks for their ways, "How many people cope?" for their number
    r"(?!how (?:many|much|few|little)\b)"
)
_BE = "is|are|was|were"
_MEASURES = "old|tall|long|high|deep|wide|heavy|big|large|far|fast|hot|cold"
_INDIRECT = _rules(
    # "what the capital of Peru is", "how old the Earth is": the verb goes where a question has it
    (
        rf"^((?:what|who|where)|how (?:{_MEASURES})) ((?:the|an?) [^,.?!]+|(?!the |an? )[^\s,.?!]+) ({_BE})$",
        r"\1 \3 \2",
    ),
    (rf"^(why) ((?:the|an?) \w+|(?!the |an? )\w+) ({_BE}) ([^,.?!]+)$", r"\1 \3 \2 \4"),
    # "why cats purr"
    (r"^(why|how) (?!is |was |does |has |as |this |us )(\w+[^s\W]s) (\w+)$", r"\1 do \2 \3"),
)


def _without_end(request: str) -> str:
    """From the end, mark by mark: a search for the run of them would begin anew at each of a run in the middle."""
    end = len(request)
    while end and _FINAL.match(request, end - 1, end):
        end -= 1
    return request[:end]


def _without_frames(request: str) -> str:
    is_question = request.endswith("?")
    bare = _without_end(request)
    bare = _THANKS.sub("", _PLEASE.sub("", _GREETING.sub("", bare)))
    bare = _PLEASE.sub("", _I_WANT.sub("", _CAN_YOU.sub("", bare)))
    told = _TELL.sub("", bare)
    if told != bare:
        return _applied(_INDIRECT, told)
    # "You need a visa?" asks, "You need a visa." does not
    return f"{bare}?" if is_question and not _ASKS.match(bare) else bare


# --- numbers and units ---

_SMALL_NUMBERS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen"
)
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_NUMBER_WORDS = re.compile(
    rf"\b(?:({_TENS})(?:[- ](one|two|three|four|five|six|seven|eight|nine))?|({_SMALL_NUMBERS}))\b"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


def _digits(match: re.Match[str]) -> str:
    tens, unit, small = match.groups()
    ones = _SMALL_NUMBERS.split("|").index(small or unit or "zero")
    return str(ones + (10 * (_TENS.split("|").index(tens) + 2) if tens else 0))


_N = r"(?<![\w.,])(\d+(?:\.\d+)?)"
_QUANTITIES = _rules(
    (rf"{_N} ?%(?!\w)", r"\1 percent"),
    (r"(?<![\w$])\$(\d+(?:\.\d+)?)(?![\w.,])", r"\1 dollars"),
    (rf"{_N} ?km\b(?!/)", r"\1 kilometers"),
    (rf"{_N} ?kg\b(?!/)", r"\1 kilograms"),
    (rf"{_N} ?cm\b(?!/)", r"\1 centimeters"),
    # "/" between numbers may be a date or an event, "-" a range
    (r"(?<=\d) ?(?:\+| plus ) ?(?=\d)", " + "),
    (r"(?<=\d) ?(?:[*×]| times ) ?(?=\d)", " * "),
    (r"(?<=\d) (?:÷|divided by) (?=\d)", " / "),
    (r"(?<=\d) minus (?=\d)", " - "),
)


# --- material that the question is about ---

_POINTS = re.compile(r"\b(?:the following|this|these|that|those)\b")
_MATERIAL = _rules(
    (r"\bthe following (?=\w+s\b)", "these "),
    (r"\bthe following (?=(?:text|passage|paragraph|sentence|article|review)\b)", "this "),
)


# --- questions ---

_LIST_NOUNS = "ideas|tips|examples|reasons|ways|facts|suggestions|arguments|questions|benefits|advantages|disadvantages"
_PIECES = "poem|haiku|limerick|(?:short )?story|essay|riddle|email|thank-you note"
_ATTRIBUTES = "capital|population|currency|height|length|birthplace|date of birth|official language|national anthem"
_ASPECTS = "advantages|disadvantages|symptoms|causes|rules"
_MEASURE = (
    "kilometers|meters|centimeters|millimeters|miles|yards|feet|inches|kilograms|grams|milligrams|pounds|ounces|liters"
    "|milliliters|gallons|seconds|minutes|hours|days|weeks|months|years|Celsius|Fahrenheit|Kelvin"
)
_AMOUNT = rf"(?:\d+(?:\.\d+)?|an?) (?:degrees )?(?:{_MEASURE}|(?:kilometer|mile|meter|yard|foot|inch|minute|hour|day|week|month|leap year|year))"  # noqa: E501
_HANDIWORK = (
    "bake|boil|chop|clean|cook|fold|fry|grill|iron|knit|peel|plant|prune|remove|repair|replace|roast|sew|tie|wash"
)
_THING = r"[^,.?!;]+"
_NO_NOUN = rf"(?:{_NOT}|am|be|been|can|will|may|might|of|one|ones|I|you|he|she|it|we|they)\b"
_QUESTIONS = _rules(
    # before a noun, or among all; "Which is it?" has an answer that "What is it?" has not
    (rf"^((?:in|at|on|for|from) )?which (?=(?!{_NO_NOUN})\w)", r"\1what "),
    (r"^which is (?=the (?:\w+est|most) )", "what is "),
    (r"^in what year did\b", "what year did"),
    # attributes
    (r"\bcapital city of\b", "capital of"),
    (r"^what city is the capital of\b", "what is the capital of"),
    (rf"^(?:tell me|give me|name|state) the ({_ATTRIBUTES}) of (?!(?:my|our|your|an?) )", r"what is the \1 of "),
    (rf"^what is ({_THING})'s ({_ATTRIBUTES})$", r"what is the \2 of \1"),
    # "the age of" may be an era
    (rf"^what is ({_THING})'s age$", r"how old is \1"),
    (r"^what is the age of (the (?:Earth|universe|Sun|Moon|solar system))$", r"how old is \1"),
    (rf"^how tall is ({_THING})$", r"what is the height of \1"),
    (rf"^how long is ({_THING})$", r"what is the length of \1"),
    (rf"^how many people live in ({_THING})$", r"what is the population of \1"),
    (rf"^what is the date of birth of ({_THING})$", r"when was \1 born"),
    (rf"^what is the birthplace of ({_THING})$", r"where was \1 born"),
    (rf"^who (?:is|was) the (?:author|writer) of ({_THING})$", r"who wrote \1"),
    (rf"^who (?:is|was) the inventor of ({_THING})$", r"who invented \1"),
    (rf"^who (?:is|was) the painter of ({_THING})$", r"who painted \1"),
    (rf"^who (?:is|was) the discoverer of ({_THING})$", r"who discovered \1"),
    (rf"^who (?:is|was) the founder of ({_THING})$", r"who founded \1"),
    (r"^what (?:artist|painter) painted\b", "who painted"),
    (r"^what (?:author|writer) wrote\b", "who wrote"),
    (r"\bthe biggest (?=(?:planet|country|city|ocean|lake|island|continent|desert|state|animal)\b)", "the largest "),
    (r"\bthe world's (\w+est \w+)$", r"the \1 in the world"),
    (r"^(how many \w+(?: \w+)?) are there (?=(?:in|on|at) )", r"\1 are "),
    # lists
    (r"\b(?:drawbacks|downsides) of\b", "disadvantages of"),
    (rf"^(?:list|name|give me|tell me) the ({_ASPECTS}) of\b", r"what are the \1 of"),
    (rf"^(?:give me|give|provide|provide me with|what are|tell me) (\d+) (?=(?:{_LIST_NOUNS})\b)", r"list \1 "),
    (r"^(?:name|make a list of|create a list of) (\d+)\b", r"list \1"),
    (r"^(?:recommend|come up with) (?=(?:an?|some|\d+)\b)", "suggest "),
    # texts
    (rf"^(?:compose|create|generate|draft) an? (?=(?:{_PIECES})\b)", "write a "),
    (rf"^write an? (?=(?:{_PIECES})\b)", "write a "),
    (r"^write a essay on\b", "write a essay about"),
    (rf"^(?:write|give|give me|provide|create) a summary of (?={_THING}$)", "summarize "),
    (r"^describe the process of\b", "explain the process of"),
    # amounts
    (r"^(?:calculate|compute|work out|find) (?=\d[\d. ]* (?:[+*/-] [\d. ]+)+$|\d+ percent of \d+$)", "what is "),
    (r"^(?:calculate|compute|find) (?=the square root of \d+$)", "what is "),
    (rf"^how many ({_MEASURE}) are in ({_AMOUNT})$", r"convert \2 to \1"),
    (rf"^what is ({_AMOUNT}) in ({_MEASURE})$", r"convert \1 to \2"),
    (rf"^convert ({_AMOUNT}) into ({_MEASURE})$", r"convert \1 to \2"),
    # instructions
    (rf"^how (?:do I|can I|do you|does 1) (?=(?:{_HANDIWORK}) \w)", "how to "),
    (r"^how (?:do|can) I (?=(?:make|build|learn|install|draw) \w)", "how to "),
    # comparisons, to be sorted
    (rf"^how do ({_THING}) differ from ({_THING})$", r"what is the difference between \1 and \2"),
    (rf"^how is ({_THING}) different from ({_THING})$", r"what is the difference between \1 and \2"),
    (rf"^how far is ({_THING}) from ({_THING})$", r"what is the distance between \1 and \2"),
    (rf"^what is the distance from ({_THING}) to ({_THING})$", r"what is the distance between \1 and \2"),
)

_SIDE = r"(?:(?!\b(?:and|or|not|of|for|in|on|at|to|with|from|by|as|than|that|who|which)\b)[^\d,.?!;])+"
_SYMMETRIC = re.compile(rf"^(what is the (?:difference|distance) between|compare) ({_SIDE}) and ({_SIDE})$")
"""With digits "between" may be arithmetic, which is not symmetric."""

_ARTICLE = re.compile(r"^(?:the|an?) ")

_DEFINITIONS = _rules(
    (r"^(?:define|what is the definition of|give the definition of) ([a-z]+)[.?]?$", r"define \1"),
    (r"^what (?:does ([a-z]+) mean|is the meaning of ([a-z]+))[.?]?$", r"meaning \1\2"),
)
"""The one kind of question about a word that may be put in two ways."""


def _sorted(match: re.Match[str]) -> str:
    """Both sides in one order, unless the first may begin with a word that goes for both: "red apples and pears"."""
    head, *sides = match.groups()
    num_words = {len(_ARTICLE.sub("", side).split()) for side in sides}
    return f"{head} {' and '.join(sorted(sides))}" if len(num_words) == 1 else match[0]
