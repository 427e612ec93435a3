"""The course as a thing to be kept true: its index, its notebooks, and the README made from them."""
