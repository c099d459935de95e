"""The recipes that need less work, as changes to a config."""

INT8 = ('teachers.image.precision="int8"', 'teachers.video.precision="int8"')
MASKS = ("data.masks_per_clip=4",)
HALF = ("objective.predict_fraction=0.5",)
STORED = ('teachers.cache.path="in memory"',)  # read from files, too, with --data
RECIPES = {
    "exact": (),
    "compiled": ("teachers.compile=true",),
    "ahead": ("teachers.ahead=true",),
    "compiled+ahead": ("teachers.compile=true", "teachers.ahead=true"),
    "int8": INT8,
    "masks4": MASKS,
    "int8+masks4": (*INT8, *MASKS),
    "half": HALF,
    "stored": STORED,
    "stored+masks4": (*STORED, *MASKS),
    "int8+masks4+half": (*INT8, *MASKS, *HALF),
}
