"""A trained model in use: features of images, two images, a gallery and searches in it, and the
faults of a data set."""
