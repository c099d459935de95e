"""The recipes that need less work, as changes to a config."""

INT8 = ('targets.image.precision="int8"', 'targets.video.precision="int8"')
MASKS = ("mask.per_clip=4",)
HALF = ("mask.predict_fraction=0.5",)
STORED = ('teachers.cache.path="in memory"',)  # read from files, too, with --data
RECIPES = {
    "exact": (),
    "compiled": ("teachers.compile=true",),
    "prefetch": ("teachers.prefetch=true",),
    "compiled+prefetch": ("teachers.compile=true", "teachers.prefetch=true"),
    "int8": INT8,
    "masks4": MASKS,
    "int8+masks4": (*INT8, *MASKS),
    "half": HALF,
    "stored": STORED,
    "stored+masks4": (*STORED, *MASKS),
    "int8+masks4+half": (*INT8, *MASKS, *HALF),
}
