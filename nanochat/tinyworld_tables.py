"""The tables of the tiny world: facts that are true of the real one, and the closed lists that texts draw from.

Pure data, ASCII. `-` marks a cell that is left out because no single answer is beyond dispute (several official
languages, a contested capital, a country on two continents).
Checked against pycountry and Babel by dev/check_tables.py.
"""

# country, capital, continent, language, currency
COUNTRIES = """
France,Paris,Europe,French,euro; Germany,Berlin,Europe,German,euro; Italy,Rome,Europe,Italian,euro
Spain,Madrid,Europe,Spanish,euro; Portugal,Lisbon,Europe,Portuguese,euro; Greece,Athens,Europe,Greek,euro
Austria,Vienna,Europe,German,euro; Belgium,Brussels,Europe,-,euro; Ireland,Dublin,Europe,-,euro
Finland,Helsinki,Europe,-,euro; Sweden,Stockholm,Europe,Swedish,krona; Norway,Oslo,Europe,Norwegian,krone
Denmark,Copenhagen,Europe,Danish,krone; Iceland,Reykjavik,Europe,Icelandic,krona; Poland,Warsaw,Europe,Polish,zloty
Hungary,Budapest,Europe,Hungarian,forint; Romania,Bucharest,Europe,Romanian,leu; Croatia,Zagreb,Europe,Croatian,euro
Serbia,Belgrade,Europe,Serbian,dinar; Czechia,Prague,Europe,Czech,koruna; Estonia,Tallinn,Europe,Estonian,euro
Latvia,Riga,Europe,Latvian,euro; Lithuania,Vilnius,Europe,Lithuanian,euro; Ukraine,Kyiv,Europe,Ukrainian,hryvnia
Albania,Tirana,Europe,Albanian,lek; Switzerland,Bern,Europe,-,franc; Slovakia,Bratislava,Europe,Slovak,euro
Russia,Moscow,-,Russian,ruble; Turkey,Ankara,-,Turkish,lira; the United Kingdom,London,Europe,English,pound
the Netherlands,Amsterdam,Europe,Dutch,euro; the United States,Washington,North America,-,dollar
Canada,Ottawa,North America,-,dollar; Mexico,Mexico City,North America,Spanish,peso
Costa Rica,San Jose,North America,Spanish,colon
Cuba,Havana,North America,Spanish,peso; Jamaica,Kingston,North America,English,dollar
Brazil,Brasilia,South America,Portuguese,real
Argentina,Buenos Aires,South America,Spanish,peso; Chile,Santiago,South America,Spanish,peso
Peru,Lima,South America,-,sol; Colombia,Bogota,South America,Spanish,peso
Venezuela,Caracas,South America,Spanish,bolivar; Ecuador,Quito,South America,-,dollar
Uruguay,Montevideo,South America,Spanish,peso
China,Beijing,Asia,Chinese,yuan; Japan,Tokyo,Asia,Japanese,yen; South Korea,Seoul,Asia,Korean,won
Mongolia,Ulaanbaatar,Asia,Mongolian,tugrik; India,New Delhi,Asia,-,rupee; Pakistan,Islamabad,Asia,-,rupee
Nepal,Kathmandu,Asia,Nepali,rupee; Bangladesh,Dhaka,Asia,Bengali,taka; Thailand,Bangkok,Asia,Thai,baht
Vietnam,Hanoi,Asia,Vietnamese,dong; Cambodia,Phnom Penh,Asia,Khmer,riel
Malaysia,Kuala Lumpur,Asia,Malay,ringgit; Iran,Tehran,Asia,Persian,rial; Iraq,Baghdad,Asia,-,dinar
Jordan,Amman,Asia,Arabic,dinar; Lebanon,Beirut,Asia,Arabic,pound; Saudi Arabia,Riyadh,Asia,Arabic,riyal
Afghanistan,Kabul,Asia,-,afghani; Egypt,Cairo,Africa,Arabic,pound
Morocco,Rabat,Africa,-,dirham; Tunisia,Tunis,Africa,Arabic,dinar; Libya,Tripoli,Africa,Arabic,dinar
Ethiopia,Addis Ababa,Africa,-,birr; Kenya,Nairobi,Africa,-,shilling; Ghana,Accra,Africa,English,cedi
Nigeria,Abuja,Africa,English,naira; Senegal,Dakar,Africa,French,franc
Namibia,Windhoek,Africa,English,dollar
Australia,Canberra,Oceania,English,dollar; New Zealand,Wellington,Oceania,-,dollar; Fiji,Suva,Oceania,-,dollar
"""

ELEMENTS = """
hydrogen H, helium He, lithium Li, beryllium Be, boron B, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne
sodium Na, magnesium Mg, aluminum Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K
calcium Ca, titanium Ti, chromium Cr, manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu, zinc Zn, arsenic As
bromine Br, krypton Kr, silver Ag, tin Sn, xenon Xe, barium Ba, tungsten W, platinum Pt, gold Au, mercury Hg
lead Pb, radium Ra, uranium U
"""

# animal, class, young, the verb of its sound
ANIMALS = """
dog mammal puppy bark, cat mammal kitten meow, cow mammal calf moo, horse mammal foal neigh, sheep mammal lamb bleat
goat mammal kid -, pig mammal piglet oink, lion mammal cub roar, tiger mammal cub -, bear mammal cub growl
wolf mammal pup howl, deer mammal fawn -, elephant mammal calf trumpet, whale mammal calf -, dolphin mammal calf -
kangaroo mammal joey -, mouse mammal - squeak, bat mammal pup -, zebra mammal foal -, donkey mammal foal bray
camel mammal calf -, giraffe mammal calf -, duck bird duckling quack, goose bird gosling honk, hen bird chick cluck
owl bird owlet hoot, eagle bird eaglet -, swan bird cygnet -, crow bird - caw, pigeon bird squab coo
penguin bird chick -, parrot bird - -, salmon fish - -, tuna fish - -, shark fish pup -, trout fish - -
frog amphibian tadpole croak, toad amphibian tadpole -, salamander amphibian - -, snake reptile - hiss
lizard reptile - -, turtle reptile hatchling -, crocodile reptile hatchling -, bee insect - buzz, ant insect - -
butterfly insect caterpillar -, beetle insect - -, cricket insect - chirp
"""

MONTHS = "January February March April May June July August September October November December"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"

OPPOSITES = """
hot cold, big small, tall short, fast slow, up down, left right, day night, open closed, happy sad, young old
rich poor, strong weak, full empty, wet dry, clean dirty, heavy light, early late, loud quiet, thick thin, wide narrow
deep shallow, true false, win lose, buy sell, push pull, give take, love hate, laugh cry, north south, east west
front back, inside outside, above below, before after, always never, good bad, easy difficult, soft hard, near far
high low, first last, alive dead, black white, more less, asleep awake, cheap expensive, safe dangerous, polite rude
"""

PLURALS = """
mouse mice, goose geese, child children, man men, woman women, foot feet, tooth teeth, ox oxen, person people
knife knives, wife wives, life lives, leaf leaves, wolf wolves, half halves, shelf shelves, loaf loaves, thief thieves
calf calves, potato potatoes, tomato tomatoes, hero heroes, city cities, baby babies, box boxes, bus buses
elf elves, scarf scarves, berry berries, fox foxes, church churches, dish dishes, lady ladies
"""

PASTS = """
go went, see saw, eat ate, run ran, come came, take took, give gave, make made, write wrote, drink drank, sing sang
swim swam, fly flew, know knew, think thought, buy bought, bring brought, catch caught, teach taught, find found
tell told, say said, stand stood, sit sat, sleep slept, feel felt, leave left, lose lost, break broke, speak spoke
choose chose, drive drove, ride rode, fall fell, grow grew, throw threw, draw drew, wear wore, hold held, build built
send sent, hear heard, keep kept, begin began
"""

COLORS = """
grass green, snow white, blood red, coal black, the sky blue, bananas yellow, carrots orange, lemons yellow, milk white
strawberries red, chocolate brown, flamingos pink, pumpkins orange, emeralds green, rubies red, ravens black
"""

PEOPLE = """
Tom Anna Ben Mia Sam Lily Max Emma Leo Nora Jack Ella Paul Sara Peter Julia David Clara Oscar Lucy Henry Alice Simon
Rosa Felix Maria Hugo Eva Adam Ruth Noah Ida Otto Vera Carl Jane
"""

OBJECTS = """
ball book key lamp cup hat coin drum kite doll bell rope pen map ring box bag shoe spoon mirror ticket candle basket
bottle hammer blanket pencil letter flower guitar camera brush
"""

PLACES = """
kitchen garden park library garage office barn forest market museum shop tower cave castle hotel cellar
"""

GOODS = """
apples pears plums eggs books pens coins stones cards cups shells nuts stamps balls flowers tickets cookies oranges
marbles buttons
"""

# Words to spell and to count letters in.
WORDS = """
apple banana cherry orange lemon grape melon peach pear plum strawberry raspberry blueberry pineapple coconut carrot
potato tomato onion garlic pepper cabbage spinach pumpkin cucumber lettuce bread butter cheese coffee sugar honey cookie
chocolate pancake sandwich noodle pizza salad soup egg bacon chicken vanilla cinnamon ginger almond walnut
dog cat horse rabbit turtle elephant giraffe monkey gorilla hippopotamus crocodile kangaroo penguin parrot pigeon eagle
butterfly beetle spider lobster octopus jellyfish hamster leopard cheetah buffalo flamingo crab whale zebra
house garden kitchen window door floor wall roof chimney bedroom bathroom cellar ladder carpet curtain pillow blanket
table chair cupboard bottle glass bowl spoon fork knife plate kettle mirror candle lamp clock calendar hammer needle
school teacher pupil lesson paper pencil eraser notebook library letter alphabet number addition question answer
book story poem picture color yellow purple green brown orchestra piano guitar violin trumpet balloon puppet
river lake ocean island beach valley hill forest flower grass leaf pebble rainbow cloud winter summer autumn
weather hurricane volcano planet jupiter universe rocket engine wheel bicycle airplane helicopter railway balcony
village bridge corridor harbor castle palace office market hospital bakery factory museum farm church kingdom
father mother brother uncle cousin neighbor baby children family friend people queen king knight princess hero
finger shoulder elbow ankle eye nose cheek forehead heart bone foot hand knee
hello goodbye welcome please happiness success kindness freedom courage belief patience excellent beautiful wonderful
important different possible necessary little bigger happy funny lonely angry hungry clever careful peaceful
banner bubble committee coffin barrel bottom button cotton pattern puzzle arrow error narrow follow hollow
balloonist raccoon baggage pepperoni bookkeeper engineer address assassin possess hotel camel level noon kayak
jacket pocket coat boot glove ring necklace umbrella basket box parcel package present birthday holiday
football hockey chess jump run climb walk laugh whisper listen remember forget believe receive promise
"""

# Syllables of invented names. First syllables of TEST never begin an invented name in reading or SFT.
INVENTED_FIRST = """
Bra Blo Cral Cor Dra Dro Fel Flo Gar Gre Gul Hol Hes Jor Jav Kal Kre Kor Lor Lun Mar Mol Nor Nel Or Pel Pra Quo Rav Rol
Sel Sor Tar Tor Tre Ul Van Vor Wal Wen Yal Yor Zan Zel Zor Bel Cas Dun Est Fan
"""
INVENTED_FIRST_TEST = "Bri Cla Dor Gla Hal Jun Kir Lem Mur Nav Pol Ras Sten Tul Ver Wor Zil Fro"
INVENTED_MIDDLE = """
ba be bi bo da de di do fa fe fo ga ge go la le li lo lu ma me mi mo na ne ni no pa pe po ra re ri ro sa se so ta te ti
to va ve vi vo za ze zo bra dra gra kra tra bla gla pla sta ska
"""
INVENTED_LAST = {
    "country": "nia via ria land stan dor mark lia tania goria vania mar tan rea zia",
    "element": "nium rium lium dium tium vium zine gen ron dine",
    "animal": "bat fin tail pus don rax lot bird mouse gar nix ster",
}
