"""The recipes that need less work, as changes to a config."""

INT8 = ('teachers.image.precision="int8"', 'teachers.video.precision="int8"')
MASKS = ("data.masks_per_clip=4",)
HALF = ("objective.predict_fraction=0.5",)
