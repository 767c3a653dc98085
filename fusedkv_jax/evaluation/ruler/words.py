"""Words that RULER's samples hide and count: nouns, adjectives, and their pairs."""

_NOUNS = """
acorn airport album alley almond anchor ankle antler apple apron arcade archer arrow atlas attic
autumn badge bagel bakery ballad balloon bamboo banjo banner barley barrel basil basket beach
beacon beaver bell berry bicycle bishop blanket blossom boulder bracelet branch breeze brick
bridge broom bucket buffalo butter button cabin cactus camel canal candle canoe canyon captain
caravan carbon cargo carpet carrot castle cavern cedar cellar chapel cherry chimney cider circus
citadel clinic clover coast cobra coffee comet compass copper coral cotton cousin cradle crater
cricket crystal curtain cushion dagger daisy dancer deputy desert diamond dinner dolphin donkey
dragon drawer eagle easel echo elbow elephant ember engine envelope falcon feather ferry fiddle
finger flannel flute forest fossil fountain fox galaxy gallery garage garden garlic garnet gazelle
geyser ginger glacier glove goblet goose granite grape gravel grocer guitar hammer hammock harbor
harvest hazel hedge helmet heron hollow honey horizon hornet hotel iceberg igloo inkwell island
ivory jacket jaguar jasmine jelly jewel jungle kayak kernel kettle kitchen kitten ladder lagoon
lantern laundry lemon leopard letter library lily linen lizard lobster locket lotus magnet mango
mantle maple marble market meadow medal melon mirror mitten monkey moss motor mountain museum
mustard needle nephew nickel notebook nutmeg oasis ocean olive onion orchard ostrich otter oyster
paddle palace panther parade parcel parrot pasture peach pebble pelican pencil pepper piano pigeon
pillow pirate planet plaza pocket poet pond porch potato prairie puddle pumpkin puzzle quarry
quilt rabbit radish raft rainbow raven ribbon river robin rocket saddle sailor salad salmon sandal
satchel saucer scarf school shadow shelter shovel signal silver sketch spider spoon squirrel
stable statue summit sunset swallow table tailor teapot temple thimble thistle thunder ticket
tiger timber tomato torch tower trumpet tulip tunnel turtle umbrella uncle valley velvet village
violin volcano waffle wagon walnut walrus water whistle willow window winter wizard yogurt zebra
zipper
""".split()

_ADJECTIVES = """
able agile amber ancient angry aware basic bitter bold brave breezy brief bright brittle broad
busy calm careful cheap clean clear clever cloudy coarse cold cosmic costly cozy crisp
cruel curious dark deep dense distant dizzy double dry dull dusty eager early easy elegant empty
equal faint fair famous fancy fast fierce fine firm flat foggy fond formal fragile free fresh
frozen funny gentle giant glad golden grand great grim happy hardy harsh hasty heavy hidden honest
huge humble hungry icy ideal idle jolly keen kind large late lazy legal light little lively local
lonely long loud loyal lucky major mellow merry mild minor misty modern modest narrow neat noble
noisy odd orange open painted pale patient plain polite proud pure purple quick quiet rapid rare
ready rich rigid ripe rough round royal rural rusty sandy serious shallow sharp shiny short shy
silent simple sleepy slim slow smooth soft solid spare steady steep stern strange strict strong
sturdy subtle sudden sunny sweet swift tall tame tasty tender thick thin tidy tiny tired tough
upper useful vague vast vivid warm weary wicked wide wild wise witty wooden young
""".split()

SINGLES = tuple(sorted({*_NOUNS, *_ADJECTIVES}))
NUM_PAIRS = len(_NOUNS) * len(_ADJECTIVES)


def pair(number: int) -> str:
    """The pair `number` of `NUM_PAIRS`, such as "quiet-lantern"."""
    adjective, noun = divmod(number, len(_NOUNS))
    return f"{_ADJECTIVES[adjective]}-{_NOUNS[noun]}"
