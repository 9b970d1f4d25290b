"""Short stories for children from a seeded probabilistic grammar: a corpus whose entropy is known exactly.

`python -m gpt_lightning.data.tales` writes the stories of `input.txt` and tells their floor in bits per byte.

How to read the grammar. `rule = text | text` lists the texts of a rule from common to rare: the text of rank
r = 0, 1, ... has a weight of 1 / (r + 4), a flat form of Zipf's law. In a text
  [rule]         draws one of the rule's texts; the rule's name may be told by the story: `[{kind}.home]`
  [rule>memory]  draws and remembers; what is remembered is not drawn again in the same story
  {memory}       says what is remembered; {memory.property} says the property of it (a rule of a single text)
  {she}          is a property of the hero, as {him} and {his} are: the names decide
A slot whose name has a capital letter says its text with one.
Draws are made where their words stand and no two series of draws tell the same story, so that the bits of the
draws are the bits of the text, its end included.
"""

import argparse
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SEPARATOR = "<|endoftext|>"  # alone on the line between two stories
SEED, STORIES = 1337, 1550  # the bundled input.txt

GRAMMAR = """
story = [opening] [treasure] [plot] [ending]

opening = [Once] there was a [nature>nature] [kind>kind] named [name>hero], who lived in a [crooked]
  [house] [by] the [site].
  | In a [crooked] [house] [by] the [site] there lived a [nature>nature] [kind>kind] named [name>hero].
once = once upon a time | long ago | one day | many years ago | one spring | in the old days | one winter
name = [girl] | [boy]
girl = Lily | Mia | Rosie | Poppy | Nora | Daisy | Hazel | Ivy
boy = Tom | Pip | Max | Finn | Oliver | Toby | Hugo | Sam
helper name = [woman] | [man]
woman = Olga | Martha | Bertha | Agnes | Edith | Ursula
man = Otto | Walter | Rufus | Gustav | Albert | Boris
nature = kind | brave | shy | curious | clever | gentle | merry | cheerful | careful | dreamy | stubborn |
  quiet | polite | sleepy | proud | patient | restless | lonely | playful | thoughtful
kind = rabbit | mouse | fox | bear | hedgehog | kitten | puppy | lamb | piglet | pony | fawn | goat |
  donkey | hamster | panda | calf
crooked = crooked | little | tiny | cozy | round | narrow | sunny | wooden | dusty | leaky | pretty |
  drafty | tall | painted | mossy | hidden | empty | drowsy
house = house | hut | cottage | cabin | tent | tower | barn | wagon | cave | basket | attic | cellar |
  treehouse | boot | barrel | castle
by = by | near | behind | below
site = mill | river | forest | church | well | bridge | bakery | school | harbor | market | garden |
  vineyard | station | fountain | inn | smithy | waterfall | orchard | quarry | lighthouse

treasure = {His} [dearest] treasure was a [color] [thing>thing], which {his} [elder] had [bought] in
  [Paris].
  | For {his} birthday {she} got a [color] [thing>thing], which {his} [elder] had [bought] in [Paris].
dearest = dearest | greatest | only | secret
elder = grandmother | mother | father | grandfather | aunt | uncle | sister | brother
color = red | blue | green | golden | white | yellow | silver | brown | orange | purple | pink | striped |
  black | gray | speckled | turquoise
bought = bought | found | won | made | painted | mended
paris = Paris | London | Rome | Vienna | Cairo | Lisbon | Athens | Moscow | Dublin | Venice | Berlin |
  Boston | Prague | Delhi | Oslo | Tokyo
thing = kite | ball | lantern | scarf | drum | boat | bell | book | hat | umbrella | basket | blanket |
  flute | teapot | mirror | balloon | trumpet | ribbon
kite.use = flew the kite over the hill | let the kite dance in the wind
ball.use = threw the ball against the barn | kicked the ball through the garden
lantern.use = lit the lantern at the window | hung the lantern on a branch
scarf.use = put on the scarf | wrapped the scarf around a tree
drum.use = beat the drum like thunder | played a march on the drum
boat.use = sailed the boat in the bathtub | let the boat float in a puddle
bell.use = rang the bell at the gate | shook the bell merrily
book.use = read the book by the fire | read the book aloud
hat.use = wore the hat in the garden | waved the hat at the neighbors
umbrella.use = opened the umbrella in the rain | twirled the umbrella in the sun
basket.use = filled the basket with berries | picked flowers into the basket
blanket.use = spread the blanket on the grass | built a tent from the blanket
flute.use = played a sweet song on the flute | played the flute for the sheep
teapot.use = made tea in the teapot | poured tea from the teapot
mirror.use = caught sunbeams in the mirror | made faces in the mirror
balloon.use = let the balloon bob in the breeze | tied the balloon to the fence
trumpet.use = blew the trumpet from the roof | played a fanfare on the trumpet
ribbon.use = twirled the ribbon in circles | tied the ribbon in a bow

plot = [day] [sight] [meeting] [mishap] [lament] [return] [thanks]
  | [day] [sight] [mishap] [lament] [arrival] [thanks]
  | [day] [sight] [gift]
  | [contest]
day = One [weather] [morning] in [month], {she} packed a [rusty] [ware>ware1], a [rusty] [ware>ware2], a
  [rusty] [ware>ware3], a [rusty] [ware>ware4]
  and the {thing} and [set off] to the [place>place].
weather = sunny | windy | bright | gray | warm | misty | rainy | frosty | golden | cool | foggy | snowy |
  cloudy | mild | stormy | clear
morning = morning | afternoon | day | evening
month = May | April | June | March | October | September | July | November | August | January | December |
  February
rusty = rusty | big | old | small | shiny | new | wet | heavy | lucky | broken | dirty | strange | ugly |
  yellow | wooden | flat | purple | square | soft | crooked | warm | long | lovely | thin
ware = apple | candle | plum | bun | map | pear | nail | comb | bottle | pencil | sock | pebble | nut |
  magnet | pin | needle | whistle | cucumber | onion | soap | postcard | lemon | carrot | rope | coin |
  feather | spoon | button | brush | egg | pumpkin | clock
set off = set off | went out | hurried | wandered off | skipped along
baker = baker | queen | miller | tailor | doctor | king | teacher | shepherd | neighbors | mayor |
  fisherman | gardener | pirate | cobbler | carpenter | wizard
sight = On the way {she} saw [company], [company] and [company].
company = [two] [snails] [dancing] [on] a [wall]
two = two | three | four | five | seven | ten | twelve | six | eight | nine
snails = snails | geese | sheep | hens | crickets | pigs | cows | ants | cats | mice | pigeons | dogs |
  bees | ladybugs | worms | camels | crabs | clowns | soldiers | giants | wizards | lions | frogs |
  pirates
dancing = dancing | singing | sleeping | quarreling | waiting | snoring | painting | skating | reading |
  juggling | laughing | counting | yawning | marching | whispering | knitting | fishing | swimming |
  cooking | crying
on = on | under | behind | beside
wall = wall | tree | cart | bush | roof | fence | haystack | ladder | bathtub | bench | bridge | barrel |
  gate | tent | piano | sofa | statue | rock | puddle | chimney

temper = wise | jolly | noble | grumpy | nervous | solemn | cranky | lovely | elegant | fearless | humble
  | generous | shaggy | serious | famous | modest
age = old | young | plump | thin | tall | wrinkled | little | fat
swim.kind = duck | otter | frog | turtle
climb.kind = squirrel | marten | monkey | chipmunk
fly.kind = crow | owl | robin | swallow
dig.kind = mole | badger | terrier | gopher
swim.place = river | pond | lake | stream
climb.place = orchard | forest | oak | grove
fly.place = windmill | tower | castle | lighthouse
dig.place = meadow | beach | field | quarry
place = [climb.place] | [swim.place] | [dig.place] | [fly.place]

meeting = There {she} met a [temper] [age] [{place.skill}.kind>kind2] named [helper name>helper], who was
  [hungry]. {Hero} gave {helper.him} a [rusty] [ware].
hungry = hungry | very sad | cold | bored | lonely | tired | lost
mishap = [Suddenly] a [rude] [magpie] [snatched] the {thing} and dropped it [{place.skill}.spot].
suddenly = suddenly | just then | at noon | but soon
rude = rude | cheeky | clumsy | grumpy | silly | greedy | nasty | cunning
magpie = magpie | goose | raven | jackdaw | turkey | swan | rooster | gull
snatched = snatched | took | grabbed | stole
swim.spot = into the water | between two rocks | among the reeds | into the waves
climb.spot = into the leaves | onto a branch | into a nest | onto a twig
fly.spot = onto the roof | onto the weathercock | behind a window | onto a ledge
dig.spot = down a hole | under a heap of earth | into a crack | down a shaft
lament = "[Oh no]!" [cried] {hero}.
oh no = oh no | oh dear | help | dear me | what bad luck | now it is gone
cried = cried | shouted | called | wailed
arrival = [Just then] a [temper] [age] [{place.skill}.kind>kind2] named [helper name>helper] came by.
  {Helper} [{place.skill}.act] and brought back the {thing}.
return = [Just then] {helper} came by, [{place.skill}.act] and brought back the {thing}.
just then = now | after a while | at that moment | before long | at last
swim.act = dived to the bottom | swam out | jumped in with a splash | paddled ahead
climb.act = ran up the bark | swung from branch to branch | climbed to the top | leaped from twig to twig
fly.act = spread both wings | flew up in a circle | rose into the air | soared above the roof
dig.act = dug a tunnel | shoveled the earth aside | dug until the dust flew | burrowed down
thanks = "[Thank you], {helper}!" [said] {hero}.
thank you = thank you | a thousand thanks | you are a true friend | how kind you are | I am so glad
said = said | cried | whispered | laughed

gift = There {she} met a [temper] [age] [{place.skill}.kind>kind2] named [helper name>helper], who was
  [hungry]. {Hero} gave {helper.him} the {thing}. [Later] {helper} came back with the {thing} and a
  [rusty] [ware].
later = three days later | that same evening | the next morning | a week later | at the first snow | a
  year later
contest = One [weather] [morning] in [month] there was a [fair] at the [place>place], and {hero} [brought]
  the {thing}. [sight] "What a [ugly] {thing}," [said] a [temper] [age] [{place.skill}.kind>kind2] named
  [helper name>helper]. But {hero} [{thing}.use], and the [baker] gave {him} the first prize, a [rusty]
  [ware]. {Hero} shared it with {helper}.
fair = fair | contest | grand show | feast | parade
brought = brought | showed | carried
ugly = ugly | old | ordinary | tiny | dull

ending = On the way home {hero} bought [purchase], [purchase] and [purchase]. That evening {hero} and
  {helper} ate
  [sweet] [noodles], [sweet] [noodles], [sweet] [noodles] and [sweet] [noodles] and [{thing}.use] until
  [late].
  And {hero} dreamed of [polite] [whales], [polite] [whales] and [polite] [whales] on the [moon].
purchase = [two] [rusty] [goods]
goods = candles | buttons | ribbons | pencils | spoons | bottles | mittens | marbles | pillows | flutes |
  lamps
  | brooms | stamps | slippers | tickets | bells | shovels | stockings | boxes | ladles | chairs | umbrellas
  | postcards | melons | drums | carpets | paintbrushes | mirrors | rings | cushions | jars | hats
sweet = sweet | hot | cold | fried | sour | salty | burnt | fresh | spicy | crunchy | golden | green |
  boiled | baked | creamy | stale
noodles = noodles | pancakes | plums | soup | cherries | waffles | dumplings | strawberries | porridge |
  peaches | cheese | popcorn | pickles | potatoes | beans | pies | pudding | muffins | rice | cabbage
late = the stars came out | it was dark | the moon rose | the candle burned down | they fell asleep | the
  owls called
polite = dancing | flying | tiny | golden | talking | giant | sleepy | dotted | polite | invisible |
  singing | wild | velvet | barefoot | melancholy | green
whales = whales | elephants | pirates | dragons | tigers | fish | clouds | kings | lions | trains |
  dolphins | storks | pancakes | castles | mermaids | owls | teacups | camels
moon = moon | rainbow | sea | train | island | roof | stairs | clouds | ice | hill
"""


def _parse(grammar: str) -> dict[str, tuple[str, ...]]:
    """The rules of a grammar text, with the pronouns of every name and the skill of every kind and place."""
    rules = {}
    for line in re.sub(r"\n +", " ", grammar.strip()).splitlines():
        if line:
            name, texts = line.split(" = ", 1)
            rules[name] = tuple(text.strip() for text in texts.split("|"))
    she, he = "she her her", "he him his"
    for names, pronouns in {"girl": she, "boy": he, "woman": she, "man": he}.items():
        for name in rules[names]:
            for key, pronoun in zip(("she", "him", "his"), pronouns.split(), strict=True):
                rules[f"{name}.{key}"] = (pronoun,)
    for rule in [rule for rule in rules if rule.endswith((".kind", ".place"))]:
        for text in rules[rule]:
            rules[f"{text}.skill"] = (rule.split(".")[0],)
    return rules


RULES = _parse(GRAMMAR)
SLOT = re.compile(r"\[(?P<rule>[^\]>]+)(?:>(?P<memory>\w+))?\]|\{(?P<recall>[\w.]+)\}")


def options(rule: str, memory: dict[str, str]) -> dict[str, float]:
    """Texts that a rule can draw and their probabilities, which sum to 1; what is remembered is left out."""
    known = set(memory.values())
    weights = {text: 1 / (rank + 4) for rank, text in enumerate(RULES[rule]) if text not in known}
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def tell(choose: Callable[[str, Mapping[str, float]], str], rule: str = "story") -> str:
    """Tells a story; `choose(rule, options)` picks one of the options, which maps texts to probabilities."""
    memory: dict[str, str] = {}

    def say(slot: re.Match[str]) -> str:
        name = slot["rule"] or slot["recall"]
        capital, name = name[0].isupper(), SLOT.sub(say, name[0].lower() + name[1:])
        if slot["rule"]:
            text = SLOT.sub(say, choose(name, options(name, memory)))
        else:
            remembered, _, key = (name if name.split(".")[0] in memory else f"hero.{name}").partition(".")
            text = memory[remembered]
            if key:
                text = SLOT.sub(say, RULES[f"{text}.{key}"][0])
        if slot["memory"]:
            memory[slot["memory"]] = text
        return text[0].upper() + text[1:] if capital else text

    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", SLOT.sub(say, f"[{rule}]"))


@dataclass(frozen=True)
class Tales:
    """The first `stories` stories of the seed's endless series."""

    seed: int = SEED
    stories: int = STORIES

    def __post_init__(self) -> None:
        if self.stories < 1:
            raise ValueError(f"stories={self.stories}; ask for at least 1 story")

    def stories_with_bits(self) -> Iterator[tuple[str, float]]:
        """Every story with its -log2 probability."""
        uniform = random.Random(self.seed).random  # the one method that is the same in every Python version
        bits = 0.0

        def choose(_: str, chances: Mapping[str, float]) -> str:
            nonlocal bits
            rest = uniform()
            for text, chance in chances.items():  # noqa: B007 (used after the loop)
                rest -= chance
                if rest < 0:
                    break
            bits -= math.log2(chance)
            return text

        for _ in range(self.stories):
            bits = 0.0
            yield tell(choose), bits

    def text(self) -> str:
        """The corpus: a story on each line, a line with the separator between two; it ends with a newline."""
        return f"\n{SEPARATOR}\n".join(self._bits) + "\n"

    def bits(self, document: str) -> float | None:
        """-log2 probability of one of the stories, None for a text that is none of them."""
        return self._bits.get(document)

    @cached_property
    def _bits(self) -> dict[str, float]:
        return dict(self.stories_with_bits())


def main(argv: list[str] | None = None) -> None:
    """Writes a corpus, and its floor to the standard error."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--stories", type=int, default=STORIES)
    parser.add_argument("--output", type=Path, help="a file; the standard output without it")
    args = parser.parse_args(argv)
    try:
        tales = Tales(args.seed, args.stories)
    except ValueError as error:
        parser.error(str(error))
    text = tales.text().encode()  # bytes: newlines are the same on every system
    if args.output:
        args.output.write_bytes(text)
    else:
        sys.stdout.buffer.write(text)
    stories = list(tales.stories_with_bits())
    bits, size = sum(bits for _, bits in stories), sum(len(story.encode()) for story, _ in stories)
    floor = f"{bits:.1f} bits in {size} bytes, floor {bits / size:.4f} bits per byte"
    print(f"{len(stories)} stories: {floor}", file=sys.stderr)


if __name__ == "__main__":
    main()
