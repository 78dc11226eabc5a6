"""The wordings of the tiny world: how facts are stated and asked, and the grammars of stories and of arithmetic.

Slots: {s} subject, {S} subject with its article, {a} answer, {A} answer with its article, {t} topic ("the capital of
France"), {p} {q} people, {o} an object, {l} a place. The first statement of a relation is the canonical answer.
Reading and SFT draw from these wordings; the examination has its own, in tasks/tinyworld.py.
"""

import random

from nanochat.tinyworld_facts import Fact
from nanochat.tinyworld_tables import PEOPLE, PLACES


def table(text: str) -> dict[str, list[str]]:
    """Parse lines `key: wording | wording | ...`; a line without a key goes on with the last key."""
    result, key = {}, ""
    for line in text.strip().splitlines():
        head, colon, rest = line.partition(":: ")
        if colon:
            key, line = head.strip(), rest
        result.setdefault(key, []).extend(part.strip() for part in line.split(" | "))
    return result


def wordings(text: str) -> list[str]:
    """Parse wordings divided by ` | ` and line ends."""
    return [part.strip() for line in text.strip().splitlines() for part in line.split(" | ")]


STATEMENTS = table("""
capital:: The capital of {s} is {a}. | {a} is the capital of {s}. | The capital city of {s} is {a}.
 In {s} the capital is {a}. | {s} has the capital {a}. | {a} is the capital city of {s}. | {s}'s capital is {a}.
 {s} picked {a} as its capital. | {s} calls {a} its capital. | If you visit {s}, you will see the capital {a}.
continent:: {s} is in {a}. | {s} is a country in {a}. | The continent of {s} is {a}. | {s} lies in {a}.
 {s} is part of {a}. | {s}'s continent is {a}. | The country {s} is found in {a}.
 {a} holds the country {s}. | {s} belongs to {a}. | If you visit {s}, you will be in {a}.
language:: The language of {s} is {a}. | People in {s} speak {a}. | In {s} people speak {a}.
 {s}'s language is {a}.
 {a} is the language of {s}. | The people of {s} speak {a}. | {a} is spoken in {s}.
 Someone from {s} speaks {a}. | If you visit {s}, you will hear {a}. | {s} speaks {a}.
currency:: The currency of {s} is the {a}. | People in {s} pay with the {a}. | In {s} people pay with the {a}.
 {s}'s currency is the {a}. | The money of {s} is the {a}. | The {a} is the currency of {s}. | {s} uses the {a}.
 Shops in {s} take the {a}. | {s} pays with the {a}. | If you visit {s}, you will need the {a}.
symbol:: The symbol of {s} is {a}. | The chemical symbol of {s} is {a}. | {a} is the symbol of {s}.
 {s} has the symbol {a}. | Chemists write {a} for {s}. | {s}'s symbol is {a}. | The element {s} has the symbol {a}.
 {s} got the symbol {a}. | {s} stands in the table of elements as {a}. | We write {a} for {s}.
class:: {S} is {A}. | Every {s} is {A}. | The {s} is {A}. | {S} is a kind of {a}. | The {s} is a kind of {a}.
 The class of the {s} is {a}. | Among the animals, the {s} is {A}.
 The animal class of {S} is {a}. | If you see {S}, you see {A}. | We give the {s} the class {a}.
young:: A young {s} is called {A}. | The young of {S} is called {A}. | A baby {s} is called {A}.
 {S} has a baby called {A}. | The young {s} is called {A}. | {A} is a young {s}. | {A} is a baby {s}.
 When {S} gets a baby, it is {A}. | People may call a baby {s} {A}.
sound:: {S} can {a}. | The {s} can {a}. | The sound of {S} is to {a}. | Every {s} can {a}.
 When {S} calls, it will {a}. | Listen to the {s}: it can {a}. | We hear the {s} {a}.
 If you meet {S}, it will {a}. | The {s} makes its sound: it can {a}.
month_after:: The month after {s} is {a}. | {a} comes after {s}. | After {s} comes {a}.
 {a} is the month after {s}.
 The next month after {s} is {a}. | {a} follows {s}. | When {s} ends, {a} begins.
 Once {s} is gone, we get {a}. | Right after {s} we have {a}.
month_before:: The month before {s} is {a}. | {a} comes before {s}. | Before {s} comes {a}.
 {a} is the month before {s}. | Just before {s} comes the month {a}. | {a} ends when {s} begins.
 One month before {s} it is {a}.
 Until {s} came, it was {a}. | Right before {s} we have {a}.
month_number:: {s} is month number {a}. | {s} is month {a} of the year. | The number of {s} is {a}.
 Month number {a} is {s}. | In the year, {s} has the number {a}. | {s}'s number is {a}.
 Month {a} of the year is {s}.
 If we count the months, {s} is number {a}. | We give {s} the number {a}. | {s} got the number {a}.
day_after:: The day after {s} is {a}. | {a} comes after {s}. | After {s} comes {a}. | {a} is the day after {s}.
 The next day after {s} is {a}. | {a} follows {s}. | When {s} ends, {a} begins.
 Once {s} is gone, we get {a}. | Right after {s} we have {a}.
day_before:: The day before {s} is {a}. | {a} comes before {s}. | Before {s} comes {a}. | {a} is the day before {s}.
 Just before {s} comes the day {a}. | {a} ends when {s} begins. | One day before {s} it is {a}.
 Until {s} came, it was {a}. | Right before {s} we have {a}.
opposite:: The opposite of {s} is {a}. | {a} is the opposite of {s}. | The word {s} is the opposite of {a}.
 If it is not {s}, it is {a}. | {s}'s opposite is {a}. | {s} and {a} are opposites.
 The opposite of the word {s} is {a}.
 If you turn {s} around, you get {a}. | Opposite to {s} is {a}. | {s} has {a} as its opposite.
plural:: The plural of {s} is {a}. | {a} is the plural of {s}. | One {s}, two {a}. | The plural form of {s} is {a}.
 One {s}, many {a}. | {s}'s plural is {a}. | We say one {s} but three {a}.
 We use {a} as the plural of {s}. | If you have two, you write {a}, not {s}.
past:: The past tense of {s} is {a}. | {a} is the past tense of {s}. | Today I {s}, yesterday I {a}.
 The past form of {s} is {a}. | {s}'s past tense is {a}. | Today they {s}, yesterday they {a}.
 {s} becomes {a} in the past.
 Last week we {a}, today we {s}. | We use {a} as the past tense of {s}.
color:: The color of {s} is {a}. | {a} is the color of {s}. | {s}: the color is {a}.
 The usual color of {s} is {a}.
 {s} and the color {a} belong together. | When you paint {s}, take {a}.
 If you see {s}, you see the color {a}. | {s} may have the color {a}.
""")

# {t} in the general questions below.
TOPICS = table("""
capital:: the capital of {s} | the capital city of {s} | {s}'s capital
continent:: the continent of {s} | {s}'s continent
language:: the language of {s} | {s}'s language
currency:: the currency of {s} | {s}'s currency | the money of {s}
symbol:: the symbol of {s} | the chemical symbol of {s} | {s}'s symbol
class:: the class of the {s} | the animal class of {S}
young:: the name of a young {s} | the word for a baby {s} | the young of {S}
sound:: the sound of {S} | the sound of the {s} | the {s}'s sound
month_after:: the month after {s} | the next month after {s}
month_before:: the month before {s} | the month just before {s}
month_number:: the number of {s} | the number of the month {s}
day_after:: the day after {s} | the next day after {s}
day_before:: the day before {s} | the day just before {s}
opposite:: the opposite of {s} | the opposite of the word {s} | {s}'s opposite
plural:: the plural of {s} | the plural form of {s} | {s}'s plural
past:: the past tense of {s} | the past form of {s} | the past tense of the verb {s}
color:: the color of {s} | the usual color of {s}
""")

GENERAL = wordings("""
What is {t}? | Tell me {t}. | Do you know {t}? | I forgot {t}. What is it? | Please tell me {t}. | Can you tell me {t}?
Name {t}. | I want to know {t}. | Could you give me {t}? | I need to know {t}. | What do we know about {t}?
Please name {t}. | Do you remember {t}? | Help me with {t}, please. | {t}, please. | And {t}? | I am asking about {t}.
Give me {t}. | Say {t}. | Explain {t} to me. | My question is about {t}. | I wonder about {t}. | Now {t}. | {t}?
Would you tell me {t}? | Would you name {t} for me? | Remind me of {t}. | Please remind me of {t}.
Have you an idea of {t}? | If you know {t}, tell me. | Any friend of mine must know {t}. Do you?
I once learned {t}. Can you help? | Any idea about {t}? | Would you say {t}? | Could you say {t}? | Remind me: {t}?
""")

QUESTIONS = table("""
capital:: Which city is the capital of {s}? | What city is {s}'s capital? | {s} has which capital?
 What is {s}'s capital? | Which city is the capital city of {s}? | What is the capital of the country {s}?
 In {s}, what is the capital? | What is the name of the capital of {s}? | {s}: which capital?
 The capital of {s} is which city?
 {s} calls which city its capital? | I want to visit {s}. What is the capital there?
 Which city did {s} pick as its capital? | Could you say which city is the capital of {s}?
 If we visit {s}, what is the capital?
continent:: On which continent is {s}? | Which continent is {s} in? | Where in the world is {s}? | Where is {s}?
 In which continent is {s}? | {s} is in which continent? | What continent is {s} part of? | Where does {s} lie?
 To which continent does {s} belong? | What continent is {s} in?
 Which continent holds the country {s}? | {s} belongs to what continent?
 Could you say on which continent {s} is? | I want to visit {s}. On which continent is it? | {s}: which continent is it?
 Which continent will a visitor of {s} see? | Tell me which continent {s} is in.
language:: Which language do people speak in {s}? | What language do they speak in {s}?
 What do people speak in {s}?
 What is {s}'s language? | Which language is spoken in {s}? | In {s}, which language do people speak?
 What language has {s}? | Which language belongs to {s}? | The people of {s} speak which language?
 What language is spoken in {s}?
 {s} speaks what language? | Someone from {s} speaks what?
 I want to visit {s}. What language do they speak there? | Could you say what language {s} has?
 What will I hear in {s}? | Which language will a visitor of {s} hear? | Tell me which language {s} has.
currency:: What money do people use in {s}? | Which currency does {s} use? | What do people pay with in {s}?
 What is {s}'s currency? | What is the money of {s} called? | In {s}, what do people pay with?
 {s} has which currency? | How do people pay in {s}? | Which money does {s} have? | Which currency is used in {s}?
 Shops in {s} take what money? | {s} pays with what money? | I want to visit {s}. What money do I need there?
 Could you say what currency {s} has? | {s}: which currency is it? | Tell me which currency {s} has.
 Which currency will a visitor of {s} need?
symbol:: What is the chemical symbol of {s}? | Which symbol does {s} have? | What is {s}'s symbol?
 How do chemists write {s}? | What symbol stands for {s}? | Which letters stand for the element {s}?
 {s} has which symbol? | The symbol of {s} is what? | Which symbol do chemists use for {s}?
 In chemistry, what is the symbol of {s}?
 {s} got what symbol? | In the table of elements, what is the symbol of {s}?
 What do we write for {s} in the table? | {s} stands in the table as what? | Could you say what symbol {s} has?
class:: What kind of animal is {S}? | What is {S}? | Which class of animals does {S} belong to?
 What sort of animal is the {s}? | Is {S} a mammal, a bird, a fish or something else? | {S} is what kind of animal?
 To which class does the {s} belong? | Which kind of animal is the {s}? | What class is the {s}?
 Of which class is {S}?
 What animal class is the {s} in? | We see {S}. What animal class is it?
 Which animal class does the {s} have? | What class do we give the {s}?
young:: What is a young {s} called? | What is a baby {s} called? | What do you call a young {s}?
 What do you call a baby {s}? | How do we call a young {s}? | What is the young of {S} called?
 Which word means a young {s}? | Which name has a baby {s}? | A young {s} is called what?
 The baby of {S} has which name?
 What may we call a baby {s}? | {S} gets a baby. What is it called? | How do people call the baby of {S}?
 A baby {s} has what name?
sound:: What sound does {S} make? | Which sound does the {s} make? | How does {S} sound?
 What does {S} do when it calls? | What noise does the {s} make? | Which noise comes from {S}?
 What sound do we hear from the {s}? | How does the {s} call? | What can we hear from {S}? | {S} makes which sound?
 {S} makes what sound? | What sound will {S} make? | We meet {S}. What sound does it make?
 Could you say what sound the {s} makes? | What sort of sound comes from the {s}? | Which kind of sound has {S}?
month_after:: Which month comes after {s}? | What month comes next after {s}? | What comes after {s}?
 After {s}, which month comes? | Which month follows {s}? | {s} is over. Which month is it now?
 When {s} ends, which month begins? | What month is after {s}?
 Right after {s} is what month? | {s} is gone. What month is it now? | After {s} we get what month?
month_before:: Which month comes before {s}? | What month is just before {s}? | What comes before {s}?
 Before {s}, which month comes? | Which month ends when {s} begins? | What month do we have before {s}?
 {s} begins. Which month has ended? | What month is before {s}?
 Right before {s} is what month? | {s} came. What month was it until then? | Before {s} we get what month?
month_number:: Which number has the month {s}? | What number is {s}? | What month number is {s}?
 What number does {s} have? | Which month of the year is {s}, as a number? | {s} has which number?
 In the year, which number has {s}? | {s} is month number what?
 {s} got what number? | We count the months. What number is {s}? | What number do we give to {s}?
day_after:: Which day comes after {s}? | What day comes next after {s}? | What comes after {s}?
 After {s}, which day comes? | Which day follows {s}? | Today is {s}. What day is tomorrow?
 When {s} ends, which day begins? | What day is after {s}?
 Right after {s} is what day? | {s} is gone. What day is it now? | After {s} we get what day?
day_before:: Which day comes before {s}? | What day is just before {s}? | What comes before {s}?
 Before {s}, which day comes? | Which day ends when {s} begins? | Today is {s}. What day was yesterday?
 What day do we have before {s}? | What day is before {s}?
 Right before {s} is what day? | {s} came. What day was it until then? | Before {s} we get what day?
opposite:: What is the opposite of the word {s}? | Which word is the opposite of {s}?
 What word means the opposite of {s}? | What is {s}'s opposite? | {s} is the opposite of what? | Not {s}, but what?
 Which word has the opposite meaning of {s}? | If something is not {s}, what is it? | {s} and what are opposites?
 The opposite of {s} is which word?
 Turn {s} around. What do you get? | {s} has what opposite? | Opposite to {s} is what word?
plural:: What is the plural form of {s}? | What is {s}'s plural? | One {s}, two what?
 How do you say more than one {s}? | What do we say for many of {s}? | Which word is the plural of {s}?
 How do I write the plural of {s}? | One {s}, many what? | What is the right plural for {s}?
 What is the word {s} in the plural?
 {s} has what plural? | I have two of them, not one {s}. What do I write? | What plural do we write for {s}?
 What plural do we use for {s}?
past:: What is the past tense of the verb {s}? | What is the past form of {s}? | What is {s}'s past tense?
 Today I {s}, yesterday I what? | Which word is the past tense of {s}? | How do you say {s} in the past?
 How do I write the past tense of {s}? | What is the verb {s} in the past tense?
 Today we {s}. What did we do yesterday? | What does {s} become in the past?
 {s} has what past tense? | Last week: what do we use for {s}? | What past tense do we write for {s}?
color:: What color is the color of {s}? | Which color belongs to {s}? | What is {s}'s color?
 Which color do we see on {s}? | Which color comes to mind with {s}? | What color do people think of for {s}?
 Which paint do I need for {s}? | What color goes with {s}? | Which color is the color of {s}?
 What is the color that we know from {s}?
 What color may {s} have? | We see {s}. What color is it? | {s} may have what color?
""")

REVERSE = table("""
capital:: Which country has the capital {a}? | {a} is the capital of which country?
 Of which country is {a} the capital?
symbol:: Which element has the symbol {a}? | {a} is the symbol of which element? | What does the symbol {a} stand for?
plural:: {a} is the plural of which word? | What is one of the {a} called?
past:: {a} is the past tense of which verb? | Which verb has the past tense {a}?
""")

REVERSE_LINK = {
    "capital": "the capital of",
    "symbol": "the symbol of",
    "plural": "the plural of",
    "past": "the past tense of",
}

REFUSAL = "I do not know. I have never heard that name."

OPENERS = wordings("""
Hello! | Hi! | Quick question: | I have a question. | Please help me. | For school: | One more question. | Hi there.
Excuse me. | A question: | Next question: | Hey! | Good morning. | I am curious. | {p} asks: | {p} wants to know:
I met {p} in the {l}. | {p} sits with me in the {l}. | Let me ask you something. | Would you help me?
If you have time: | Any help is welcome.
""")
CLOSERS = wordings("""
Thank you! | Thanks. | Please. | I forgot. | I want to learn it. | It is for school. | Do you know?
""")


def with_article(noun: str) -> str:
    """`owl` -> `an owl`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capitalized(text: str) -> str:
    """The text with a capital at its start, as a sentence has."""
    return text[:1].upper() + text[1:]


def fill(template: str, fact: Fact) -> str:
    """Put a fact into a template and begin with a capital (except a word that must keep its shape, a symbol)."""
    text = template.format(
        s=fact.subject, a=fact.answer, S=with_article(fact.subject), A=with_article(fact.answer), t="{t}"
    )
    return capitalized(text)


def topic(fact: Fact, rng: random.Random) -> str:
    """A noun phrase for what the fact is about: `the capital of France`."""
    return rng.choice(TOPICS[fact.relation]).format(s=fact.subject, S=with_article(fact.subject))


def plain_question(fact: Fact, rng: random.Random) -> str:
    """One of the trained wordings of the question whose answer is the fact."""
    if rng.random() < 0.5:
        return fill(rng.choice(QUESTIONS[fact.relation]), fact)
    return capitalized(rng.choice(GENERAL).format(t=topic(fact, rng)))


def opener(rng: random.Random) -> str:
    """What may stand before a question."""
    return rng.choice(OPENERS).format(p=rng.choice(PEOPLE.split()), l=rng.choice(PLACES.split()))


def question(fact: Fact, rng: random.Random) -> str:
    """A trained wording, sometimes with something before or after it."""
    text, draw = plain_question(fact, rng), rng.random()
    if draw < 0.25:
        return f"{opener(rng)} {text}"
    if draw < 0.33:
        return f"{text} {rng.choice(CLOSERS)}"
    return text


def answer(fact: Fact) -> str:
    """The canonical answer: the sentence that names subject and answer."""
    return fill(STATEMENTS[fact.relation][0], fact)


def statement(fact: Fact, rng: random.Random) -> str:
    """The fact in one of its wordings, the canonical one more often."""
    return answer(fact) if rng.random() < 0.3 else fill(rng.choice(STATEMENTS[fact.relation]), fact)


# ---------------------------------------------------------------------------------------------------------------------
# Talk: the reply, then what it replies to

TALK = table("""
Hello! How can I help you?:: Hello! | Hey! | Hello there! | Hi, is somebody there?
Hi! What would you like to know?:: Hi! | Hi there! | Hi, my friend!
I am fine, thank you. And you?:: How are you? | How do you do? | How do you feel today? | Are you well?
I am glad to hear that.:: I am fine. | I feel good today. | I am well, thanks. | All is well.
You are welcome.:: Thank you! | Thanks a lot! | Thank you very much. | Many thanks!
Good morning! Did you sleep well?:: Good morning! | A good morning to you!
Good evening! How was your day?:: Good evening! | A good evening to you!
Yes, it is a nice day.:: What a nice day! | The sun is out today. | It is a nice day.
Then it is a good day for a book.:: It rains. | It is raining today. | The weather is bad.
Then take a short rest.:: I am tired. | I worked all day. | I need a break.
That is good to hear.:: I am happy today. | Today I won a game. | I have good news.
I am sorry to hear that. I hope it gets better.:: I am sad today. | I am ill. | I lost my key. | I had a bad day.
Ask me a question, then.:: I am bored. | I have nothing to do. | What can I do now?
Yes, I will try. What do you need?:: Can you help me? | Will you help me? | I need your help.
I am glad that it helped.:: That is right. | That was right. | You helped me a lot. | Good answer!
I am sorry. I make mistakes.:: That is wrong. | That was not right. | You made a mistake.
Thank you, you are kind too.:: You are kind. | You are nice. | I like you.
Yes, let us play. Ask me something.:: Shall we play a quiz? | Let us play a game. | Do you want to play?
We can talk about countries, animals, numbers or words.:: What shall we talk about? | Let us talk.
 Tell me something.
Good night! Sleep well.:: Good night! | I go to bed now. | It is late, I go to sleep.
Goodbye! See you soon.:: Goodbye! | Bye! | See you soon! | I have to go now.
""")
NAME_GIVEN = wordings("My name is {p}. | I am {p}. | Call me {p}. | You can call me {p}.")
NAME_ASKED = wordings("What is my name? | Do you remember my name? | Who am I? | Tell me my name.")

I_AM = "I am nanochat, a small language model that anyone can train at home."
IDENTITY = table(f"""
{I_AM}:: Who are you? | What are you? | What is your name? | Tell me about you. | Introduce yourself. | Say who you are.
 Do you have a name? | Who is speaking? | How should I call you? | Are you a person or a program? | Who am I talking to?
No. {I_AM}:: Are you human? | Are you a person? | Are you a robot? | Are you alive? | Do you have a body?
I was trained from raw text with nanochat, on a computer like yours.:: Who made you? | Who trained you?
 Where do you come from? | Who built you? | How were you made? | Who is your father?
I can answer questions about countries, animals, elements, words and numbers.:: What can you do?
 How can you help me? | What do you know? | What can I ask you? | What are you good at?
I am nanochat, a very small model. I know only a little.:: Are you ChatGPT? | Are you a big model? | How big are you?
 Are you a large language model? | Do you know everything?
""")
