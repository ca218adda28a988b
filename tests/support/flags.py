"""Settings of a test as the words of a command line."""


def as_flags(values):
    """Return the flags of a dictionary: a list is several words, True the bare flag, None leaves it out."""
    listed = []
    for name, value in values.items():
        if value is True:
            listed.append(f"--{name}")
        elif value is not None:
            listed += [f"--{name}", *(str(word) for word in (value if isinstance(value, list) else [value]))]
    return listed
